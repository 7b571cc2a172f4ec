"""Sequences in one row, without padding: only attention sees them side by side.

All other layers look at one token at a time, and it makes no difference to them which sequence a
token is of. So they run on the tokens alone, and attention, registered with `transformers` under a
name of its own, pads the sequences and packs what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch as th
from transformers import AttentionInterface

from agents.compat import causal_attention

ATTENTION = "textenvs_packed"

# Sequences are set side by side with others at most so many times as long.
LONGER = 1.5


@dataclass(frozen=True)
class Group:
    """Where the tokens of one row belong in a batch of sequences.

    Args:
        real: Boolean (sequences, width), true where there is a token.
        places: (tokens,) the same as indices into sequences times width.
    """

    real: th.Tensor
    places: th.Tensor

    @staticmethod
    def of(real: th.Tensor) -> Group:
        """Return the group of sequences whose tokens are where `real` is true."""
        return Group(real, real.flatten().nonzero().squeeze(1))

    def pad(self, row: th.Tensor) -> th.Tensor:
        """Return (sequences, heads, width, size) of (1, heads, tokens, size)."""
        _, heads, tokens, size = row.shape
        flat = row[0].transpose(0, 1).reshape(tokens, heads * size)
        spread = cast("th.Tensor", _Spread.apply(flat, self.places, self.real.numel()))
        return spread.view(*self.real.shape, heads, size).transpose(1, 2)

    def pack(self, batch: th.Tensor) -> th.Tensor:
        """Return (1, tokens, heads, size) of (sequences, width, heads, size)."""
        _, _, heads, size = batch.shape
        flat = batch.reshape(self.real.numel(), heads * size)
        return cast("th.Tensor", _Gather.apply(flat, self.places)).view(1, -1, heads, size)


class Packing:
    """A batch of sequences as one row: a sequence's tokens, then the next one's.

    Neighbours of like length form a group, which attention pads. It pads little where the
    sequences come in the order of their lengths.

    Args:
        wanted: Boolean (sequences, width), somewhere true in each sequence, which ends where it is
            true last.
    """

    def __init__(self, wanted: th.Tensor) -> None:
        real = ends(wanted)
        self._whole = Group.of(real)
        lengths = real.sum(dim=1).tolist()
        self.groups: list[Group] = []
        self.sizes: list[int] = []
        start, shortest, longest = 0, lengths[0], lengths[0]
        for stop, length in enumerate([*lengths[1:], None], start=1):
            if length is None or max(longest, length) > LONGER * min(shortest, length):
                self.groups.append(Group.of(real[start:stop, :longest]))
                self.sizes.append(sum(lengths[start:stop]))
                start, shortest, longest = stop, length or 0, length or 0
            else:
                shortest, longest = min(shortest, length), max(longest, length)

    @property
    def is_full(self) -> bool:
        """Whether there is no padding in the batch."""
        return len(self._whole.places) == self._whole.real.numel()

    @property
    def positions(self) -> th.Tensor:
        """Each token's position in its sequence, (1, tokens)."""
        return (self._whole.places % self._whole.real.shape[1])[None]

    def row(self, batch: th.Tensor) -> th.Tensor:
        """Return what belongs to the tokens, (1, tokens), of a batch (sequences, width)."""
        return batch.flatten()[self._whole.places][None]


def ends(wanted: th.Tensor) -> th.Tensor:
    """Return where sequences (sequences, width) are, each up to where `wanted` is true last."""
    return wanted.flip(1).cummax(dim=1).values.flip(1)


class _Spread(th.autograd.Function):
    """Copies rows to their places among zeros.

    Each row goes to one place, so nothing has to be added up in either direction, as autograd
    must for indices that it knows nothing of.
    """

    @staticmethod
    def forward(ctx: Any, rows: th.Tensor, places: th.Tensor, count: int) -> th.Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Gather(th.autograd.Function):
    """Takes rows from their places, the reverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, rows: th.Tensor, places: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        (gradient,) = gradients
        zeros = gradient.new_zeros(ctx.count, gradient.shape[1])
        return zeros.index_copy_(0, places, gradient), None


def packed_attention(
    module: th.nn.Module,
    query: th.Tensor,
    key: th.Tensor,
    value: th.Tensor,
    attention_mask: th.Tensor | None,
    packing: Packing,
    **kwargs: Any,
) -> tuple[th.Tensor, None]:
    """Attend within sequences to what comes before; see `transformers.AttentionInterface`."""
    outputs = []
    rows = (tensor.split(packing.sizes, dim=2) for tensor in (query, key, value))
    for group, q, k, v in zip(packing.groups, *rows, strict=True):
        batch = group.pad(q), group.pad(k), group.pad(v)
        outputs.append(group.pack(causal_attention(module, *batch, **kwargs)))
    return th.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
