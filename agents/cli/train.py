"""`textenvs train`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape

from agents import parallel
from agents.cli.quiet import quieten_hugging_face
from agents.reports.curves import CURVE, plot_learning_curve
from agents.reports.live import LiveLines, metrics_table
from agents.reports.next_steps import next_steps
from agents.reports.tables import comparison_table, summary_table
from agents.training.run import Run
from agents.training.spec import RunSpec


@dataclass(frozen=True)
class Train(RunSpec):
    """Train a transformer on a text environment, and leave a run folder."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *(*RunSpec.MAY_CHANGE, "progress", "quiet", "verbose"),
    )

    resume: Path | None = None
    """Go on with the killed or interrupted run in this folder, instead of starting one. All other
    options are the run's own; device, checkpoint-freq, trace-episodes, report-to, progress, quiet
    and verbose may be given anew."""
    config: Path | None = None
    """A .toml or .yaml file of options; those on the command line go first."""
    set: tuple[str, ...] = ()
    """Options as NAME=VALUE, such as gae_lambda=0.9; they go before the file's."""
    run_dir: Path | None = None
    """The run's folder. Default: runs/ENV/DATE-TIME."""
    progress: bool = True
    """Whether to show progress bars on a terminal."""
    quiet: bool = False
    """Show nothing but errors."""
    verbose: bool = False
    """Show every metric after each rollout, and not a line."""

    def __post_init__(self) -> None:
        """Check nothing yet: `train` does, or tyro would put a frame around the message."""
        if self.run_dir is not None:  # text, as config.json has it
            object.__setattr__(self, "run_dir", Path(self.run_dir))

    def spell(self, name: str) -> str:
        """Return an option as it is given."""
        return f"--{name.replace('_', '-')}"

    def to_config(self) -> dict[str, Any]:
        """Return what a run's config.json holds: where its options came from is not in it."""
        config = super().to_config()
        for name in ("resume", "config", "set"):
            del config[name]
        return config


def train(options: Train, console: Console) -> None:
    """Train, and show what came out."""
    options.check()
    quieten_hugging_face()
    if options.quiet or not parallel.is_main():
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
    write = partial(console.print, highlight=False, soft_wrap=True)
    lines = LiveLines(write, run.spec.timesteps, run.spec.own_reward)

    def show(row: dict[str, Any]) -> None:
        if options.verbose:
            console.print(metrics_table(row))
        else:
            lines(row)

    bars = options.progress and console.is_terminal and not console.quiet
    try:
        summary = run.train(lambda line: console.print(line, soft_wrap=True), bars, show)
    except KeyboardInterrupt:  # before there was anything to write
        if run.folder.is_dir():
            command = f"textenvs train --resume {run.folder}"
            console.print(f"Interrupted: start it again by {command}", soft_wrap=True)
        raise
    if summary:
        plot_learning_curve(run)
        show_results(run, console)


def show_results(run: Run, console: Console) -> None:
    """Show what came out, and what to do with it."""
    summary = run.summary()
    before, after = run.transcripts("before"), run.transcripts("after")
    console.print(comparison_table(before, after, 5, console.color_system is not None))
    console.print(summary_table(summary, run.spec.own_reward))
    if "best" in summary:
        best = summary["best"]
        at = f"{best['mean_reward']:.3f} at {best['timesteps']:,} tokens"
        console.print(f"Best held-out reward: {at}, kept in {best['model']}")
    console.print(f"{summary['tokens_per_second']:,.0f} tokens/s on {summary['device']}")
    console.print(f"Run folder: {run.folder}", soft_wrap=True)
    console.print("\nWhat next?")
    for purpose, command in next_steps(run):
        console.print(f"  {purpose:<29}{escape(command)}", soft_wrap=True, highlight=False)
