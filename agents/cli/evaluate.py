"""`textenvs evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from agents.cli.quiet import quieten_hugging_face
from agents.files import write_jsonl
from agents.reports.tables import evaluation_table, transcripts_table
from agents.training.folder import CHECKPOINT, is_run
from agents.training.options import DataOptions
from agents.training.parsing import resolve_env_id
from agents.training.pretrained import evaluate_model
from agents.training.run import Run


@dataclass(frozen=True)
class Evaluate(DataOptions):
    """Play held-out examples with any model."""

    model: Positional[str]
    """A run folder that `textenvs train` wrote, a model's folder, or a hub id."""
    env: Positional[str | None] = None
    """The environment, as for `textenvs train`. Default: the run's own."""
    split: str | None = None
    """Default: what the run held out; for a model test, or all of the dataset."""
    max_examples: int | None = None
    """Default: all of the split."""
    samples: int = 1
    """How often to play each example: from 2 on, best@k is told, what the best of k responses
    earns, and pass@k where the task knows success."""
    best_of: int | None = None
    """Play each example so often, and keep its best episode alone."""
    deterministic: bool = False
    """Take the most likely token each time."""
    temperature: float | None = None
    """Of the sampling. Default: the run's; for a model 1."""
    top_k: int | None = None
    """Sample from so many of the most likely tokens. Default: the run's; for a model all."""
    top_p: float | None = None
    """Sample from the most likely tokens that have this probability together. Likewise."""
    show: int = 5
    """How many transcripts to show."""
    output: Path | None = None
    """A .jsonl file to write all transcripts to."""
    quiet: bool = False
    """Show nothing but errors."""
    seed: int = 0
    """For the sampling."""
    device: str = "auto"
    """cpu, cuda, ..."""


def evaluate(options: Evaluate, console: Console) -> None:
    """Evaluate, and show transcripts and metrics."""
    quieten_hugging_face()
    if options.quiet:
        console = Console(quiet=True)
    _check(options)
    env = options.env
    if is_run(Path(options.model)):
        run = Run.open(options.model)
        env = env or run.spec.env
        if run.agent_path().name == CHECKPOINT:
            console.print("The run is not finished: this is its last checkpoint.")
    result = evaluate_model(
        options.model,
        options.env,
        split=options.split,
        max_examples=options.max_examples,
        deterministic=options.deterministic,
        seed=options.seed,
        device=options.device,
        samples=options.best_of or options.samples,
        **_given(options),
    )
    if options.best_of is not None:
        result = result.best()
    records = result.records()
    console.print(transcripts_table(records, options.show))
    summary = result.summary()
    if options.best_of is not None:
        summary = {"best of": options.best_of, **summary}
    console.print(evaluation_table(resolve_env_id(env or ""), summary))
    if options.output is not None:
        write_jsonl(options.output, records)
        console.print(f"{len(records):,} transcripts: {options.output}", soft_wrap=True)


def _check(options: Evaluate) -> None:
    """Refuse options that make no sense together."""
    if options.output is not None and (options.output.is_dir() or options.output.suffix == ""):
        raise ValueError(f"--output takes a file such as samples.jsonl, not {options.output}.")
    if options.best_of is not None and options.samples != 1:
        raise ValueError("--best-of says how often examples are played: leave --samples out.")
    if options.best_of is not None and options.best_of < 1:
        raise ValueError(f"--best-of must be at least 1, but it is {options.best_of}.")
    if options.best_of is not None and options.deterministic:
        raise ValueError("--best-of samples, and --deterministic does not: leave one of them out.")


def _given(options: Evaluate) -> dict[str, Any]:
    """Return the options of data and sampling that are not left at their defaults."""
    names = [field.name for field in fields(DataOptions)] + ["temperature", "top_k", "top_p"]
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, ())}
