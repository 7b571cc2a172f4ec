"""Metrics of Hugging Face's `evaluate` library as reward terms."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from textenvs.rewards import metrics
from textenvs.rewards.terms import RewardTerm
from textenvs.task import Transcript


class MetricReward(RewardTerm):
    """Any Hugging Face `evaluate` metric, computed for each transcript on its own.

    Args:
        metric: An `evaluate.EvaluationModule` (or anything with the same `compute`), or what
            `evaluate.load` takes: a metric's name or the path of a metric script.
        key: Which entry of the metric's result is the score. None: its only number.
        weight: What the score is multiplied by.
        name: Defaults to the metric's name.
        slow: Whether scoring takes long, so that `agents.PPO` scores while the rollout goes on. The
            metric must then work when it is called from another thread.
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
        declared = self._declared()
        self.needs_references = not declared or any("references" in f for f in declared)

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return the metric of each response against its references."""
        return [self._score(transcript) for transcript in transcripts]

    def _score(self, transcript: Transcript) -> float:
        response, declared = transcript.response, self._declared()
        if not self.needs_references:
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
