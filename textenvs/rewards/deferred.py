"""Slow reward terms, scored in a thread of their own while an environment goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from textenvs.rewards.scoring import enter_scores, raw_scores
from textenvs.rewards.terms import RewardTerm
from textenvs.task import Transcript


class DeferredScorer:
    """Scores slow terms after the turns that they are about; see `TextEngine.deferred_scorer`.

    A term gets the transcripts in the order in which their turns ended, `size` at a time and the
    rest when `resolve` is called. So its batches depend on what was said, never on how long the
    scoring took: a model's scores may depend on the batch in their last digits.

    Args:
        terms: All the terms of the environment's reward, slow or not.
        size: How many transcripts to a batch.
        observed: All the terms that are only observed.
    """

    def __init__(
        self, terms: Sequence[RewardTerm], size: int, observed: Sequence[RewardTerm] = ()
    ) -> None:
        self._terms, self._observed = terms, observed
        self._slow = [term for term in (*terms, *observed) if term.slow]
        self._size = size
        self._infos: list[dict[str, Any]] = []
        self._waiting: dict[str, list[Transcript]] = {term.name: [] for term in self._slow}
        self._batches: dict[str, list[Future[list[float | None]]]] = {
            t.name: [] for t in self._slow
        }
        # One thread, so that a term is never called twice at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")

    def defer(self, infos: Sequence[dict[str, Any]]) -> None:
        """Keep the infos of turns that have ended until their slow terms are known.

        Raises:
            ValueError: If a term has failed on an earlier batch.
        """
        self._infos.extend(infos)
        for info in infos:
            for term in self._slow:
                if term.applies_to(info["transcript"]):
                    self._waiting[term.name].append(info["transcript"])
                    if len(self._waiting[term.name]) == self._size:
                        self._submit(term)

    def resolve(self) -> list[dict[str, Any]]:
        """Wait for all scores, and return all infos complete; see `enter_scores`.

        Raises:
            ValueError: If a term fails, as `raw_scores` says. No info is then changed.
        """
        for term in self._slow:
            if self._waiting[term.name]:
                self._submit(term)
        scores = {
            name: iter([score for batch in batches for score in batch.result()])
            for name, batches in self._batches.items()
        }
        for info in self._infos:
            own = {
                term.name: next(scores[term.name]) if term.applies_to(info["transcript"]) else None
                for term in self._slow
            }
            enter_scores(info, self._terms, self._observed, own)
        return self._infos

    def close(self) -> None:
        """Drop the batches that wait, and wait for the one that is being scored."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, term: RewardTerm) -> None:
        for batches in self._batches.values():
            for batch in batches:
                if batch.done():
                    batch.result()  # raises what the term raised: early, and not after the rollout
        transcripts, self._waiting[term.name] = self._waiting[term.name], []
        self._batches[term.name].append(self._thread.submit(raw_scores, term, transcripts))
