"""Reward terms: each scores a batch of finished transcripts; an environment adds them up."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

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

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return `Task.score`."""
        return self.task.score(transcripts)


class CallableReward(RewardTerm):
    """Any function from a list of transcripts to a list of numbers.

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
        return [-self._repeated(t.response.lower().split()) for t in transcripts]

    def _repeated(self, words: list[str]) -> float:
        ngrams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
