"""Special tokens: where a tokenizer puts them, and text that only looks like one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands in text that is a special token to the letter but is meant as text: noncharacters of
# Unicode, which no text contains. What is on the two sides is encoded by itself.
BREAK = "\ufdd0\ufdd1"
# Texts of one token or a few in nearly every vocabulary.
PROBES = ("a", "0", "A", ".", "e")


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return how special tokens are written, longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {str(token) for token in added if getattr(token, "special", False)}
    return tuple(sorted(texts | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that decoding can leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    ids = {int(i) for i, token in added if getattr(token, "special", False)}
    return frozenset(ids | set(tokenizer.all_special_ids))


class Breaker:
    """Puts a `BREAK` into certain texts wherever they occur.

    Args:
        texts: What to break, longest first. A text of a single character cannot be broken, and
            stays as it is.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._pattern = re.compile(
            "|".join(re.escape(text) for text in texts if len(text) > 1) or r"(?!)"
        )

    def finds(self, text: str) -> bool:
        """Return whether a text has one of them."""
        return self._pattern.search(text) is not None

    def __call__(self, text: str) -> str:
        """Return a text with what it has of them broken behind the first character."""
        return self._pattern.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with its texts changed, also those in lists, tuples and mappings."""
    if isinstance(value, str):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(in_texts(item, change) for item in value)
    if type(value) is dict:
        return {key: in_texts(item, change) for key, item in value.items()}
    return value


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts in front of an input and behind it."""
    for probe in PROBES:
        plain = tokenizer.encode(probe, add_special_tokens=False)
        whole = tokenizer.encode(probe)
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
    return [], []
