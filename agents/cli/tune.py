"""`textenvs tune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agents.cli.quiet import quieten_hugging_face
from agents.cli.several import SeveralRuns
from agents.training.spec import RunSpec
from agents.tuning.picture import HISTORY, plot_search
from agents.tuning.search import BEST, FOUND, MAX_FALL, STUDY, Search


@dataclass(frozen=True)
class Tune(SeveralRuns):
    """Search for better options, and write them to a file that `train --config` takes.

    All options of `train` are those of every trial; what is searched for is tried by Optuna, in the
    first trial as it is. A task's own validation split is held out; of a dataset what `train` holds
    out. The folder is runs/tune/ENV-ALGO, if none is given.
    """

    trials: int = 30
    """How many, those that are there already included."""
    seeds: int = 3
    """How many runs of each trial, with the seeds from --seed on; the mean counts. With one the
    best may be what was lucky."""
    max_fall: float = MAX_FALL
    """How far what is observed and not paid for, such as well_formed, may fall in a trial that is
    to be the best. inf: as far as it likes."""


def tune(options: Tune, console: Console) -> None:
    """Search, and show what was found."""
    quieten_hugging_face()
    spec = RunSpec(**options.of_runs(trials=1, seeds=1))
    folder = options.out or Path("runs") / "tune" / f"{spec.env_id.replace('/', '-')}-{spec.algo}"
    search = Search(spec, folder, options.seeds, options.max_fall)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    try:
        best = search.run(options.trials, options.workers, options.threads, say)
    except KeyboardInterrupt:
        say(f"Interrupted; the same command goes on. The best so far: {folder / BEST}")
        raise
    plot_search(folder)
    for name, value in best.items():
        say(f"  {name}: {value}")
    say("\n".join(search.judgement()))
    say(f"{folder}: {BEST}, {FOUND}, {HISTORY}, {STUDY}, and a run folder for each trial")
    say(f"Next: textenvs train --config {folder / BEST} --seed {spec.seed + options.seeds}")
