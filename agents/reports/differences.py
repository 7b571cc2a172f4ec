"""Two texts side by side: which words differ."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from rich.text import Text


def marked(before: str, after: str, style: str | None) -> tuple[Text, Text]:
    """Return both texts with the words that the other one lacks marked.

    Args:
        before: One text.
        after: The other one.
        style: How to mark. None: by brackets, in `after` alone, where there are no colours.
    """
    texts = _words(before), _words(after)
    sides = Text(), Text()
    matcher = SequenceMatcher(None, *texts, autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        spans = texts[0][start:stop], texts[1][other_start:other_stop]
        for i, (side, words) in enumerate(zip(sides, spans, strict=True)):
            span = "".join(words)
            if kind == "equal" or not span.strip():
                side.append(span)
            elif style is not None:
                side.append(span, style)
            else:
                core = span.rstrip()
                side.append(f"[{core}]{span[len(core) :]}" if i else span)
    return sides


def _words(text: str) -> list[str]:
    """Return words with the white space behind them, all of the text."""
    return re.findall(r"\S+\s*|^\s+", text)
