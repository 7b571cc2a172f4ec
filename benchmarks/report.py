"""The table, the figures and the pictures of a benchmark session."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import textenvs
from benchmarks.measuring import Row
from benchmarks.training import Training

PACKAGES = (
    "torch",
    "transformers",
    "stable-baselines3",
    "gymnasium",
    "numpy",
    "trl",
)
AGENTS_HEAD = """\
# Agents

`pytest benchmarks/test_agents.py` on {machine}; {versions}. Started {started}{load}.

Each algorithm trains on a few tokens from the warm start of its environment: whether it learns, and
what that costs. Which is better than which, `textenvs compare` tells.

"""
HEAD = """\
# Performance

`make bench` on {machine}; {versions}. Started {started}{load}.

What is compared ran in turns, round by round; a ratio is the median over the rounds, in brackets
the lowest and the highest. More is better, unless the target is the most that is allowed.

"""


@dataclass(frozen=True)
class Point:
    """A point of a picture: how fast something is at some size.

    Args:
        picture: The name of the picture's file.
        x: What is varied.
        at: Its value.
        who: What was measured.
        rate: Tokens in a second.
    """

    picture: str
    x: str
    at: float
    who: str
    rate: float


def machine() -> dict[str, Any]:
    """Return what this runs on: the CPU, its cores, torch's threads, the GPU."""
    import torch as th

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": th.get_num_threads(),
        "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def load() -> float | None:
    """Return how many processes want to run, in the mean over a minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    """Return the versions of what is compared, as far as it is installed."""
    found = {"textenvs": textenvs.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Row]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| what | against | ratio | target | met | ours | theirs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.skipped:
            lines.append(f"| {row.what} | {row.against} | not run: {row.skipped} | | | | |")
            continue
        sign = "" if row.bound == "least" else "at most "
        target = "" if row.target is None else f"{sign}{row.target:g}"
        met = "" if row.met is None else "yes" if row.met else "**no**"
        spread = ""
        if len(row.ratios) > 1:
            spread = f" ({_figure(min(row.ratios))} to {_figure(max(row.ratios))})"
        ratio = _figure(row.ratio) + (" " + row.unit if not row.against else "")
        rates = [
            "" if rate is None else f"{_figure(rate)} {row.unit}" for rate in (row.ours, row.theirs)
        ]
        lines.append(
            f"| {row.what} | {row.against} | {ratio}{spread} | {target} | {met} | "
            f"{rates[0]} | {rates[1]} |"
        )
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    """Return a number with about three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(
    folder: Path, rows: Sequence[Row], points: Sequence[Point], started: dict[str, Any]
) -> None:
    """Write performance.md, performance.json and the pictures.

    Args:
        folder: Where to.
        rows: The table.
        points: Those of all pictures.
        started: The `time` at which the session started, and the `load` of the machine then.
    """
    pictures = list(dict.fromkeys(point.picture for point in points))
    for picture in pictures:
        draw(folder / f"{picture}.png", [p for p in points if p.picture == picture])
    images = "".join(f"\n![{p.replace('_', ' ')}]({p}.png)\n" for p in pictures)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "rows": [row.summary() for row in rows],
        "points": [vars(point) for point in points],
    }
    _write(folder / "performance", HEAD, table(rows) + images, content, started)


def write_agents(folder: Path, trainings: Sequence[Training], started: dict[str, Any]) -> None:
    """Write agents.md and agents.json; see `write`."""
    content = {"trainings": [vars(training) for training in trainings]}
    _write(folder / "agents", AGENTS_HEAD, table_of_agents(trainings), content, started)


def table_of_agents(trainings: Sequence[Training]) -> str:
    """Return trainings in Markdown, those on one environment beside each other."""
    lines = [
        "| environment | algorithm | tokens | rollout, tokens/s | update, tokens/s | "
        "held out before | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for env in dict.fromkeys(training.env for training in trainings):
        lines += [
            f"| {t.env} | {t.algo} | {t.tokens:,} | {t.rollout:,.0f} | {t.update:,.0f} | "
            f"{t.before[0]:.3f} ± {t.before[1]:.3f} | {t.after[0]:.3f} ± {t.after[1]:.3f} |"
            for t in trainings
            if t.env == env
        ]
    return "\n".join(lines) + "\n"


def _write(
    path: Path, head: str, body: str, content: dict[str, Any], started: dict[str, Any]
) -> None:
    """Write a table and its figures, with what they were measured on and when."""
    from agents.files import write_text

    on, packages = machine(), versions()
    described = f"{on['cpu']}, {on['cores']} cores, {on['threads']} threads"
    if on["gpu"]:
        described += f", {on['gpu']}"
    text = head.format(
        machine=described,
        versions=", ".join(f"{name} {number}" for name, number in packages.items()),
        started=started["time"],
        load="" if started["load"] is None else f" at a load of {started['load']:.1f}",
    )
    content = {"machine": on, "versions": packages, "started": started, **content}
    write_text(path.with_suffix(".md"), text + body)
    write_text(path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")


def draw(path: Path, points: Sequence[Point]) -> None:
    """Draw tokens a second against what is varied, a line for each that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from agents.files import atomic_path

    figure, axis = plt.subplots(figsize=(5, 3.6))
    for who in dict.fromkeys(point.who for point in points):
        line = sorted((point.at, point.rate) for point in points if point.who == who)
        axis.plot(*zip(*line, strict=True), marker="o", label=who)
    axis.set_xlabel(points[0].x)
    axis.set_ylabel("tokens/s")
    at = sorted({point.at for point in points})
    if at[0] > 0 and len(at) > 2 and at[-1] / at[0] > 4:
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{value:g}" for value in at])
        axis.minorticks_off()
    axis.set_ylim(0)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
