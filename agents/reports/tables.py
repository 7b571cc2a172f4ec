"""Tables of runs, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from agents.training.evaluation import reward_text


def transcripts_table(*evaluations: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Return transcripts side by side, from their records: the same examples before and after."""
    table = Table(show_lines=True)
    titles = ("before", "after") if len(evaluations) == 2 else ("transcript",)
    for title in titles:
        table.add_column(title, ratio=1)
        table.add_column("reward", justify="right")
    step = max(1, len(evaluations[0]) // max(1, count))
    for i in range(0, len(evaluations[0]), step)[:count]:
        cells = []
        for records in evaluations:
            text = "\n".join(f"{turn['role']}: {turn['text']}" for turn in records[i]["turns"])
            cells += [escape(text), f"{records[i]['reward']:.2f}"]
        table.add_row(*cells)
    return table


def summary_table(summary: Mapping[str, Any], own_reward: bool) -> Table:
    """Return a run's summary: held-out examples before and after.

    Args:
        summary: See `Run.summary`.
        own_reward: Whether the reward was the task's own; see `reward_text`.
    """
    table = Table(title=f"{summary['env_id']}: {summary['timesteps']:,} tokens")
    for name in ("", "before", "after"):
        table.add_column(name)
    both = summary["before"], summary["after"]
    table.add_row("held-out reward", *(reward_text(each, own_reward) for each in both))
    for label, key in (
        ("tokens per episode", "response_tokens"),
        ("ended by EOS", "stopped_by_eos"),
        ("distinct responses", "distinct_responses"),
    ):
        table.add_row(label, *(f"{each[key]:.2f}" for each in both))
    return table


def evaluation_table(env_id: str, summary: Mapping[str, Any]) -> Table:
    """Return an evaluation's metrics, a row each."""
    table = Table("", env_id)
    for name, value in summary.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    return table
