"""Messages of a chat: who says what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# {"role": "system", "user" or "assistant", "content": text}, and other texts that a template reads.
Message = Mapping[str, str]


def check_messages(messages: Any) -> tuple[Message, ...]:
    """Return messages as a tuple, with their texts alone.

    Raises:
        ValueError: If one has no role and content, or a list of something, or the last one is
            no user's.
    """
    found = []
    for message in messages:
        items = message.items() if isinstance(message, Mapping) else ()
        said = {str(key): value for key, value in items if isinstance(value, str)}
        # Weights and flags are left out; what is in lists would be missed.
        nested = any(isinstance(v, Iterable) and not isinstance(v, str) for _, v in items)
        if nested or not {"role", "content"} <= set(said):
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
    several = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes))
    return several and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)
