"""Keys and values that a causal model has already computed, kept as a memo of token prefixes.

The memo never decides what a policy answers, only how much of it has to be computed: rows whose
tokens start with remembered ones cost the rest, any other row is computed afresh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch as th
from transformers.cache_utils import Cache

# Positions are allocated in steps of this many, so that a growing context is rarely copied.
ALLOCATION_STEP = 64

# Runs the model: (input_ids, position_ids, attention mask, cache) -> hidden states (n, q, hidden).
Forward = Callable[[th.Tensor, th.Tensor, th.Tensor, Cache], th.Tensor]


class RowCache(Cache):
    """A `transformers` cache whose rows have lengths of their own.

    Every forward writes to positions that `at` chose, row by row, and attends to what those rows
    hold; which of it a query may see is up to the attention mask.
    """

    def __init__(self) -> None:
        # The parent's layers grow by appending, which ragged rows cannot.
        self.layers = []
        self.stored_keys: list[th.Tensor] = []
        self.stored_values: list[th.Tensor] = []
        self._rows: th.Tensor | None = None
        self._positions = th.empty(0)
        self._width = 0
        self._shape = (0, 0)

    def at(
        self, shape: tuple[int, int], rows: th.Tensor | None, positions: th.Tensor, width: int
    ) -> RowCache:
        """Choose where the next forward writes.

        Args:
            shape: The rows and positions that the cache must hold.
            rows: (n,) the rows that the forward is about; None: all of them, in order.
            positions: (n, q) where each row's new keys go.
            width: How many positions, from the first on, the forward attends to. 0: only the
                keys that it brings itself.
        """
        self._shape, self._rows, self._positions, self._width = shape, rows, positions, width
        return self

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """Store new keys and values, (n, heads, q, head size), and return those to attend to."""
        if layer_idx == len(self.stored_keys):
            self.stored_keys.append(key_states.new_zeros(0))
            self.stored_values.append(value_states.new_zeros(0))
        attended = []
        rows = self._rows
        if rows is None:
            rows = th.arange(len(key_states), device=key_states.device)
        for layers, new in ((self.stored_keys, key_states), (self.stored_values, value_states)):
            if th.is_autocast_enabled(new.device.type):
                # Rotary embeddings give float32, which attention would convert at every step.
                new = new.to(th.get_autocast_dtype(new.device.type))
            store = self._grown(layers[layer_idx], new)
            layers[layer_idx] = store
            store[rows[:, None], :, self._positions] = new.transpose(1, 2)
            if not self._width:
                attended.append(new)
            elif self._rows is None:
                attended.append(store[:, :, : self._width])
            else:
                attended.append(store[self._rows, :, : self._width])
        return cast("tuple[th.Tensor, th.Tensor]", tuple(attended))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0

    def _grown(self, store: th.Tensor, new: th.Tensor) -> th.Tensor:
        """Return a store that holds at least the chosen shape, with the old content."""
        rows, positions = self._shape
        if store.dim() == 4 and store.shape[0] == rows and store.shape[2] >= positions:
            return store
        grown = new.new_zeros(rows, new.shape[1], positions, new.shape[3])
        if store.dim() == 4 and store.shape[0] == rows:
            grown[:, :, : store.shape[2]] = store
        return grown


class PrefixMemo:
    """Computes the last hidden state of each row of tokens, remembering keys and values.

    Args:
        rows: How many rows there are; row i is compared with what row i held before.
        weights: What the remembered keys and values were computed with (see `weights_version`).
    """

    def __init__(self, rows: int, weights: object) -> None:
        self.rows = rows
        self.weights = weights
        self._cache = RowCache()
        self._tokens = th.empty(rows, 0, dtype=th.long)
        self._lengths = th.zeros(rows, dtype=th.long)

    def last_hidden(self, forward: Forward, tokens: th.Tensor, lengths: th.Tensor) -> th.Tensor:
        """Return the hidden state at each row's last token.

        Args:
            forward: The model.
            tokens: (rows, width) right-padded token ids; no row is longer than `width`.
            lengths: (rows,) how many tokens each row has, at least 1.

        Returns:
            (rows, hidden)
        """
        width = tokens.shape[1]
        known = th.minimum(self._known(tokens, lengths), lengths - 1)
        # One position more than the longest row: what padding writes lands there.
        capacity = -(-(width + 1) // ALLOCATION_STEP) * ALLOCATION_STEP
        shape = (self.rows, max(capacity, self._tokens.shape[1]))
        missing = lengths - 1 - known
        rows = missing.nonzero().squeeze(-1)
        if len(rows):
            self._prefill(forward, tokens, rows, known[rows], missing[rows], shape)
        last = (lengths - 1)[:, None]
        mask = th.arange(width, device=tokens.device)[None, :] <= last
        cache = self._cache.at(shape, None, last, width)
        hidden = forward(tokens.gather(1, last), last, mask[:, None, None, :], cache)
        self._remember(tokens, lengths, shape[1])
        return hidden[:, 0]

    def _known(self, tokens: th.Tensor, lengths: th.Tensor) -> th.Tensor:
        """Return how many of each row's tokens are the remembered ones, from the start on."""
        width = min(tokens.shape[1], self._tokens.shape[1])
        if not width:  # the first call
            return th.zeros_like(lengths)
        same = tokens[:, :width] == self._tokens[:, :width]
        common = same.long().cumprod(dim=1).sum(dim=1)
        return th.minimum(common, self._lengths)

    def _prefill(
        self,
        forward: Forward,
        tokens: th.Tensor,
        rows: th.Tensor,
        known: th.Tensor,
        missing: th.Tensor,
        shape: tuple[int, int],
    ) -> None:
        """Compute what is missing before the last token of some rows, all in one forward."""
        steps = th.arange(int(missing.max()), device=tokens.device)[None, :]
        real = steps < missing[:, None]
        positions = known[:, None] + steps
        read = th.where(real, positions, known[:, None])
        write = th.where(real, positions, shape[1] - 1)
        fresh = not bool(known.any())
        width = 0 if fresh else int((known + missing).max())
        keys = steps if fresh else th.arange(width, device=tokens.device)[None, :]
        mask = keys[:, None, :] <= (steps if fresh else read)[:, :, None]
        forward(
            tokens[rows].gather(1, read),
            read,
            mask[:, None],
            self._cache.at(shape, rows, write, width),
        )

    def _remember(self, tokens: th.Tensor, lengths: th.Tensor, capacity: int) -> None:
        if self._tokens.shape[1] < capacity:
            self._tokens = tokens.new_zeros(self.rows, capacity)
        self._tokens[:, : tokens.shape[1]] = tokens
        self._lengths = lengths.clone()


def weights_version(module: th.nn.Module) -> object:
    """Return something that differs after a parameter was replaced or changed in place.

    PyTorch does not count what fused optimizers and changes through `.data` do in place.
    """
    return tuple((p.data_ptr(), p._version) for p in module.parameters())
