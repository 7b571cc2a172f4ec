"""`textenvs compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agents.cli.quiet import quieten_hugging_face
from agents.cli.several import SeveralRuns
from agents.reports.comparison import CURVES, PICTURE, TABLE, report
from agents.training.comparison import EVALUATIONS, Comparison, contestants
from agents.training.parsing import resolve_env_id


@dataclass(frozen=True)
class Compare(SeveralRuns):
    """Train with several algorithms, the same budget of tokens each, and compare them.

    All options of `train` are those of every run; what an algorithm does not have is left out. The
    folder is runs/compare/ENV, if none is given.
    """

    algos: tuple[str, ...] = ("ppo", "grpo", "rloo", "reinforce++", "a2c", "sft")
    """Which, as ppo,grpo or ppo grpo; grpo:dapo is one with a recipe, tuned.yaml one with the
    options of a file."""
    seeds: int = 3
    """How many runs of each, with the seeds from --seed on."""
    level: float | None = None
    """The held-out reward that all are asked when they reach. Default: nine tenths of the way from
    the start to the best of all."""


def compare(options: Compare, console: Console) -> None:
    """Compare, and show what came out."""
    quieten_hugging_face()
    own = options.of_runs(seeds=1)
    if not options.env:
        raise ValueError("A comparison needs an environment, such as TextGen-v0.")
    algos = [name for word in options.algos for name in word.split(",") if name]
    freq = options.eval_freq or max(1, options.timesteps // EVALUATIONS)
    own = {"checkpoint_freq": freq, **own, "eval_freq": freq}
    folder = options.out or Path("runs") / "compare" / resolve_env_id(options.env)
    seeds = range(options.seed, options.seed + options.seeds)
    comparison = Comparison(contestants(algos, **own), seeds, folder)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    def show() -> None:
        done = comparison.results()
        if not done:
            return
        title = f"{resolve_env_id(options.env)}, {options.timesteps:,} tokens"
        missing = len(comparison.runs()) - len(done)
        title += f" ({missing} of {len(comparison.runs())} runs are missing)" if missing else ""
        console.print(report(done, folder, title, options.level))
        say(f"{folder}: {TABLE}, {CURVES}, {PICTURE}, and a run folder for each seed")

    comparison.results()  # Refused, if other runs are there.
    try:
        comparison.train(options.workers, options.threads, say)
    finally:
        show()
