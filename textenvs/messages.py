"""Messages of a chat: who says what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# {"role": "system", "user" or "assistant", "content": text}, and other texts that a template reads.
Message = Mapping[str, str]


def check_messages(messages: Any) -> tuple[Message, ...]:
    """Return messages as a tuple, without what is None.

    Raises:
        ValueError: If one has no role and content, or something that is no text, or the last one is
            no user's.
    """
    found = []
    for message in messages:
        said = {}
        if isinstance(message, Mapping):
            said = {str(key): value for key, value in message.items() if value is not None}
        texts = all(isinstance(value, str) for value in said.values())
        if not texts or not {"role", "content"} <= set(said):
            raise ValueError(
                "A message is a mapping with the texts 'role' and 'content', and others that the "
                f"chat template reads, but one is {message!r}."
            )
        found.append(said)
    if not found or found[-1]["role"] != "user":
        raise ValueError(
            "The last message of a prompt must be a user's, to be answered, but the roles are "
            f"{', '.join(message['role'] for message in found) or 'none'}."
        )
    return tuple(found)


def are_messages(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages, and not a text."""
    several = isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes, Mapping))
    return several and bool(rows := list(prompt)) and all(isinstance(m, Mapping) for m in rows)
