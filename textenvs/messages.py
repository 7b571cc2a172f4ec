"""Messages of a chat: who says what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# {"role": "system", "user" or "assistant", "content": text}
Message = Mapping[str, str]


def check_messages(messages: Any) -> tuple[Message, ...]:
    """Return messages as a tuple.

    Raises:
        ValueError: If one has no role and content, or the last one is no user's.
    """
    found = tuple(messages)
    for message in found:
        known = isinstance(message, Mapping) and {"role", "content"} <= set(message)
        if not known or not all(isinstance(message[key], str) for key in ("role", "content")):
            raise ValueError(
                "A message is a mapping with the texts 'role' and 'content', but one is "
                f"{message!r}."
            )
    if not found or found[-1]["role"] != "user":
        raise ValueError(
            "The last message of a prompt must be a user's, to be answered, but the roles are "
            f"{', '.join(message['role'] for message in found) or 'none'}."
        )
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in found)


def are_messages(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages, and not a text."""
    several = isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes, Mapping))
    return several and bool(rows := list(prompt)) and all(isinstance(m, Mapping) for m in rows)
