"""`textenvs tune`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from agents.cli.quiet import quieten_hugging_face
from agents.reports.search import HISTORY, plot_search
from agents.training.search import BEST, FOUND, Search
from agents.training.spec import RunSpec


@dataclass(frozen=True)
class Tune(RunSpec):
    """Search for better options, and write them to a file that `train --config` takes.

    All options of `train` are those of every trial; what is searched for is tried by Optuna, in the
    first trial as it is. Held out is the validation split.
    """

    trials: int = 30
    """How many, those that are there already included."""
    seeds: int = 1
    """How many runs of each trial, with the seeds from --seed on; the mean counts."""
    workers: int = 1
    """How many trials at a time, each in a process of its own. 0: in this process."""
    threads: int = 1
    """Threads of each."""
    out: Path | None = None
    """The folder of the search, which goes on if it was killed. Default: runs/tune/ENV-ALGO."""

    def __post_init__(self) -> None:
        """Check nothing yet: `tune` does."""
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))

    def spell(self, name: str) -> str:
        """Return an option as it is given."""
        return f"--{name.replace('_', '-')}"


def tune(options: Tune, console: Console) -> None:
    """Search, and show what was found."""
    quieten_hugging_face()
    for name, least in {"trials": 1, "seeds": 1, "workers": 0, "threads": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    spec = RunSpec(**{field.name: getattr(options, field.name) for field in fields(RunSpec)})
    if spec.eval_split is None and spec.dataset is None:
        spec = replace(spec, eval_split="validation")
    folder = options.out or Path("runs") / "tune" / f"{spec.env_id}-{spec.algo}"
    search = Search(spec, folder, options.seeds)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    best = search.run(options.trials, options.workers, options.threads, say)
    plot_search(folder)
    for name, value in best.items():
        say(f"  {name}: {value}")
    say((folder / BEST).read_text().split("\nenv:")[0].replace("# ", ""))
    say(f"{folder}: {BEST}, {FOUND}, {HISTORY}, study.db, and a run folder for each trial")
    say(f"Next: textenvs train --config {folder / BEST}")
