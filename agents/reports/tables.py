"""Tables of runs, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from agents.reports.differences import marked
from agents.training.evaluation import reward_text

# Control characters, which a terminal would obey, as Unicode's pictures of them.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}

Records = Sequence[Mapping[str, Any]]


def transcripts_table(records: Records, count: int) -> Table:
    """Return some of the transcripts, from their records, evenly spread."""
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=1)
    table.add_column("response", ratio=1)
    table.add_column("reward", justify="right", no_wrap=True)
    for record in _some(records, count):
        prompt, response = _texts(record)
        table.add_row(Text(prompt), Text(response), f"{record['reward']:.2f}")
    return table


def comparison_table(before: Records, after: Records, count: int, colour: bool) -> Table:
    """Return transcripts of the same examples side by side, with the words that differ marked.

    Args:
        before: Records of the one evaluation.
        after: Those of the other.
        count: How many to show, evenly spread.
        colour: Whether to mark by colour, and not by brackets.
    """
    table = Table(show_lines=True)
    table.add_column("prompt", ratio=3)
    for title in ("before", "after"):
        table.add_column(title, ratio=4)
        table.add_column("reward", justify="right", no_wrap=True)
    for old, new in _some(list(zip(before, after, strict=True)), count):
        texts = marked(_texts(old)[1], _texts(new)[1], "bold green" if colour else None)
        rewards = (f"{record['reward']:.2f}" for record in (old, new))
        cells = (cell for pair in zip(texts, rewards, strict=True) for cell in pair)
        table.add_row(Text(_texts(old)[0]), *cells)
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
    for name in both[1].get("observed", {}):
        values = (each.get("observed", {}).get(name) for each in both)
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    for label, key in (
        ("tokens per episode", "response_tokens"),
        ("ended by EOS", "stopped_by_eos"),
        ("distinct responses", "distinct_responses"),
    ):
        table.add_row(label, *(f"{each[key]:.2f}" for each in both))
    return table


def evaluation_table(env_id: str, summary: Mapping[str, Any]) -> Table:
    """Return an evaluation's metrics, a row each; None is left out."""
    table = Table("", env_id)
    for name, value in summary.items():
        inner = value if isinstance(value, Mapping) else {name: value}
        for label, number in inner.items():
            label = label if inner is not value else f"{name}: {label}"
            if number is not None:
                text = f"{number:.4f}" if isinstance(number, float) else str(number)
                table.add_row(label, text)
    return table


def _some(items: Sequence[Any], count: int) -> Sequence[Any]:
    """Return some of the items, evenly spread, the first of them always."""
    return items[:: max(1, len(items) // max(1, count))][:count]


def _texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt, and what followed: the response, or the rest of the conversation."""
    first, *rest = record["turns"]
    lines = [f"{turn['role']}: {turn['text']}" for turn in rest]
    response = rest[0]["text"] if len(rest) == 1 else "\n".join(lines)
    return first["text"].translate(PICTURES), response.translate(PICTURES)
