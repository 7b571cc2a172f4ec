"""Keys, values and states of rows of different lengths, as a model reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch as th
from transformers.cache_utils import Cache

from agents.compat import fix_address, without_layers


@dataclass
class KeyValues:
    """What layers remember of rows, by their numbers.

    Args:
        keys: (rows, heads, positions, head size) each.
        values: Likewise.
        states: What recurrent layers made of all that they have read, (rows, ...) each.
    """

    keys: dict[int, th.Tensor] = field(default_factory=dict)
    values: dict[int, th.Tensor] = field(default_factory=dict)
    states: dict[tuple[str, int, int], th.Tensor] = field(default_factory=dict)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows and positions, and keep what is there."""
        for layers in (self.keys, self.values):
            for i, old in list(layers.items()):
                if old.shape[2] < positions:
                    layers[i] = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
                    layers[i][:, :, : old.shape[2]] = old

    def copy_rows(self, of: th.Tensor, to: th.Tensor, positions: int) -> None:
        """Give rows (n,) what other rows (n,) have in so many positions, from the first on."""
        for layer in (*self.keys.values(), *self.values.values()):
            where = to.to(layer.device)
            layer[where, :, :positions] = layer[of.to(layer.device), :, :positions]
        for state in self.states.values():
            state[to.to(state.device)] = state[of.to(state.device)]

    def clear_states(self, rows: th.Tensor) -> None:
        """Give rows (n,) the states of what has read nothing."""
        for state in self.states.values():
            state[rows.to(state.device)] = 0

    def keep_rows(self, rows: th.Tensor) -> None:
        """Keep these rows (n,) alone, in this order, and let the memory of the others go."""
        everything: tuple[dict[Any, th.Tensor], ...] = self.keys, self.values, self.states
        for layers in everything:
            for i, old in layers.items():
                layers[i] = old[rows.to(old.device)]


class RowCache(Cache):
    """What is remembered, as one forward of a model sees it: rows have lengths of their own.

    New keys are written to positions chosen row by row; which of a row's keys a query may see is
    up to the attention mask. States are those of rows that all read equally many tokens; a forward
    of all rows goes on from them, one of some rows begins anew.

    Args:
        key_values: What is written to and read from.
        shape: The rows and positions to make room for where there is nothing yet.
        rows: (n,) the rows that the forward is about; None: all of them, in order.
        positions: (n, q) where each row's new keys go.
        width: How many positions, from the first on, are attended to. 0: only the keys that the
            forward brings itself.
        first: The first one of them that is read here; what is before it is read elsewhere.
        own_masks: Whether the model makes masks itself, as if its tokens were behind all keys.
    """

    def __init__(
        self,
        key_values: KeyValues,
        shape: tuple[int, int],
        rows: th.Tensor | None,
        positions: th.Tensor,
        width: int,
        first: int = 0,
        own_masks: bool = False,
    ) -> None:
        without_layers(self)
        self._own_masks = own_masks
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
        return bool(self._key_values.keys or self._key_values.states)

    def fix_addresses(self) -> None:
        """Promise that keys and values stay where they are: a captured graph writes there."""
        for tensor in (*self._key_values.keys.values(), *self._key_values.values.values()):
            fix_address(tensor)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, since positions are always given explicitly, or where a model's masks begin."""
        return self._width - 1 if self._own_masks and self._width else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys there are, and 0, the first one's position."""
        return (self._width if self._own_masks and self._width else query_length), 0

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether recurrent layers go on from a state."""
        return self.has_every_row and bool(self._key_values.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: earlier states are not kept."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> th.Tensor | None:
        """Return a layer's last inputs of its convolution, or None: there are none yet."""
        return self._state(("conv", layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> th.Tensor | None:
        """Return a layer's state, or None: there is none yet."""
        return self._state(("recurrent", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: th.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> th.Tensor:
        """Keep the last inputs (n, channels, size), and return them with those before."""
        key = "conv", layer_idx, state_idx
        before = self._state(key)
        size = (conv_states if before is None else before).shape[-1]
        size = size if conv_kernel_size is None else conv_kernel_size
        if before is None:
            inputs = th.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            inputs = th.cat([before, conv_states], dim=-1)
        self._keep(key, inputs[..., -size:])
        return inputs

    def update_recurrent_state(
        self, recurrent_states: th.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> th.Tensor:
        """Keep a layer's new state (n, ...), and return it."""
        self._keep(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def _state(self, key: tuple[str, int, int]) -> th.Tensor | None:
        return self._key_values.states.get(key) if self.has_every_row else None

    def _keep(self, key: tuple[str, int, int], new: th.Tensor) -> None:
        states = self._key_values.states
        if key not in states:
            states[key] = new.new_zeros(self._shape[0], *new.shape[1:])
        states[key][slice(None) if self._rows is None else self._rows] = new

    def _write(self, layers: dict[int, th.Tensor], layer: int, new: th.Tensor) -> th.Tensor:
        if th.is_autocast_enabled(new.device.type):
            # Rotary embeddings give float32, which attention would convert at every step.
            new = new.to(th.get_autocast_dtype(new.device.type))
        if layer not in layers:
            rows, positions = self._shape
            layers[layer] = new.new_zeros(rows, new.shape[1], positions, new.shape[3])
        kept = layers[layer]
        kept[self._at, :, self._positions] = new.transpose(1, 2)
        if not self._width:
            return new
        read = kept[:, :, self._first : self._width]
        return read if self._rows is None else read[self._rows]
