"""`textenvs train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from agents import parallel
from agents.cli.quiet import quieten_hugging_face
from agents.reports.curves import CURVE, plot_learning_curve
from agents.reports.tables import summary_table, transcripts_table
from agents.training.run import Run
from agents.training.spec import RunSpec


@dataclass(frozen=True)
class Train(RunSpec):
    """Train a transformer on a text environment, and leave a run folder."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (*RunSpec.MAY_CHANGE, "progress")

    resume: Path | None = None
    """Go on with the killed or interrupted run in this folder, instead of starting one. All other
    options are the run's own; device, checkpoint-freq, trace-episodes and progress may be given
    anew."""
    run_dir: Path | None = None
    """The run's folder. Default: runs/ENV/DATE-TIME."""
    progress: bool = True
    """Whether to show progress bars."""

    def __post_init__(self) -> None:
        """Check nothing yet: `train` does, or tyro would put a frame around the message."""
        if self.run_dir is not None:  # text, as config.json has it
            object.__setattr__(self, "run_dir", Path(self.run_dir))

    def spell(self, name: str) -> str:
        """Return an option as it is given."""
        return f"--{name.replace('_', '-')}"

    def to_config(self) -> dict[str, Any]:
        """Return what a run's config.json holds: how it was resumed is not in it."""
        config = super().to_config()
        del config["resume"]
        return config


def train(options: Train, console: Console) -> None:
    """Train, and show what came out."""
    options.check()
    quieten_hugging_face()
    if not parallel.is_main():
        console = Console(quiet=True)
    if options.resume is None:
        run = Run.create(options, options.run_dir)
    else:
        run = Run.open(options.resume, options)
        if run.is_finished:
            console.print(f"The run in {run.folder} is finished: nothing to do.", soft_wrap=True)
            if parallel.is_main() and not (run.folder / CURVE).is_file():
                plot_learning_curve(run)  # It was killed just before.
            return
    summary = run.train(console.print, options.progress and parallel.is_main())
    if not summary:
        return
    plot_learning_curve(run)
    console.print(transcripts_table(run.transcripts("before"), run.transcripts("after"), count=5))
    console.print(summary_table(summary, run.spec.own_reward))
    console.print(f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['device']}")
    console.print(f"Run folder: {run.folder}", soft_wrap=True)
