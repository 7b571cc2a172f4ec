"""A comparison as a table and as a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from agents.files import atomic_path, write_text
from agents.reports.figures import drawn
from agents.reports.statistics import bootstrap_interval, interquartile_mean
from agents.training.comparison import Result

TABLE, CURVES, PICTURE = "comparison.md", "comparison.csv", "comparison.png"
# How far on the way from the start to the best of all a reward is that all are asked to reach.
SHARE = 0.9
PLACES = 60  # of a curve
# Bands of more contestants lie on top of each other.
BANDS = 5


def report(
    results: Sequence[Result], folder: Path, title: str, threshold: float | None = None
) -> Table:
    """Write a table, all runs and a picture into a folder, and return a table for a terminal.

    Args:
        results: Of every run.
        folder: Where to.
        title: What is compared.
        threshold: The held-out reward that is asked for. None: so that `SHARE` of the way from the
            start to the best is gone.
    """
    by_algo = {name: [r for r in results if r.algo == name] for name in _names(results)}
    threshold = _threshold(by_algo) if threshold is None else threshold  # None: all got worse
    rows = columns(by_algo, threshold)
    text = f"# {title}\n\n{table(rows)}\n\n![learning curves]({PICTURE})\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TABLE, text)
    _write_curves(results, folder / CURVES)
    plot(by_algo, folder / PICTURE, title, threshold)
    return terminal_table(rows, title)


def columns(
    by_algo: Mapping[str, Sequence[Result]], threshold: float | None
) -> list[dict[str, str]]:
    """Return a row for each algorithm, the best first: cells by the names of their columns."""
    observed = sorted({name for rs in by_algo.values() for r in rs for name in r.after["observed"]})
    ranked = sorted(by_algo.items(), key=lambda item: -interquartile_mean(_final(item[1])))
    return [_columns(name, results, observed, threshold) for name, results in ranked]


def _columns(
    name: str, results: Sequence[Result], observed: Sequence[str], threshold: float | None
) -> dict[str, str]:
    final = _final(results)
    several = len(final) > 1
    low, high = bootstrap_interval(final[:, None])
    gaps = [
        None if r.train_reward is None else r.train_reward - r.after["mean_reward"] for r in results
    ]
    successes = [r.after.get("success_rate") for r in results]
    return {
        "algorithm": name.replace("|", "/"),
        "seeds": str(len(results)),
        "tokens": f"{np.median([r.curve[-1].tokens for r in results]):,.0f}",
        "held out before": _mean([r.before["mean_reward"] for r in results], ".3f"),
        "after": f"{interquartile_mean(final):.3f}",
        "95 % interval": f"{low:.3f} .. {high:.3f}" if several else "",
        "spread": f"{final.std(ddof=1):.3f}" if several else "",
        "rise/error": _rise(results),
        **({} if successes.count(None) else {"success": _mean(successes, ".2f")}),
        **{f"{name} *": _change(results, _observed(name), ".3f") for name in observed},
        "tokens per episode": _change(results, lambda side: side["response_tokens"], ".1f"),
        "distinct": _mean([r.after["distinct_responses"] for r in results], ".2f"),
        "train - held out": _mean(gaps, "+.3f"),
        **({} if threshold is None else _reached(results, threshold)),
        "KL": _mean([r.kl for r in results], ".1f"),
        "tokens/s": f"{np.median([r.tokens_per_second for r in results]):,.0f}",
    }


def _reached(results: Sequence[Result], threshold: float) -> dict[str, str]:
    """Return when a held-out reward was reached."""
    reached = [point for r in results if (point := r.reached(threshold)) is not None]
    column = f"tokens to {threshold:.3g}"
    if not reached:
        return {column: "never", "seconds": ""}
    tokens, seconds = (f"{np.median([point[i] for point in reached]):,.0f}" for i in (0, 1))
    missed = "" if len(reached) == len(results) else f" ({len(reached)}/{len(results)})"
    return {column: tokens + missed, "seconds": seconds}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as a table in Markdown, and what its columns are."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{NOTES}"


def terminal_table(rows: Sequence[Mapping[str, str]], title: str) -> Table:
    """Return the columns that say most, for a terminal."""
    left_out = {
        *("tokens", "spread", "rise/error", "success", "tokens per episode", "distinct"),
        *("train - held out", "seconds", "KL"),
    }
    shown = [name for name in rows[0] if name not in left_out]
    result = Table(*shown, title=title)
    result.columns[0].no_wrap = True
    for row in rows:
        result.add_row(*(row[name] for name in shown))
    return result


NOTES = (
    "*After* is the interquartile mean over seeds (of fewer than four their mean), its interval "
    "from a stratified bootstrap, *spread* the standard deviation over seeds, and *rise/error* "
    "how many standard errors the mean is above the start: those of the examples, without the "
    "spread over seeds. *Tokens* are those of training, as a rollout is never cut. What has a "
    "star is measured and not trained on; *distinct* is the share of held-out responses that "
    "differ from each other. *Tokens to* and *seconds* are medians of those seeds that reached "
    "that held-out reward, between evaluations by a straight line; seconds are those of rollouts "
    "and updates. *KL* is to the policy before training, in nats per training episode. Before "
    "training, too, NLPO plays under its mask."
)


def plot(
    by_algo: Mapping[str, Sequence[Result]], picture: Path, title: str, threshold: float | None
) -> None:
    """Draw held-out rewards over tokens and over seconds, and where the runs ended.

    Bands are drawn where there are few contestants.
    """
    from matplotlib.ticker import EngFormatter

    with drawn(picture, 3, figsize=(15, 4.6), width_ratios=(3, 3, 2)) as (figure, axes):
        # The names are the legend of all three: one in the first would lie on its curves.
        names, colours = [], []
        for number, (name, results) in enumerate(by_algo.items()):
            colour, style = f"C{number % 10}", "-" if number < 10 else "--"
            names.append(name if style == "-" else f"- - {name}")
            colours.append(colour)
            for axis, index in zip(axes, (0, 1), strict=False):
                places, middle, low, high = _band(results, index)
                axis.plot(places, middle, style, color=colour)
                if len(results) > 1 and len(by_algo) <= BANDS:
                    axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
            final = _final(results)
            axes[2].plot(final, [number] * len(final), "o", color=colour, alpha=0.4)
            axes[2].plot(interquartile_mean(final), number, "|", color=colour, ms=16, mew=3)
        for axis, label in zip(axes, ("tokens", "seconds of rollouts and updates"), strict=False):
            if threshold is not None:
                axis.axhline(threshold, color="grey", linewidth=0.8, linestyle=":")
            axis.set_xlabel(label)
            axis.set_ylabel("held-out reward")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.grid(alpha=0.3)
        axes[2].set_yticks(range(len(names)), names, fontweight="bold")
        for label, colour in zip(axes[2].get_yticklabels(), colours, strict=True):
            label.set_color(colour)
        axes[2].invert_yaxis()
        axes[2].set_xlabel("held-out reward at the end, each seed")
        axes[2].grid(alpha=0.3)
        figure.suptitle(title)


def _band(results: Sequence[Result], index: int) -> tuple[Any, Any, Any, Any]:
    """Return places on an axis (0: tokens, 1: seconds), and there the mean and its bounds."""
    end = min(r.curve[-1][index] for r in results)
    places = np.linspace(0, end, PLACES)
    curves = [
        np.interp(places, [p[index] for p in r.curve], [p.reward for p in r.curve]) for r in results
    ]
    rewards = np.array(curves)
    low, high = bootstrap_interval(rewards[:, None])
    return places, interquartile_mean(rewards, axis=0), low, high


def _threshold(by_algo: Mapping[str, Sequence[Result]]) -> float | None:
    start = float(np.mean([r.before["mean_reward"] for rs in by_algo.values() for r in rs]))
    best = max(float(interquartile_mean(_final(results))) for results in by_algo.values())
    return start + SHARE * (best - start) if best > start else None


def _final(results: Sequence[Result]) -> Any:
    return np.array([result.after["mean_reward"] for result in results])


def _names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.algo for result in results))


def _rise(results: Sequence[Result]) -> str:
    """Return how many of its standard errors the mean rise of the held-out reward is."""
    rises = [result.after["mean_reward"] - result.before["mean_reward"] for result in results]
    sides = (side for result in results for side in (result.before, result.after))
    errors = [side["standard_error"] for side in sides]
    if None in errors or not any(errors):  # of one example, or of what all earn alike
        return ""
    return f"{sum(rises) / math.hypot(*errors):+.1f}"


def _change(
    results: Sequence[Result], measure: Callable[[Mapping[str, Any]], float | None], form: str
) -> str:
    """Return what a measure was before and after."""
    both = [(result.before, result.after) for result in results]
    sides = ([measure(side) for side in sides] for sides in zip(*both, strict=True))
    return " -> ".join(_mean(values, form) for values in sides)


def _observed(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda side: side["observed"].get(name)


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else ""


def _write_curves(results: Sequence[Result], path: Path) -> None:
    """Write every point of every curve as CSV."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["algo", "seed", "tokens", "seconds", "held_out_reward"])
        for result in results:
            for point in result.curve:
                writer.writerow([result.algo, result.seed, *point])
