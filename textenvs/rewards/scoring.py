"""Scoring transcripts with a term: weights, and errors that name the term and the example."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from textenvs.rewards.terms import RewardTerm
from textenvs.task import Transcript


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
