"""Reward terms: each scores a batch of finished transcripts; an environment adds them up."""

from __future__ import annotations

from collections.abc import Sequence

from textenvs.rewards.words import said_words
from textenvs.task import ScoreFunction, Task, Transcript


class RewardTerm:
    """One named, weighted part of a reward.

    Args:
        name: How the term is called in `info["reward_terms"]`.
        weight: What its scores are multiplied by.
        every_turn: Whether it scores each turn of a conversation or only the last one.
        slow: Whether scoring takes long, as that of a model or a subprocess does. `agents.PPO` then
            scores such terms in a thread of its own while the rollout goes on, as many transcripts
            at a time as there are slots, and adds the scores before it learns from them. The run
            is the same, but callbacks see such a reward only when the rollout has ended. This takes
            a native vector environment without wrappers; anywhere else the reward comes with the
            step. The term must work when it is called from another thread, and draw from no global
            generator.

    Attributes:
        needs_references: Whether it can score no example without references; such an example is
            then refused when the environment is made.
        success_score: The least score, without the weight, that makes an episode a success; None:
            the term says nothing about success.
    """

    needs_references: bool = False
    success_score: float | None = None

    def __init__(
        self, name: str, weight: float = 1.0, every_turn: bool = False, slow: bool = False
    ) -> None:
        self.name = name
        self.weight = weight
        self.every_turn = every_turn
        self.slow = slow

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return one unweighted score for each transcript."""
        raise NotImplementedError(f"{type(self).__name__} must override RewardTerm.score.")

    def applies_to(self, transcript: Transcript) -> bool:
        """Return whether it has anything to say about this turn; otherwise the score is 0."""
        return transcript.final or self.every_turn

    def __repr__(self) -> str:
        """Name and weight."""
        return f"{type(self).__name__}({self.name!r}, weight={self.weight})"


class TaskReward(RewardTerm):
    """The task's own score."""

    def __init__(self, task: Task, weight: float = 1.0) -> None:
        super().__init__("task", weight, task.score_every_turn, task.slow_score)
        self.task = task
        self.needs_references = "references" in task.required_fields
        if type(task).is_success is Task.is_success:
            self.success_score = task.success_score

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return `Task.score`."""
        return self.task.score(transcripts)


class WellFormed(RewardTerm):
    """1 for a response that `Task.is_well_formed` accepts, else 0; every turn counts.

    Args:
        task: A task that overrides `is_well_formed`.
        weight: What the score is multiplied by, where it is paid.

    Raises:
        ValueError: If the task does not.
    """

    def __init__(self, task: Task, weight: float = 1.0) -> None:
        super().__init__("well_formed", weight, every_turn=True)
        if not self.is_known_to(task):
            raise ValueError(
                f"{type(task).__name__} cannot say whether a response is well formed: override "
                "Task.is_well_formed, or leave 'well_formed' out."
            )
        self.task = task

    @staticmethod
    def is_known_to(task: Task) -> bool:
        """Return whether a task can say it."""
        return type(task).is_well_formed is not Task.is_well_formed

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return 1 or 0 for each response."""
        return [float(bool(self.task.is_well_formed(t))) for t in transcripts]

    def applies_to(self, transcript: Transcript) -> bool:
        """Return whether the task can say it of this example."""
        return self.task.is_well_formed(transcript) is not None


class CallableReward(RewardTerm):
    """Any function from a list of transcripts to a list of numbers.

    A function with an attribute `needs_references` that is true makes a term that has it, too.

    Args:
        function: Called with a batch of transcripts; picklable if it is to run in subprocesses.
        name: Defaults to the function's name.
        weight: What the scores are multiplied by.
        every_turn: Whether it scores each turn of a conversation or only the last one.
        slow: Whether scoring takes long, so that `agents.PPO` scores while the rollout goes on. The
            function must then work when it is called from another thread.
    """

    def __init__(
        self,
        function: ScoreFunction,
        name: str | None = None,
        weight: float = 1.0,
        every_turn: bool = False,
        slow: bool = False,
    ) -> None:
        default = str(getattr(function, "__name__", type(function).__name__))
        super().__init__(name or default, weight, every_turn, slow)
        self.function = function
        marked = getattr(function, "func", function)  # functools.partial hides what it calls
        self.needs_references = bool(getattr(marked, "needs_references", False))

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Call the function."""
        return self.function(transcripts)


class LengthPenalty(RewardTerm):
    """Minus the tokens that a response takes beyond `target`; every turn counts.

    Args:
        weight: The cost of one token.
        target: How many tokens are free.
        name: How the term is called.
    """

    def __init__(self, weight: float = 0.01, target: int = 0, name: str = "length_penalty") -> None:
        super().__init__(name, weight, every_turn=True)
        self.target = target

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return minus the number of tokens too many."""
        return [-float(max(0, t.response_tokens - self.target)) for t in transcripts]


class MissingEOSPenalty(RewardTerm):
    """Minus 1 for a response that the budget ended, and not the agent; every turn counts.

    Not for tasks whose allowed tokens leave EOS out: there, every response is ended by the budget.

    Args:
        weight: The cost of a response without EOS.
        name: How the term is called.
    """

    def __init__(self, weight: float = 1.0, name: str = "missing_eos_penalty") -> None:
        super().__init__(name, weight, every_turn=True)

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return -1 without EOS and 0 with it."""
        return [-float(not t.stopped) for t in transcripts]


class RepetitionPenalty(RewardTerm):
    """Minus the share of n-grams of a response that occurred in it before; every turn counts.

    The n-grams are of words, which white space separates. In scripts that are written without
    spaces each character is a word, and a word that says the same six times or more in a row
    ("aaaaaaaa", "hahahahahaha") counts as so many words.

    Args:
        weight: The cost of a response that only repeats itself.
        n: The length of the n-grams, in words.
        name: How the term is called.
    """

    def __init__(self, weight: float = 1.0, n: int = 3, name: str = "repetition_penalty") -> None:
        super().__init__(name, weight, every_turn=True)
        if n < 1:
            raise ValueError(f"n must be at least 1, but it is {n}.")
        self.n = n

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return minus the share of repeated n-grams, in [-1, 0]."""
        return [-self._repeated(said_words(t.response.lower())) for t in transcripts]

    def _repeated(self, words: list[str]) -> float:
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
