"""`textenvs compare`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from agents.cli.quiet import quieten_hugging_face
from agents.reports.comparison import CURVES, PICTURE, TABLE, report
from agents.training.comparison import Comparison, contestants
from agents.training.spec import RunSpec

# How many evaluations a learning curve has where nothing is said.
EVALUATIONS = 8


@dataclass(frozen=True)
class Compare(RunSpec):
    """Train with several algorithms, the same budget of tokens each, and compare them.

    All options of `train` are those of every run; what an algorithm does not have is left out.
    """

    algos: tuple[str, ...] = ("ppo", "grpo", "rloo", "reinforce++", "a2c", "sft")
    """Which, as ppo,grpo or ppo grpo; grpo:dapo is one with a recipe, tuned.yaml one with the
    options of a file."""
    seeds: int = 3
    """How many runs of each, with the seeds from --seed on."""
    workers: int = 1
    """How many runs at a time, each in a process of its own. 0: in this process."""
    threads: int = 1
    """Threads of each run."""
    level: float | None = None
    """The held-out reward that all are asked when they reach. Default: nine tenths of the way from
    the start to the best of all."""
    out: Path | None = None
    """The folder of the comparison; what is finished there is not run again. Default:
    runs/compare/ENV."""

    def __post_init__(self) -> None:
        """Check nothing yet: `compare` does."""
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))

    def spell(self, name: str) -> str:
        """Return an option as it is given."""
        return f"--{name.replace('_', '-')}"


def compare(options: Compare, console: Console) -> None:
    """Compare, and show what came out."""
    quieten_hugging_face()
    algos = [name for word in options.algos for name in word.split(",") if name]
    for name, least in {"seeds": 1, "workers": 0, "threads": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    own = {field.name: getattr(options, field.name) for field in fields(RunSpec)}
    spec = RunSpec(**{**own, "algo": "ppo", "recipe": None})
    if not spec.eval_freq:
        spec = replace(spec, eval_freq=max(1, spec.timesteps // EVALUATIONS))
    folder = options.out or Path("runs") / "compare" / spec.env_id
    seeds = range(spec.seed, spec.seed + options.seeds)
    comparison = Comparison(contestants(spec, algos), seeds, folder)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    try:
        results = comparison.train(options.workers, options.threads, say)
    finally:
        done = comparison.results()
        if done:
            title = f"{spec.env_id}, {spec.timesteps:,} tokens"
            console.print(report(done, folder, title, options.level))
            say(f"{folder}: {TABLE}, {CURVES}, {PICTURE}, and a run folder for each seed")
    assert len(results) == len(comparison.runs())
