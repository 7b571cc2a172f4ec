"""Does PPO learn each environment? Held-out reward before and after, several seeds, as a table.

    python -m benchmarks.learnability --seeds 3 --jobs 2

Every cell is a run of the tiny model on one CPU thread; "before" is the warm-started model. A run
counts as learned if the held-out mean rose by more than two standard errors of the difference.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro

from agents import Run, RunSpec

# What differs from the defaults. Where a warm start comes close to the best return, little KL must
# not cost more than the last errors do. A label is one token after a long prompt.
SETTINGS = {
    "TextGen-v0": RunSpec("TextGen-v0"),
    "Dialogue-v0": RunSpec("Dialogue-v0", warm_start=2, timesteps=65_536, kl_coef=0.01),
    "Translation-v0": RunSpec("Translation-v0", warm_start=2, timesteps=98_304, kl_coef=0.01),
    "TextClassification-v0": RunSpec(
        "TextClassification-v0",
        warm_start=8,
        warm_start_learning_rate=1e-3,
        warm_start_batch_size=64,
        timesteps=12_288,
        n_steps=8,
        batch_size=128,
    ),
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    envs: tuple[str, ...] = tuple(SETTINGS)
    """Which environments."""
    seeds: int = 3
    """How many seeds, from 0 on."""
    jobs: int = 2
    """How many runs at a time."""
    out: Path = Path("benchmarks/results/learnability")
    """Where the table goes, as .md and .json."""


def run(spec: RunSpec) -> dict[str, Any]:
    """Train once in this process; return the run's summary."""
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        summary = Run.create(replace(spec, device="cpu"), Path(folder) / "run").train()
    return {**summary, "minutes": (time.perf_counter() - started) / 60}


def learned(summary: dict[str, Any]) -> bool:
    """Return whether the held-out reward rose by more than two standard errors."""
    before, after = summary["before"], summary["after"]
    error = math.hypot(before["standard_error"], after["standard_error"])
    return bool(after["mean_reward"] - before["mean_reward"] > 2 * error)


def table(summaries: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| environment | seed | before | after | learned | success | tokens | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in summaries:
        cells = [f"{s[k]['mean_reward']:.3f} ± {s[k]['standard_error']:.3f}" for k in KEYS]
        success = [s[k]["success_rate"] for k in KEYS]
        shown = ", ".join("" if rate is None else f"{rate:.0%}" for rate in success)
        lines.append(
            f"| {s['env_id']} | {s['seed']} | {cells[0]} | {cells[1]} | "
            f"{'yes' if learned(s) else 'no'} | {shown} | {s['timesteps']:,} | {s['minutes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


KEYS = ("before", "after")


def machine() -> str:
    """Return what the figures were measured on."""
    import torch
    import transformers

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, one thread a run, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def main() -> None:
    """Run everything and write the table."""
    options = tyro.cli(Options)
    todo = [
        replace(SETTINGS[env], seed=seed) for env in options.envs for seed in range(options.seeds)
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    summaries: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Learnability\n\n`python -m benchmarks.learnability` on {machine()}.\n\n"
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, spec) for spec in todo]):
            summaries = sorted([*summaries, done.result()], key=lambda s: (s["env_id"], s["seed"]))
            options.out.with_suffix(".md").write_text(head + table(summaries))
            options.out.with_suffix(".json").write_text(json.dumps(summaries, indent=2) + "\n")


if __name__ == "__main__":
    main()
