"""The protocol of constraints: the example of its docstring is one, and does what it says."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import numpy as np

from textenvs.constraints import TokenConstraint
from textenvs.text.codec import TokenIds


class NoRepetition:
    """The docstring's example, for the type checker."""

    def __init__(self, vocabulary_size: int) -> None:
        self.tokens = frozenset(range(vocabulary_size))

    def start(self, prompt: TokenIds) -> frozenset[int]:
        return frozenset()

    def advance(self, state: frozenset[int], token: int) -> frozenset[int]:
        return state | {token}

    def allowed(self, state: frozenset[int]) -> list[int] | None:
        return sorted(self.tokens - state) if state else None


def follow(constraint: TokenConstraint[Any], tokens: list[int]) -> list[Any]:
    """What is allowed before each of the tokens and after the last one."""
    state = constraint.start(np.array([7, 8]))
    allowed = [constraint.allowed(state)]
    for token in tokens:
        state = constraint.advance(state, token)
        allowed.append(constraint.allowed(state))
    return allowed


def documented() -> Any:
    """The class that is written out in the docstring."""
    text = inspect.getdoc(TokenConstraint) or ""
    code = text[text.index("    class NoRepetition") :]
    names: dict[str, Any] = {"TokenIds": TokenIds}
    exec(textwrap.dedent(code), names)
    return names["NoRepetition"]


def test_the_documented_example_is_a_constraint() -> None:
    for kind in (NoRepetition, documented()):
        assert follow(kind(4), [2, 0]) == [None, [0, 1, 3], [1, 3]]


def test_states_are_values() -> None:
    constraint = NoRepetition(3)
    start = constraint.start(np.array([1]))
    first, second = constraint.advance(start, 0), constraint.advance(start, 1)
    assert constraint.allowed(start) is None
    assert (constraint.allowed(first), constraint.allowed(second)) == ([1, 2], [0, 2])
