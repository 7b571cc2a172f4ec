"""Sequences in one row, without padding: only attention sees them side by side.

All other layers look at one token at a time, and it makes no difference to them which sequence a
token is of. So they run on the tokens alone, and attention, registered with `transformers` under a
name of its own, pads the sequences and packs what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from transformers import AttentionInterface

from agents.compat import causal_attention

ATTENTION = "textenvs_packed"

# Sequences are set side by side with others at most so many times as long.
LONGER = 1.5
# Prefixes are shared where that saves one in so many tokens at least.
SHARED_SHARE = 10


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
    def of(lengths: Sequence[int], device: th.device) -> Group:
        """Return the group of sequences of these lengths, each from the first column on."""
        real = np.arange(max(lengths)) < np.array(lengths)[:, None]
        places = np.flatnonzero(real)
        return Group(th.as_tensor(real, device=device), th.as_tensor(places, device=device))

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


@dataclass(frozen=True)
class Branches:
    """Sequences that go on from one prefix: what attention makes of them.

    Args:
        own: Where their own tokens belong, behind the prefix.
        start: The first of the prefix's tokens in the row.
        stop: One past the last.
        seen: Boolean (1, 1, width, prefix + width): which keys a query sees.
    """

    own: Group
    start: int
    stop: int
    seen: th.Tensor

    @staticmethod
    def of(lengths: Sequence[int], start: int, stop: int, device: th.device) -> Branches:
        """Return those of sequences with so many tokens of their own."""
        width = max(lengths)
        seen = np.arange(stop - start + width) <= stop - start + np.arange(width)[:, None]
        own = Group.of(lengths, device)
        return Branches(own, start, stop, th.as_tensor(seen[None, None], device=device))

    def keys(self, row: th.Tensor, own: th.Tensor) -> th.Tensor:
        """Return (branches, heads, prefix + width, size) of a row and the branches' own part."""
        padded = self.own.pad(own)
        prefix = row[:, :, self.start : self.stop].expand(len(padded), -1, -1, -1)
        return th.cat([prefix, padded], dim=2)


class Packing:
    """A batch of sequences as one row: a sequence's tokens, then the next one's.

    Sequences come in the order of their lengths, and those of like length form a group, which
    attention pads. A prefix that sequences share is there once, in front of what is their own.

    Args:
        wanted: Boolean (sequences, width), somewhere true in each sequence, which ends where it is
            true last.
        tokens: (sequences, width), for prefixes that are the same up to where `wanted` is true
            first to be there once. None: none is shared.

    Attributes:
        groups: Of sequences and prefixes that see nothing but themselves, as the row has them.
        branches: Of sequences that go on from a prefix, behind those.
        sizes: The tokens of each group, and of each prefix's branches.
        actions: Where in the row the tokens are that are wanted, sequence by sequence.
    """

    def __init__(self, wanted: th.Tensor, tokens: th.Tensor | None = None) -> None:
        device, asked = wanted.device, wanted.cpu().numpy()
        rows, self._width = asked.shape
        lengths = self._width - asked[:, ::-1].argmax(axis=1)
        first = asked.argmax(axis=1) + 1
        shared = [] if tokens is None else shared_prefixes(tokens.cpu().numpy(), first, lengths)
        self._full = int(lengths.sum()) == asked.size
        # Of each sequence, how much of it stands with its prefix's first sequence.
        until = lengths.copy()
        branching: set[int] = set()
        for members in shared:
            until[members] = first[members[0]]
            branching.update(members[1:])
        roots = sorted((row for row in range(rows) if row not in branching), key=until.__getitem__)
        # Where each sequence's tokens are in the row.
        index = np.zeros(asked.shape, dtype=np.int64)
        places: list[npt.NDArray[np.int64]] = []
        at = 0

        def place(row: int, start: int, stop: int) -> None:
            nonlocal at
            index[row, start:stop] = np.arange(at, at + stop - start)
            places.append(row * self._width + np.arange(start, stop))
            at += stop - start

        for root in roots:
            place(root, 0, int(until[root]))
        self.groups = _groups([int(until[root]) for root in roots], device)
        self.sizes = [len(group.places) for group in self.groups]
        self.branches: list[Branches] = []
        for members in shared:
            root, length = members[0], int(first[members[0]])
            index[members, :length] = index[root, :length]
            for row in members:
                place(row, length, int(lengths[row]))
            own, start = [int(lengths[row]) - length for row in members], int(index[root, 0])
            self.branches.append(Branches.of(own, start, start + length, device))
            self.sizes.append(sum(own))
        self._places = th.as_tensor(np.concatenate(places), device=device)
        self.actions = th.as_tensor(index[asked], device=device)
        self._windows: dict[tuple[int, int, int], th.Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether there is neither padding nor a shared prefix in the batch."""
        return self._full and not self.branches

    @property
    def positions(self) -> th.Tensor:
        """Each token's position in its sequence, (1, tokens)."""
        return cast("th.Tensor", self._places % self._width)[None]

    def window(self, width: int, keys: int, size: int) -> th.Tensor:
        """Return which of so many keys are seen through a window by the last `width` of them.

        Returns:
            Boolean (1, 1, width, keys)
        """
        shape = width, keys, size
        if shape not in self._windows:
            at = np.arange(keys - width, keys)[:, None]
            seen = (np.arange(keys) <= at) & (np.arange(keys) > at - size)
            self._windows[shape] = th.as_tensor(seen[None, None], device=self._places.device)
        return self._windows[shape]

    def row(self, batch: th.Tensor) -> th.Tensor:
        """Return what belongs to the tokens, (1, tokens), of a batch (sequences, width)."""
        packed: th.Tensor = batch.flatten().index_select(0, self._places)
        return packed[None]


def _groups(lengths: list[int], device: th.device) -> list[Group]:
    """Return sequences of like length, which come in the order of their lengths, as groups."""
    groups, start = [], 0
    for stop, length in enumerate([*lengths[1:], None], start=1):
        if length is None or length > LONGER * lengths[start]:
            groups.append(Group.of(lengths[start:stop], device))
            start = stop
    return groups


def shared_prefixes(
    tokens: npt.NDArray[Any], first: npt.NDArray[Any], lengths: npt.NDArray[Any]
) -> list[list[int]]:
    """Return which sequences have a prefix in common, if that saves enough; at least two each.

    Args:
        tokens: (sequences, width)
        first: (sequences,) the length of each prefix.
        lengths: (sequences,) of the whole sequences.
    """
    found: dict[bytes, list[int]] = {}
    for row, length in enumerate(first.tolist()):
        if length < lengths[row]:  # the rest has a token at least
            found.setdefault(tokens[row, :length].tobytes(), []).append(row)
    shared = [members for members in found.values() if len(members) > 1]
    saved = sum(int(first[members[0]]) * (len(members) - 1) for members in shared)
    return shared if saved * SHARED_SHARE >= lengths.sum() else []


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
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[th.Tensor, None]:
    """Attend within sequences to what comes before; see `transformers.AttentionInterface`."""
    if packing is None:
        raise ValueError(f"{type(module).__name__} is not told which sequences there are")
    outputs = []
    rows = [tensor.split(packing.sizes, dim=2) for tensor in (query, key, value)]
    whole = len(packing.groups)
    for group, q, k, v in zip(packing.groups, *(row[:whole] for row in rows), strict=True):
        batch = group.pad(q), group.pad(k), group.pad(v)
        seen, length = None, group.real.shape[1]
        if sliding_window is not None and sliding_window < length:
            seen = packing.window(length, length, sliding_window)
        outputs.append(group.pack(causal_attention(module, *batch, seen=seen, **kwargs)))
    for branches, q, k, v in zip(packing.branches, *(row[whole:] for row in rows), strict=True):
        batch = branches.own.pad(q), branches.keys(key, k), branches.keys(value, v)
        seen, (length, keys) = branches.seen, branches.seen.shape[2:]
        if sliding_window is not None and sliding_window < keys:
            seen = packing.window(length, keys, sliding_window)
        attended = causal_attention(module, *batch, seen=seen, **kwargs)
        outputs.append(branches.own.pack(attended))
    return th.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
