"""What may be said next, as a pure function of what was said: labels, a grammar, a format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from textenvs.text.codec import TokenIds


class TokenConstraint(Protocol):
    """Which tokens may follow, for each state of a response.

    A state is any value that is never changed in place. The same prompt and the same tokens lead
    to a state that allows the same, whenever and wherever it is asked: in a rollout, in an update,
    for a reference model, in a prediction.
    """

    def start(self, prompt: TokenIds) -> Any:
        """Return the state in which a response to a prompt begins.

        Args:
            prompt: (k,) everything before the response.
        """
        ...

    def advance(self, state: Any, token: int) -> Any:
        """Return the state after one more token; `state` itself stays as it is."""
        ...

    def allowed(self, state: Any) -> Collection[int] | TokenIds | None:
        """Return the ids of the tokens that may come next. None: all of them."""
        ...
