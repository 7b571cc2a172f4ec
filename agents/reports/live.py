"""What a run shows while it trains: a line for each rollout, a line for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from agents.training.logs import HELD_OUT, STEP

# Columns of a line, where the log has them: name, column of the log, format.
REWARD = ("reward", "rollout/ep_rew_mean", ".3f")
SUCCESS = ("success", "rollout/success_rate", ".0%")
KL = ("KL", "kl/per_episode", ".2f")
SPEED = ("tokens/s", "time/fps", ",.0f")
# What is logged of rollouts and of evaluations under names of its own; the rest is observed.
OF_ROLLOUT = {
    *("rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate"),
    *("rollout/response_length", "rollout/eos_rate"),
}
OF_EVALUATION = {HELD_OUT, "eval/standard_error", "eval/success_rate", "eval/mean_ep_length"}
WIDTH = 9


@dataclass
class LiveLines:
    """Turns rows of a run's log into lines, with a header whenever there are other columns.

    Args:
        write: Shows a line.
        timesteps: How many the run has in all.
        show_success: Whether success is told; it says little about a reward not the task's.
    """

    write: Callable[[str], None]
    timesteps: int
    show_success: bool = True
    _header: str = field(default="", init=False)
    _best: float | None = field(default=None, init=False)

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show a row of the log."""
        if HELD_OUT in row:
            self._show_evaluation(row)
            return
        cells = self._cells(row)
        header = "".join(name.rjust(width(name)) for name in cells)
        if header != self._header:
            self._header = header
            self.write(header)
        self.write("".join(text.rjust(width(name)) for name, text in cells.items()))

    def _cells(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return the texts of a rollout's line by their columns."""
        observed = [(name, f"rollout/{name}", ".2f") for name in _observed(row, "rollout/")]
        columns = [REWARD, *([SUCCESS] if self.show_success else []), *observed, KL, SPEED]
        # Before the first update nobody knows how long one takes.
        left = (self.timesteps - row[STEP]) / max(row["time/fps"], 1) if self._header else None
        return {
            "tokens": f"{row[STEP]:,}",
            **{name: _format(row[key], spec) for name, key, spec in columns if key in row},
            "elapsed": duration(row["time/time_elapsed"]),
            "left": "" if left is None else duration(left),
        }

    def _show_evaluation(self, row: Mapping[str, Any]) -> None:
        reward = row[HELD_OUT]
        best = self._best is None or reward > self._best
        self._best = reward if self._best is None else max(reward, self._best)
        if not 0 < row[STEP] < self.timesteps:  # It is told by itself.
            return
        parts = [f"held-out reward {reward:.3f}"]
        if "eval/standard_error" in row:
            parts[0] += f" ± {row['eval/standard_error']:.3f}"
        if self.show_success and "eval/success_rate" in row:
            parts.append(f"success {row['eval/success_rate']:.0%}")
        parts += [f"{name} {row[f'eval/{name}']:.2f}" for name in _observed(row, "eval/")]
        parts.append("the best so far" if best else f"the best was {self._best:.3f}")
        self.write(f"{row[STEP]:>{WIDTH},}  {', '.join(parts)}")


def _format(value: float, spec: str) -> str:
    """Return a number as text, without a minus in front of 0."""
    text = format(value, spec)
    return text if text.strip("-0.%") else text.removeprefix("-")


def _observed(row: Mapping[str, Any], prefix: str) -> list[str]:
    """Return the names of what is observed and not paid for."""
    names = {name for name in row if name.startswith(prefix)} - OF_ROLLOUT - OF_EVALUATION
    return sorted(name.removeprefix(prefix) for name in names)


def width(name: str) -> int:
    """Return how wide a column is."""
    return max(WIDTH, len(name) + 2)


def duration(seconds: float) -> str:
    """Return 1:05 for 65 seconds, 1:01:05 for an hour more."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def metrics_table(row: Mapping[str, Any]) -> Table:
    """Return every metric of a row of the log."""
    table = Table("", f"{row[STEP]:,} tokens")
    for name, value in sorted(row.items()):
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
    return table
