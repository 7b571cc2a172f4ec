"""`textenvs evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from agents.cli.quiet import quieten_hugging_face
from agents.reports.tables import evaluation_table, transcripts_table
from agents.training.folder import CHECKPOINT
from agents.training.parsing import resolve_env_id
from agents.training.run import Run


@dataclass(frozen=True)
class Evaluate:
    """Play a run's agent on held-out examples, each once."""

    run: Positional[Path]
    """A run folder that `textenvs train` wrote."""
    env: Positional[str | None] = None
    """Another environment of the same vocabulary and budgets. Default: the run's own."""
    split: str | None = None
    """Default: what the run held out."""
    max_examples: int | None = None
    """Default: all of the split."""
    deterministic: bool = False
    """Take the most likely token each time."""
    samples: int = 5
    """How many transcripts to show."""
    seed: int = 0
    """For the sampling."""
    device: str = "auto"
    """cpu, cuda, ..."""


def evaluate(options: Evaluate, console: Console) -> None:
    """Evaluate, and show transcripts and metrics."""
    quieten_hugging_face()
    run = Run.open(options.run)
    if run.agent_path().name == CHECKPOINT:
        console.print("The run is not finished: this is its last checkpoint.")
    result = run.evaluate(
        options.env,
        options.split,
        options.max_examples,
        options.deterministic,
        options.seed,
        options.device,
    )
    console.print(transcripts_table(result.records(), count=options.samples))
    env_id = resolve_env_id(options.env or run.spec.env)
    console.print(evaluation_table(env_id, result.summary()))
