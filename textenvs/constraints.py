"""Which tokens may be said next, as a function of what has been said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from textenvs.text.codec import TokenIds

State = TypeVar("State")


class TokenConstraint(Protocol[State]):
    """Confines a response token by token, for example to labels, a grammar, or a format.

    It is a pure function of the prompt and of the tokens that have been said: states are values
    that are never changed, and the same tokens lead to the same state. So rollout, update,
    reference and prediction can ask it independently and get the same answer. Nobody but the
    constraint looks into a state.

    A constraint that lets no token be said twice:

        class NoRepetition:
            def __init__(self, vocabulary_size: int) -> None:
                self.tokens = frozenset(range(vocabulary_size))

            def start(self, prompt: TokenIds) -> frozenset[int]:
                return frozenset()

            def advance(self, state: frozenset[int], token: int) -> frozenset[int]:
                return state | {token}

            def allowed(self, state: frozenset[int]) -> list[int] | None:
                return sorted(self.tokens - state) if state else None
    """

    def start(self, prompt: TokenIds) -> State:
        """Return the state before the first token of a response.

        Args:
            prompt: The token ids that the model has read, (length,) without padding: in a dialogue
                the whole conversation so far.
        """
        ...

    def advance(self, state: State, token: int) -> State:
        """Return the state after one more token; `state` stays as it is."""
        ...

    def allowed(self, state: State) -> Sequence[int] | TokenIds | None:
        """Return the ids of the tokens that may come next, at least one; None: every token."""
        ...
