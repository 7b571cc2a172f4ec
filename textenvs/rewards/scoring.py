"""Scoring transcripts: what terms make of them, and errors that name the term and the example."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from textenvs.rewards.terms import RewardTerm
from textenvs.task import Example, Task, Transcript, Turn
from textenvs.text.messages import check_messages

# Where the frames of an error are ours, and not those of who wrote the reward.
_OWN_FILES = (__file__, RewardTerm.score.__code__.co_filename)


def raw_scores(term: RewardTerm, transcripts: Sequence[Transcript]) -> list[float | None]:
    """Return a term's scores without its weight: one finite number for each transcript.

    Turns that a term does not score (see `RewardTerm.applies_to`) get None.

    Raises:
        ValueError: If the term raises, or returns anything but one finite number for each
            transcript. The error names the term and the example, and shows where the term failed.
    """
    scores: list[float | None] = [None] * len(transcripts)
    wanted = [i for i, transcript in enumerate(transcripts) if term.applies_to(transcript)]
    if not wanted:
        return scores
    batch = [transcripts[i] for i in wanted]
    try:
        raw = _call(term, batch)
    except Exception as error:
        raise ValueError(
            f"The reward term {term.name!r} failed with {type(error).__name__}: {error} "
            f"({_first_failure(term, batch)}){_user_traceback(error)}"
        ) from error
    if len(raw) != len(batch):
        raise ValueError(
            f"The reward term {term.name!r} returned {len(raw)} scores for {len(batch)} "
            f"transcripts, the first of them with prompt {batch[0].prompt!r}."
        )
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
        scores[i] = number
    return scores


def score_transcripts(term: RewardTerm, transcripts: Sequence[Transcript]) -> list[float]:
    """Return a term's weighted scores; turns that it does not score get 0. See `raw_scores`."""
    return [_weighted(term, score) for score in raw_scores(term, transcripts)]


def score_turns(
    task: Task,
    terms: Sequence[RewardTerm],
    observed: Sequence[RewardTerm],
    transcripts: Sequence[Transcript],
    deferred: bool = False,
) -> list[dict[str, Any]]:
    """Return the info of each turn that has ended: transcript, scores, and success at the end.

    Args:
        task: Says what a success is, where no term does.
        terms: What is paid.
        observed: What is only reported.
        transcripts: The turns.
        deferred: Whether slow terms are left out, for `enter_scores` to add them later.

    Raises:
        ValueError: If a term fails; see `raw_scores`.
    """
    now = [term for term in (*terms, *observed) if not (deferred and term.slow)]
    scores = {term.name: raw_scores(term, transcripts) for term in now}
    told = any(term.success_score is not None for term in terms)
    infos: list[dict[str, Any]] = []
    for i, transcript in enumerate(transcripts):
        info: dict[str, Any] = {"transcript": transcript, "reward_terms": {}}
        enter_scores(info, terms, observed, {name: own[i] for name, own in scores.items()})
        if transcript.final and terms and not told:
            success = task.is_success(transcript)
            if success is not None:
                info["is_success"] = bool(success)
        infos.append(info)
    return infos


def enter_scores(
    info: dict[str, Any],
    terms: Sequence[RewardTerm],
    observed: Sequence[RewardTerm],
    scores: Mapping[str, float | None],
) -> None:
    """Enter what terms have scored into a turn's info.

    Args:
        info: It has `transcript` and `reward_terms`; what is there already stays.
        terms: What is paid, in the order of `info["reward_terms"]`.
        observed: What is only reported, in `info["observed"]`.
        scores: Those that are known, by name, without weights; see `raw_scores`.
    """
    paid = {
        **info["reward_terms"],
        **{term.name: _weighted(term, scores[term.name]) for term in terms if term.name in scores},
    }
    # Sums are rounded in the order of their parts: keep the order of the terms.
    info["reward_terms"] = {term.name: paid[term.name] for term in terms if term.name in paid}
    seen = {
        **info.get("observed", {}),
        **{t.name: t.weight * score for t in observed if (score := scores.get(t.name)) is not None},
    }
    if seen:
        info["observed"] = {term.name: seen[term.name] for term in observed if term.name in seen}
    for term in terms:
        score = scores.get(term.name)
        if info["transcript"].final and term.success_score is not None and score is not None:
            info["is_success"] = score >= term.success_score


def check_example(task: Task, terms: Iterable[RewardTerm], example: Example) -> None:
    """Refuse an example that the task or one of the terms cannot score.

    Raises:
        ValueError: If it cannot.
    """
    task.check_example(example)
    check_references(terms, example)


def check_references(terms: Iterable[RewardTerm], example: Example) -> None:
    """Refuse an example without references if one of the terms needs some.

    Raises:
        ValueError: If one does.
    """
    for term in terms:
        if term.needs_references and not example.references:
            raise ValueError(
                f"the example with prompt {example.prompt!r} has none of the references that the "
                f"reward term {term.name!r} compares responses to: give it references, or use a "
                "reward that needs none."
            )


def try_terms(task: Task, terms: Iterable[RewardTerm], example: Example) -> None:
    """Score one made-up response, so that a term that fails does so before anything long begins.

    The response is the example's first reference, else the first of the task's choices, else none.

    Raises:
        ValueError: If a term fails; see `raw_scores`.
    """
    response = next(iter((*example.references, *(task.choices or ()), "")))
    prompt = task.prompt(example)
    said = prompt if isinstance(prompt, str) else check_messages(prompt)[-1]["content"]
    turns = (Turn("user", said), Turn("agent", response))
    for term in terms:
        raw_scores(term, [Transcript(example, turns, response_tokens=1)])


def _weighted(term: RewardTerm, score: float | None) -> float:
    return 0.0 if score is None else term.weight * score


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


def _user_traceback(error: Exception) -> str:
    """Return where an error comes from, without the frames of this package's calls."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename not in _OWN_FILES]
    return "".join(["\n", *traceback.format_list(theirs)]).rstrip() if theirs else ""
