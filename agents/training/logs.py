"""The log of a run. Where one goes on, what came after the checkpoint is dropped, the rest kept."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from torch.utils.tensorboard import SummaryWriter

from agents.files import write_text
from agents.training.folder import PROGRESS

STEP, ITERATION, SECONDS = "time/total_timesteps", "time/iterations", "time/time_elapsed"
# The column that rows of evaluations have.
HELD_OUT = "eval/mean_reward"

# Called with each row of the log.
OnLog = Callable[[dict[str, Any]], None]


class CallingOutput(KVWriter):
    """A log that calls a function with each row; texts of samples are left out.

    Args:
        on_log: The function.
    """

    def __init__(self, on_log: OnLog) -> None:
        self._on_log = on_log

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        """Call it."""
        self._on_log(filter_excluded_keys(key_values, key_excluded, "stdout"))

    def close(self) -> None:
        """Nothing is open."""


class ContinuedCSV(CSVOutputFormat):
    """SB3's CSV log, appended to a file that is there.

    Args:
        filename: The file; its first line names the columns.
    """

    def __init__(self, filename: str) -> None:
        self.file = open(filename, "r+", encoding="utf-8", newline="")
        self.keys = next(csv.reader(self.file), [])
        self.file.seek(0, io.SEEK_END)
        self.separator = ","
        self.quotechar = '"'


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """SB3's TensorBoard log, in place of what earlier files of the folder hold from a step on.

    Args:
        folder: The log's.
        step: The first step that is logged anew.
    """

    def __init__(self, folder: str, step: int) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=step)
        self._is_closed = False


def open_log(
    model: BaseAlgorithm, folder: Path, tensorboard: bool = True, outputs: Sequence[KVWriter] = ()
) -> None:
    """Let an agent begin its run's log.

    Args:
        model: The agent.
        folder: Where the log is.
        tensorboard: Whether TensorBoard's is written.
        outputs: Where else rows go.
    """
    own: list[KVWriter] = [CSVOutputFormat(str(folder / PROGRESS))]
    if tensorboard:
        own.append(TensorBoardOutputFormat(str(folder)))
    model.set_logger(Logger(str(folder), [*own, *outputs]))


def continue_log(
    model: BaseAlgorithm, folder: Path, tensorboard: bool = True, outputs: Sequence[KVWriter] = ()
) -> float:
    """Let a loaded agent go on with its run's log; see `open_log`.

    Args:
        model: The agent; rows beyond its timesteps are dropped.
        folder: Where the log is.
        tensorboard: Whether TensorBoard's is written.
        outputs: Where else rows go.

    Returns:
        For how many seconds the run had been training, as far as the log tells.
    """
    rows = _rows(folder / PROGRESS, model.num_timesteps)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    if rows:
        writer.writeheader()
    writer.writerows(rows)
    write_text(folder / PROGRESS, text.getvalue())
    own: list[KVWriter] = [ContinuedCSV(str(folder / PROGRESS))]
    if tensorboard:
        own.append(ContinuedTensorBoard(str(folder), model.num_timesteps + 1))
    model.set_logger(Logger(str(folder), [*own, *outputs]))
    return _seconds(rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log, numbers as numbers.

    Args:
        path: SB3's progress.csv. A row that a kill cut off is left out; without a file there are
            no rows.

    Returns:
        The columns of each row by name; None where one has nothing to say, text where it is text.
    """
    return [{name: _number(cell) for name, cell in row.items()} for row in _whole_rows(path)]


def _whole_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield a log's rows as text; what a kill cut off, which may look like a row, is none."""
    if path.is_file():
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
        yield from csv.DictReader(io.StringIO(whole, newline=""))


def _number(cell: str) -> int | float | str | None:
    """Return what a cell of a CSV file holds."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(cell)
    return cell or None


def _rows(path: Path, last: int) -> list[dict[str, Any]]:
    """Return the whole rows up to a step."""
    rows: list[dict[str, Any]] = []
    for row in _whole_rows(path):
        with suppress(
            KeyError, ValueError, TypeError
        ):  # neither an iteration's row nor an evaluation's
            evaluation = bool(row.get(HELD_OUT))  # between iterations
            if int(row[STEP]) <= last and (evaluation or _is_iteration(row)):
                rows.append(row)
    return rows


def _is_iteration(row: dict[str, Any]) -> bool:
    return bool(int(row[ITERATION])) and float(row[SECONDS]) >= 0


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Add up what each part of the run took; iterations count from 1 in each of them."""
    rows, total = [row for row in rows if row[ITERATION]], 0.0
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if following is None or int(following[ITERATION]) <= int(row[ITERATION]):
            total += float(row[SECONDS])
    return total
