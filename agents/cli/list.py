"""`textenvs list`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

import textenvs
from textenvs.registration import load_task


@dataclass(frozen=True)
class List:
    """List the environments."""


def list_environments(console: Console) -> None:
    """Show the registered environments."""
    table = Table("id", "task", "best return", "turns", "response budget")
    table.columns[0].no_wrap = True
    for env_id in textenvs.task_ids():
        task = load_task(env_id)
        summary = (type(task).__doc__ or "").strip().split("\n")[0]
        best = "" if task.best_return is None else f"{task.best_return:.2f}"
        table.add_row(env_id, summary, best, str(task.max_turns), str(task.max_new_tokens))
    console.print(table)
