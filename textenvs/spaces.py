"""The action space: one token of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium import spaces


class TokenSpace(spaces.Discrete):
    """A `Discrete` space over token ids that also says which of them a task can use.

    A policy reads here what it needs to know about the vocabulary. Every id below `n` is a legal
    action; `sample` draws from the allowed ones, so that a random agent stays within the task.

    Args:
        n: The size of the vocabulary.
        eos_token_id: The token that ends a turn.
        pad_token_id: The token that fills observations; it may be the same as EOS.
        allowed_tokens: The ids that make sense as responses. None: all of them.
        seed: The seed for `sample`.
        choices: The only responses that make sense, as token ids without EOS. None: any. A policy
            says whole choices alone; `sample`, which does not know what was said, draws from
            their tokens.
        stop_token_ids: All tokens that end a turn. EOS, the first of them, need not be given.
    """

    def __init__(
        self,
        n: int,
        eos_token_id: int,
        pad_token_id: int,
        allowed_tokens: Iterable[int] | None = None,
        seed: int | np.random.Generator | None = None,
        choices: Iterable[Iterable[int]] | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        super().__init__(n, seed=seed)
        self.eos_token_id = int(eos_token_id)
        self.pad_token_id = int(pad_token_id)
        self.allowed_tokens = (
            None if allowed_tokens is None else tuple(sorted({int(t) for t in allowed_tokens}))
        )
        self.choices = (
            None if choices is None else tuple(tuple(map(int, choice)) for choice in choices)
        )
        self.stop_token_ids = tuple(dict.fromkeys((self.eos_token_id, *map(int, stop_token_ids))))

    def sample(self, mask: Any = None, probability: Any = None) -> np.int64:
        """Draw an allowed token; with `mask` or `probability`, as `Discrete.sample` does."""
        if self.allowed_tokens is None or mask is not None or probability is not None:
            drawn: np.int64 = super().sample(mask, probability)
            return drawn
        token: np.int64 = np.int64(self.np_random.choice(self.allowed_tokens))
        return token

    @property
    def _tokens(self) -> tuple[Any, ...]:
        """All that is said of single tokens."""
        of_eos = self.eos_token_id, self.pad_token_id, self.stop_token_ids
        return (*of_eos, self.allowed_tokens, self.choices)

    def __repr__(self) -> str:
        """Name the space and what confines it."""
        allowed = "all" if self.allowed_tokens is None else len(self.allowed_tokens)
        more = "" if self.choices is None else f", choices={len(self.choices)}"
        if len(self.stop_token_ids) > 1:
            more += f", stop_token_ids={self.stop_token_ids}"
        return f"TokenSpace({self.n}, eos_token_id={self.eos_token_id}, allowed={allowed}{more})"

    def __eq__(self, other: object) -> bool:
        """Compare as `Discrete` does, and the special tokens."""
        if not isinstance(other, TokenSpace):
            return super().__eq__(other)
        return super().__eq__(other) and self._tokens == other._tokens

    __hash__ = None  # type: ignore[assignment]
