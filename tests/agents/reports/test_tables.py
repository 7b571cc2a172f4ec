from __future__ import annotations

from typing import Any

import pytest

from agents.reports.differences import marked
from agents.reports.tables import (
    comparison_table,
    evaluation_table,
    summary_table,
    transcripts_table,
)
from tests.agents.reports.screens import shown


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("it was dull.", "it was great fun.", "it was [great fun.]"),
        ("a b c", "a c", "a c"),
        ("same", "same", "same"),
        ("", "all new", "[all new]"),
        ("one\ntwo", "one\nthree four", "one\n[three four]"),
        ("[x] y", "[x] z", "[x] [z]"),
    ],
)
def test_words_that_changed_are_in_brackets(before: str, after: str, expected: str) -> None:
    old, new = marked(before, after, None)
    assert (old.plain, new.plain) == (before, expected)


def test_words_that_changed_are_coloured() -> None:
    old, new = marked("it was dull.", "it was great.", "bold green")
    assert (old.plain, new.plain) == ("it was dull.", "it was great.")
    assert [new.plain[span.start : span.end] for span in new.spans] == ["great."]
    assert [old.plain[span.start : span.end] for span in old.spans] == ["dull."]


def record(response: str, reward: float, *more: tuple[str, str]) -> dict[str, Any]:
    turns = (("user", "The [soup]"), ("agent", response), *more)
    return {"turns": [{"role": role, "text": text} for role, text in turns], "reward": reward}


def test_before_and_after_side_by_side() -> None:
    before, after = [record("was cold", -0.5)], [record("was hot", 0.5)]
    text = shown(comparison_table(before, after, 5, colour=False))
    assert all(part in text for part in ("The [soup]", "was cold", "was [hot]", "-0.50", "0.50"))
    assert "\x1b[" not in text and text.count("The [soup]") == 1
    coloured = shown(comparison_table(before, after, 5, colour=True), colour=True)
    assert "\x1b[1;32mhot" in coloured and "[hot]" not in coloured


def test_a_terminal_does_not_obey_a_response() -> None:
    text = shown(transcripts_table([record("a\x1b[2Jb\x04", 0.0)], 1))
    assert "a\u241b[2Jb\u2404" in text and "\x1b" not in text and "\x04" not in text


def test_conversations_name_who_speaks() -> None:
    records = [record("When?", 0.0, ("user", "Friday"), ("agent", "Fine"))] * 7
    text = shown(transcripts_table(records, 3))
    assert text.count("agent: When?") == 3 and "user: Friday" in text


def summary(**more: Any) -> dict[str, Any]:
    return {
        "examples": 4,
        "mean_reward": 0.5,
        "standard_error": None,
        "success_rate": None,
        "reward_terms": {"task": 0.5},
        "observed": {"well_formed": 0.75},
        "response_tokens": 3.0,
        "stopped_by_eos": 1.0,
        "distinct_responses": 1.0,
        **more,
    }


def test_summaries_show_what_is_observed() -> None:
    whole = {"env_id": "X-v0", "timesteps": 128, "before": summary(), "after": summary()}
    text = shown(summary_table(whole, True))
    assert "well_formed" in text and text.count("0.750") == 2 and "None" not in text
    text = shown(evaluation_table("X-v0", summary(**{"pass@1": 0.25})))
    assert "observed: well_formed" in text and "0.7500" in text and "pass@1" in text
    assert "reward_terms: task" in text and "None" not in text and "standard_error" not in text
