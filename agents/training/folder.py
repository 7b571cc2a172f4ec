"""What a run's folder holds, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.files import read_json

# What the run was told, and what its environment settled by itself.
CONFIG = "config.json"
# The trained agent, as SB3 saves it, and its model, as transformers does.
AGENT, MODEL = "agent.zip", "model"
# The agent in the middle of training; it is gone when the run is finished.
CHECKPOINT = "checkpoint.zip"
# The model that did best on the held-out examples so far, if they are played while training.
BEST = "best_model"
# Transcripts of held-out examples, and of a few of them at each evaluation while training.
BEFORE, AFTER, SAMPLES = "samples_before.jsonl", "samples_after.jsonl", "samples.jsonl"
# The log, by iteration.
PROGRESS = "progress.csv"
# A few episodes of each iteration, token by token.
TRACES = "traces.jsonl"
# TensorBoard's logs, one for each time that the run was started.
EVENTS = "events.out.tfevents.*"
# What came out.
SUMMARY = "summary.json"


def check_free(folder: Path) -> bool:
    """Return True.

    Raises:
        ValueError: If the folder is a file or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"The run folder {folder} is a file or not empty: choose another, or go on with a run "
            "by --resume (in Python: Run.open)."
        )
    return True


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's; a model's has a config.json, too."""
    return (folder / CONFIG).is_file() and "env" in read_json(folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.json holds.

    Raises:
        ValueError: If it is no run's folder.
    """
    if not is_run(folder):
        raise ValueError(
            f"{folder} is no run folder: expected one that `textenvs train` or `Run.train` wrote, "
            f"with a {CONFIG}."
        )
    config: dict[str, Any] = read_json(folder / CONFIG)
    return config


def is_finished(folder: Path) -> bool:
    """Return whether the run has come to its regular end."""
    summary = folder / SUMMARY
    return summary.is_file() and not read_json(summary)["interrupted"]
