"""Keys and values of rows of different lengths, as a `transformers` model reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch as th
from transformers.cache_utils import Cache

from agents.compat import fix_address, without_layers


@dataclass
class KeyValues:
    """Keys and values of all layers, (rows, heads, positions, head size) each."""

    keys: list[th.Tensor] = field(default_factory=list)
    values: list[th.Tensor] = field(default_factory=list)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows and positions, and keep what is there."""
        for layers in (self.keys, self.values):
            for i, old in enumerate(layers):
                if old.shape[2] < positions:
                    layers[i] = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
                    layers[i][:, :, : old.shape[2]] = old

    def copy_rows(self, of: th.Tensor, to: th.Tensor, positions: int) -> None:
        """Give rows (n,) what other rows (n,) have in so many positions, from the first on."""
        for layer in (*self.keys, *self.values):
            where = to.to(layer.device)
            layer[where, :, :positions] = layer[of.to(layer.device), :, :positions]

    def keep_rows(self, rows: th.Tensor) -> None:
        """Keep these rows (n,) alone, in this order, and let the memory of the others go."""
        for layers in (self.keys, self.values):
            for i, old in enumerate(layers):
                layers[i] = old[rows.to(old.device)]


class RowCache(Cache):
    """Keys and values as one forward of a model sees them: rows have lengths of their own.

    New keys are written to positions chosen row by row; which of a row's keys a query may see is
    up to the attention mask.

    Args:
        key_values: What is written to and read from.
        shape: The rows and positions to make room for where there is nothing yet.
        rows: (n,) the rows that the forward is about; None: all of them, in order.
        positions: (n, q) where each row's new keys go.
        width: How many positions, from the first on, are attended to. 0: only the keys that the
            forward brings itself.
        first: The first one of them that is read here; what is before it is read elsewhere.
    """

    def __init__(
        self,
        key_values: KeyValues,
        shape: tuple[int, int],
        rows: th.Tensor | None,
        positions: th.Tensor,
        width: int,
        first: int = 0,
    ) -> None:
        without_layers(self)
        self._key_values = key_values
        self._shape = shape
        self._positions = positions
        self._width = width
        self._first = first
        self._rows = rows
        every = th.arange(len(positions), device=positions.device) if rows is None else rows
        self._at = every[:, None]

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """Store new keys and values, (n, heads, q, head size), and return those to attend to."""
        keys = self._write(self._key_values.keys, layer_idx, key_states)
        values = self._write(self._key_values.values, layer_idx, value_states)
        return keys, values

    @property
    def has_every_row(self) -> bool:
        """Whether the forward is about all rows, in order."""
        return self._rows is None

    @property
    def allocated(self) -> bool:
        """Whether there is room already."""
        return bool(self._key_values.keys)

    def fix_addresses(self) -> None:
        """Promise that keys and values stay where they are: a captured graph writes there."""
        for tensor in (*self._key_values.keys, *self._key_values.values):
            fix_address(tensor)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0

    def _write(self, layers: list[th.Tensor], layer: int, new: th.Tensor) -> th.Tensor:
        if th.is_autocast_enabled(new.device.type):
            # Rotary embeddings give float32, which attention would convert at every step.
            new = new.to(th.get_autocast_dtype(new.device.type))
        if layer == len(layers):
            rows, positions = self._shape
            layers.append(new.new_zeros(rows, new.shape[1], positions, new.shape[3]))
        kept = layers[layer]
        kept[self._at, :, self._positions] = new.transpose(1, 2)
        if not self._width:
            return new
        read = kept[:, :, self._first : self._width]
        return read if self._rows is None else read[self._rows]
