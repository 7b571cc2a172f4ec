"""What a person sees: the conversation, the response as it grows, the reward terms."""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

from gymnasium.utils import colorize

if TYPE_CHECKING:
    from textenvs.envs.engine import TextEngine

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def render_ansi(engine: TextEngine, slot: int, info: dict[str, Any]) -> str:
    """Return a slot's conversation with ANSI colours: user blue, agent green, rewards yellow."""
    turns = engine.turns[slot]
    lines = [
        colorize(f"{turn.role:>6}: ", "gray")
        + colorize(turn.text, "blue" if turn.role == "user" else "green")
        for turn in turns
    ]
    length = int(engine.observations["response_length"][slot, 0])
    if not (turns and turns[-1].role == "agent"):
        partial = engine.codec.decode_response(engine.observations["response"][slot, :length])
        lines.append(colorize(f"{'agent':>6}: ", "gray") + colorize(partial, "green") + "▏")
    if info:
        terms = ", ".join(f"{name} {value:+.3f}" for name, value in info["reward_terms"].items())
        lines.append(colorize(f"reward: {terms}", "yellow"))
    return "\n".join(lines)


class Screen:
    """Shows one environment on a terminal: redrawn in place; elsewhere, a frame a turn."""

    def __init__(self) -> None:
        self._rows = 0

    def show(self, text: str, *, first: bool, last: bool) -> None:
        """Draw a frame.

        Args:
            text: What to draw.
            first: Whether a new episode starts here; the frame before it is left standing.
            last: Whether a turn ended; without a terminal only such frames are written.
        """
        terminal = sys.stdout.isatty()
        if terminal and self._rows and not first:
            sys.stdout.write(f"\x1b[{self._rows}F\x1b[J")
        if terminal or last:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        columns = shutil.get_terminal_size().columns
        plain = (_COLOUR.sub("", line) for line in text.split("\n"))
        self._rows = sum(max(1, -(-len(line) // columns)) for line in plain)
