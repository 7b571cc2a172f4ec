from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.reports.comparison import CURVES, PICTURE, TABLE, columns, report
from agents.reports.figures import drawn
from agents.reports.statistics import bootstrap_interval, interquartile_mean
from agents.training.comparison import Point, Result


def result(algo: str, seed: int, final: float, **after: Any) -> Result:
    summary = {"mean_reward": 0.1, "standard_error": 0.03, "observed": {"chrf": 0.2}}
    summary |= {"response_tokens": 9.0, "distinct_responses": 1.0}
    after = {"standard_error": 0.04, "observed": {"chrf": 0.3}, "response_tokens": 12.0, **after}
    end = {**summary, "mean_reward": final, **after}
    curve = (Point(0, 0, 0.1), Point(100, 10, (0.1 + final) / 2), Point(200, 30, final))
    return Result(algo, seed, curve, summary, end, final + 0.05, 1.5)


def test_a_quarter_is_cut_off_at_both_ends() -> None:
    assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0
    assert interquartile_mean([100.0, 2.0, 4.0, -100.0]) == 3.0
    assert interquartile_mean(np.arange(10) ** 2) == pytest.approx(np.mean([4, 9, 16, 25, 36, 49]))
    assert interquartile_mean([[0, 1, 1, 9], [0, 2, 2, 9]]).tolist() == [1.0, 2.0]


def test_the_interval_is_that_of_means_of_drawn_runs() -> None:
    low, high = bootstrap_interval([[0.0], [1.0]], draws=4000)
    assert (low, high) == (0.0, 1.0)  # a quarter of the draws has one run alone, each
    low, high = bootstrap_interval([[0.0], [1.0]], confidence=0.4, draws=4000)
    assert (low, high) == (0.5, 0.5)
    scores = np.random.default_rng(0).normal(size=(200, 1))
    low, high = bootstrap_interval(scores)
    # Of a normal distribution the interquartile mean is about as good as 1.2 times the mean.
    assert 0.8 < (high - low) / (2 * 1.96 / np.sqrt(200)) < 1.4
    assert low < interquartile_mean(scores.ravel()) < high
    # Task by task: where all runs of each are alike, there is nothing to be unsure of.
    assert bootstrap_interval([[1.0, 5.0]] * 3) == (3.0, 3.0)


def test_where_a_curve_reaches_a_reward() -> None:
    run = result("ppo", 0, 0.9)
    assert run.reached(0.5) == Point(100, 10, 0.5)
    assert run.reached(0.7) == pytest.approx(Point(150, 20, 0.7))
    assert run.reached(0.05) == Point(0, 0, 0.1) and run.reached(0.91) is None
    assert run.tokens_per_second == pytest.approx(200 / 30)


def test_the_table_says_what_the_runs_say() -> None:
    runs = {"ppo": [result("ppo", s, f) for s, f in enumerate((0.7, 0.9, 0.5))]}
    runs["sft"] = [result("sft", 0, 0.8)]
    first, second = columns(runs, 0.75)
    assert (first["algorithm"], first["after"], first["95 % interval"]) == ("sft", "0.800", "")
    assert (second["after"], second["spread"], second["chrf *"]) == (
        "0.700",
        "0.200",
        "0.200 -> 0.300",
    )
    assert (second["tokens to 0.75"], second["train - held out"]) == ("162 (1/3)", "+0.050")
    assert (second["KL"], second["tokens/s"]) == ("1.5", "7")
    assert second["tokens per episode"] == "9.0 -> 12.0"
    # The mean of three rises over the error of a mean of three.
    assert (first["rise/error"], second["rise/error"]) == ("+14.0", f"{0.6 / 0.05 * 3**0.5:+.1f}")


def test_without_errors_there_is_no_number_of_them() -> None:
    (row,) = columns({"ppo": [result("ppo", 0, 1.0)]}, None)
    assert row["rise/error"] == "+18.0"
    for none in (0.0, None):  # what all earn alike, one example
        run = result("ppo", 0, 1.0, standard_error=none)
        before = {**run.before, "standard_error": none}
        (row,) = columns({"ppo": [replace(run, before=before)]}, None)
        assert row["rise/error"] == ""


def test_where_all_got_worse_nothing_is_reached(tmp_path: Path) -> None:
    report([result("ppo", 0, 0.05)], tmp_path, "Mine")
    assert "tokens to" not in (tmp_path / TABLE).read_text()


def test_a_report_is_a_table_curves_and_a_picture(tmp_path: Path) -> None:
    report([result(a, s, 0.5 + s / 10) for a in ("ppo", "a2c") for s in (0, 1)], tmp_path, "Mine")
    text = (tmp_path / TABLE).read_text()
    assert text.startswith("# Mine\n\n| algorithm |") and f"]({PICTURE})" in text
    assert "tokens to 0.505" in text  # nine tenths of the way from 0.1 to 0.55
    with (tmp_path / CURVES).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[2] == {
        **{"algo": "ppo", "seed": "0", "tokens": "200", "seconds": "30"},
        "held_out_reward": "0.5",
    }
    assert (tmp_path / PICTURE).stat().st_size > 10_000


def test_the_names_are_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours are ten: what comes after has lines of another kind, and its name says so."""
    seen: dict[str, Any] = {}

    @contextmanager
    def looked_at(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with drawn(*args, **kwargs) as (figure, axes):
            yield figure, axes
            seen.update({t.get_text(): t.get_color() for t in axes[2].get_yticklabels()})
            seen["lines"] = [(line.get_color(), line.get_linestyle()) for line in axes[0].lines]

    monkeypatch.setattr("agents.reports.comparison.drawn", looked_at)
    report([result(f"a{i}", 0, 0.5) for i in range(12)], tmp_path, "Mine")
    lines = seen.pop("lines")[:12]
    assert list(seen) == [*(f"a{i}" for i in range(10)), "- - a10", "- - a11"]
    assert list(seen.values()) == [colour for colour, _ in lines]
    assert [style for _, style in lines] == ["-"] * 10 + ["--"] * 2
