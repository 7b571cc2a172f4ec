"""Which tokens may be said next, as a function of what has been said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

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


class ChoiceConstraint:
    """Whole choices and nothing else: the next tokens are those of a prefix tree.

    States are what has been said, as a tuple. Behind what begins no choice, which a policy does not
    say by itself, everything is allowed.

    Args:
        choices: The token ids of each choice, without EOS.
        eos_token_id: What follows a whole choice. None: the choice fills the budget, and nothing
            follows.
    """

    def __init__(self, choices: Iterable[Sequence[int]], eos_token_id: int | None) -> None:
        nexts: dict[tuple[int, ...] | None, set[int]] = {}
        for choice in map(tuple, choices):
            for length, token in enumerate(choice):
                nexts.setdefault(choice[:length], set()).add(token)
            if eos_token_id is not None:
                nexts.setdefault(choice, set()).add(eos_token_id)
        self._nexts = {said: sorted(tokens) for said, tokens in nexts.items()}

    def start(self, prompt: TokenIds) -> tuple[int, ...] | None:
        """Return what has been said: nothing."""
        return ()

    def advance(self, state: tuple[int, ...] | None, token: int) -> tuple[int, ...] | None:
        """Return what has been said; None: it begins no choice."""
        said = None if state is None else (*state, token)
        return said if said in self._nexts else None

    def allowed(self, state: tuple[int, ...] | None) -> list[int] | None:
        """Return the tokens that go on with a choice, or end it."""
        return self._nexts.get(state)


class AllOf:
    """What each of several constraints allows."""

    def __init__(self, constraints: Iterable[TokenConstraint[Any]]) -> None:
        self._constraints = tuple(constraints)

    def start(self, prompt: TokenIds) -> tuple[Any, ...]:
        """Return their states."""
        return tuple(constraint.start(prompt) for constraint in self._constraints)

    def advance(self, state: tuple[Any, ...], token: int) -> tuple[Any, ...]:
        """Return their states after one more token."""
        both = zip(self._constraints, state, strict=True)
        return tuple(constraint.advance(own, token) for constraint, own in both)

    def allowed(self, state: tuple[Any, ...]) -> TokenIds | None:
        """Return what all of them allow."""
        both = zip(self._constraints, state, strict=True)
        sets = [constraint.allowed(own) for constraint, own in both]
        ids = [{int(token) for token in tokens} for tokens in sets if tokens is not None]
        return np.array(sorted(set.intersection(*ids)), dtype=np.int64) if ids else None
