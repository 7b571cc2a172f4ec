"""What to do with a run that is over."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from agents.training.folder import BEST, MODEL
from agents.training.options import DataOptions
from agents.training.run import Run


def next_steps(run: Run) -> list[tuple[str, str]]:
    """Return commands with the run's folder, and in front of each what it is for."""
    summary, folder = run.summary(), shlex.quote(str(run.folder))
    steps = [
        ("try it on held-out prompts:", f"textenvs evaluate {folder} --samples 4"),
        ("look at its curves:", f"tensorboard --logdir {folder}"),
    ]
    if summary["interrupted"]:
        return [("go on where it stopped:", f"textenvs train --resume {folder}"), *steps]
    return [*steps, ("train its model further:", _train_further(run, summary))]


def _train_further(run: Run, summary: dict[str, Any]) -> str:
    """Return the command that trains a run's best model on what the run was trained on."""
    best = summary.get("best", summary)["timesteps"]
    model = run.folder / (BEST if best < summary["timesteps"] else MODEL)
    words = ["textenvs", "train", run.spec.env, "--model", str(model), "--warm-start", "0"]
    for option in fields(DataOptions):
        value = getattr(run.spec, option.name)
        if option.name != "tokenizer" and value != option.default:  # The model has its own.
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
