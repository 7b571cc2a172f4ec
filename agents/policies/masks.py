"""Which tokens may be said: those that the action space allows."""

from __future__ import annotations

from collections.abc import Collection

import torch as th
from torch import nn


class TokenMasks(nn.Module):
    """Masks over the vocabulary; they move with the policy and are not saved.

    Args:
        vocab_size: How many tokens there are.
        allowed_tokens: The only ones to sample. None: all.

    Raises:
        ValueError: If `allowed_tokens` are no ids of the vocabulary, or none.
    """

    def __init__(self, vocab_size: int, allowed_tokens: Collection[int] | None) -> None:
        super().__init__()
        self.allowed: th.Tensor | None
        mask = None if allowed_tokens is None else _mask(vocab_size, allowed_tokens)
        self.register_buffer("allowed", mask, persistent=False)


def _mask(vocab_size: int, allowed: Collection[int]) -> th.Tensor:
    if not allowed or min(allowed) < 0 or max(allowed) >= vocab_size:
        raise ValueError(
            f"allowed_tokens must be ids in [0, {vocab_size}), at least one, "
            f"but they are {allowed}."
        )
    mask = th.zeros(vocab_size, dtype=th.bool)
    mask[list(allowed)] = True
    return mask
