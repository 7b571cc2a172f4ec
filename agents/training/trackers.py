"""Experiment trackers that the log of a run can go to: Weights & Biases, trackio."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter

# Their packages, which are imported where they are asked for.
TRACKERS = ("wandb", "trackio")


def load_trackers(report_to: Sequence[str]) -> list[Any]:
    """Return the modules of the trackers among what a run reports to.

    Raises:
        ImportError: If one is not installed.
    """
    return [_load(name) for name in report_to if name in TRACKERS]


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"report_to={name} needs the package {name}, which cannot be imported ({error}): "
            f"pip install 'textenvs[{name}]', or leave it out of report_to."
        ) from error


class TrackerOutput(KVWriter):
    """A log that goes to a tracker; both have the same `init`, `log` and `finish`.

    The project is "textenvs", or what WANDB_PROJECT or TRACKIO_PROJECT says. A run that goes on
    goes on there, too.

    Args:
        module: The tracker's.
        folder: The run's.
        config: What the tracker shows as the run's options; `run_id` makes its name unique.
    """

    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any]) -> None:
        name = f"{folder.absolute().name}-{config['run_id']}"
        self._module = module
        tracker = module.__name__
        project = os.environ.get(f"{tracker.upper()}_PROJECT", "textenvs")
        extra = {}
        if tracker == "wandb":  # It knows runs by their ids, trackio by their names.
            extra = {"id": re.sub(r"[^\w-]", "-", name), "dir": str(folder)}
        module.init(project=project, name=name, config=dict(config), resume="allow", **extra)

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        """Log what is a number."""
        numbers = {
            name: float(value)
            for name, value in key_values.items()
            if isinstance(value, (int, float, np.number))
        }
        self._module.log(numbers, step=step)

    def close(self) -> None:
        """Tell the tracker that the run is over."""
        self._module.finish()
