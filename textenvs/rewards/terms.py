"""Reward terms: each scores a batch of finished transcripts; an environment adds them up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from textenvs.importing import load_object
from textenvs.rewards import metrics
from textenvs.task import ScoreFunction, Task, Transcript


class RewardTerm:
    """One named, weighted part of a reward.

    Args:
        name: How the term is called in `info["reward_terms"]`.
        weight: What its scores are multiplied by.
        every_turn: Whether it scores each turn of a conversation or only the last one.
        slow: Whether scoring takes long, as that of a model or a subprocess does. `agents.PPO` then
            scores in a thread of its own while the rollout goes on, as many transcripts at a time
            as there are slots, and adds the scores before it learns from them: the run is the same,
            but callbacks see such a reward only when the rollout has ended. It does so in a native
            vector environment without wrappers; anywhere else the reward comes with the step. The
            term must bear to be called from another thread, and draw from no global generator.
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
        slow: See `RewardTerm`.
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


class MetricReward(RewardTerm):
    """Any Hugging Face `evaluate` metric, computed for each transcript on its own.

    Args:
        metric: An `evaluate.EvaluationModule` (or anything with the same `compute`), or what
            `evaluate.load` takes: a metric's name or the path of a metric script.
        key: Which entry of the metric's result is the score. None: its only number.
        weight: What the score is multiplied by.
        name: Defaults to the metric's name.
        slow: See `RewardTerm`.
        **compute_kwargs: Passed on to `metric.compute`.

    A metric that takes several references gets them all; for one that takes a single reference
    the best score over the references counts; one that declares no references gets none.
    """

    def __init__(
        self,
        metric: Any,
        key: str | None = None,
        weight: float = 1.0,
        name: str | None = None,
        slow: bool = False,
        **compute_kwargs: Any,
    ) -> None:
        if isinstance(metric, str):
            import evaluate

            metric = evaluate.load(metric)
        if not hasattr(metric, "compute"):
            raise TypeError(
                "metric must be an evaluate metric or the name of one, "
                f"but it is a {type(metric).__name__}."
            )
        default = str(getattr(metric, "name", type(metric).__name__))
        super().__init__(name or default, weight, slow=slow)
        self.metric = metric
        self.key = key
        self.compute_kwargs = compute_kwargs

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return the metric of each response against its references."""
        return [self._score(transcript) for transcript in transcripts]

    def _score(self, transcript: Transcript) -> float:
        response, declared = transcript.response, self._declared()
        if declared and not any("references" in features for features in declared):
            return self._compute(response)
        references = list(metrics.references_of(transcript))
        if any(
            hasattr(features["references"], "feature") or isinstance(features["references"], list)
            for features in declared
            if "references" in features
        ):
            return self._compute(response, references=[references])
        return max(self._compute(response, references=[reference]) for reference in references)

    def _compute(self, response: str, **references: Any) -> float:
        result = self.metric.compute(predictions=[response], **references, **self.compute_kwargs)
        numbers = {k: v for k, v in result.items() if isinstance(v, Real)}
        if self.key is None and len(numbers) == 1:
            return float(next(iter(numbers.values())))
        if self.key not in result:
            raise ValueError(
                f"key must name one of the metric's results, {', '.join(map(repr, result))}, "
                f"but it is {self.key!r}."
            )
        # Some metrics return a list of one score for each prediction.
        return float(np.asarray(result[self.key]).item())

    def _declared(self) -> list[Any]:
        """Return the inputs that the metric declares: one set, alternatives, or none."""
        features = getattr(self.metric, "features", None)
        return features if isinstance(features, list) else [features] if features else []


_NAMED: dict[str, Callable[[Task], RewardTerm]] = {
    "task": TaskReward,
    "length_penalty": lambda _: LengthPenalty(),
    "missing_eos_penalty": lambda _: MissingEOSPenalty(),
    "repetition_penalty": lambda _: RepetitionPenalty(),
    "bleu": lambda _: CallableReward(metrics.bleu),
    "chrf": lambda _: CallableReward(metrics.chrf),
    "rouge_l": lambda _: CallableReward(metrics.rouge_l),
    "exact_match": lambda _: CallableReward(metrics.exact_match),
    "sentiment": lambda _: CallableReward(metrics.sentiment),
}
REWARD_NAMES = tuple(_NAMED)


def resolve_rewards(reward: Any, task: Task) -> list[RewardTerm]:
    """Return the terms that a `reward` argument stands for.

    Args:
        reward: None (the task's own score), a name out of `REWARD_NAMES`, "package.module:name",
            a function, a term, an `evaluate` metric, or a list of these, each optionally with a
            weight: `["task", ("length_penalty", 0.1), (my_function, 0.5)]`.
        task: The task whose own score "task" means.

    Raises:
        ValueError: For an unknown name, or two terms of one name.
        TypeError: For anything else.
    """
    items = reward if isinstance(reward, list) else [reward]
    if not items:
        raise ValueError("reward must not be an empty list: leave it out for the task's own.")
    terms = [_term(item, task) for item in items]
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"Two reward terms have the same name ({', '.join(names)}): set name=.")
    return terms


def _term(item: Any, task: Task) -> RewardTerm:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], (int, float)):
        term = copy.copy(_term(item[0], task))
        term.weight = float(item[1])
        return term
    if item is None:
        return TaskReward(task)
    if isinstance(item, RewardTerm):
        return item
    if isinstance(item, str):
        if item in _NAMED:
            return _NAMED[item](task)
        if ":" in item:
            return _term(load_object(item), task)
        raise ValueError(
            f"Unknown reward {item!r}: expected one of {', '.join(REWARD_NAMES)}, "
            "or 'package.module:function'."
        )
    if hasattr(item, "compute"):
        return MetricReward(item)
    if isinstance(item, type) and issubclass(item, RewardTerm):
        return item()  # type: ignore[call-arg]
    if callable(item):
        return CallableReward(item)
    raise TypeError(
        "reward must be None, a name, a function, a RewardTerm, an evaluate metric, or a list of "
        f"these (optionally with weights), but it is a {type(item).__name__}."
    )


def check_new_names(terms: Sequence[RewardTerm], present: Collection[str]) -> None:
    """Hold added terms to names that are not taken, so that no term hides another.

    Raises:
        ValueError: If a name is taken.
    """
    for term in terms:
        if term.name in present:
            raise ValueError(
                f"There already is a reward term {term.name!r}: give the added one another name "
                "with name=."
            )


def score_transcripts(term: RewardTerm, transcripts: Sequence[Transcript]) -> list[float]:
    """Return a term's weighted scores: one finite number for each transcript.

    Turns that a term does not score (see `RewardTerm.every_turn`) get 0.

    Raises:
        ValueError: If the term raises, or returns anything but one finite number for each
            transcript. The error names the term and the example.
    """
    wanted = [i for i, transcript in enumerate(transcripts) if term.applies_to(transcript)]
    if not wanted:
        return [0.0] * len(transcripts)
    batch = [transcripts[i] for i in wanted]
    try:
        raw = _call(term, batch)
    except Exception as error:
        raise ValueError(
            f"The reward term {term.name!r} failed with {type(error).__name__}: {error} "
            f"({_first_failure(term, batch)})"
        ) from error
    if len(raw) != len(batch):
        raise ValueError(
            f"The reward term {term.name!r} returned {len(raw)} scores for {len(batch)} "
            f"transcripts, the first of them with prompt {batch[0].prompt!r}."
        )
    scores = [0.0] * len(transcripts)
    for i, value, transcript in zip(wanted, raw, batch, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"The reward term {term.name!r} returned {value!r} for the example with prompt "
                f"{transcript.prompt!r} (response {transcript.response!r}): expected a finite "
                "number."
            )
        scores[i] = term.weight * number
    return scores


def _call(term: RewardTerm, batch: Sequence[Transcript]) -> list[Any]:
    raw: Any = term.score(batch)
    if not isinstance(raw, Iterable):
        raise TypeError(f"expected a list with a number for each transcript, got {raw!r}")
    return list(raw)


def _first_failure(term: RewardTerm, batch: Sequence[Transcript]) -> str:
    """Say which transcript a failing batch fails on."""
    for transcript in batch:
        try:
            _call(term, [transcript])
        except Exception:
            return f"example with prompt {transcript.prompt!r}, response {transcript.response!r}"
    return f"only on the whole batch of {len(batch)} transcripts"
