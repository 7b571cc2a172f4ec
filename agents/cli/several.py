"""What commands share that train more than once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agents.training.spec import RunSpec


@dataclass(frozen=True)
class SeveralRuns(RunSpec):
    """Options of runs, and of how many there are."""

    workers: int = 1
    """How many at a time, each in a process of its own. 0: in this process."""
    threads: int = 1
    """Threads of each."""
    out: Path | None = None
    """The folder of all; the same command goes on with what is there."""

    def __post_init__(self) -> None:
        """Check nothing yet: the command does, or tyro would put a frame around the message."""
        if self.out is not None:
            object.__setattr__(self, "out", Path(self.out))

    def spell(self, name: str) -> str:
        """Return an option as it is given."""
        return f"--{name.replace('_', '-')}"

    def of_runs(self, **least: int) -> dict[str, Any]:
        """Return the options of a run that were given, once the numbers are checked.

        Args:
            **least: By name, what a number must be at least.

        Raises:
            ValueError: If one is less.
        """
        for name, bound in {"workers": 0, "threads": 1, **least}.items():
            value = getattr(self, name)
            if value < bound:
                raise ValueError(f"{self.spell(name)} must be at least {bound}, not {value}.")
        given = {field.name: getattr(self, field.name) for field in fields(RunSpec)}
        defaults = {field.name: field.default for field in fields(RunSpec)}
        return {name: value for name, value in given.items() if value != defaults[name]}
