"""Keys and values of an encoder-decoder's rows: all of them write those of a step to one column."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from agents.compat import without_layers
from agents.decoding.tokens import Observation, Tokens


class ColumnCache(Cache):
    """The keys and values of all rows, as a step sees them: it writes one of the columns.

    Args:
        keys: Of each layer, (rows, heads, columns, head size), those to attend to.
        values: Likewise.
        column: Which of them is written: a number, or a tensor (1,) where programs are compiled
            that would otherwise be those of one column.
    """

    def __init__(
        self, keys: list[th.Tensor], values: list[th.Tensor], column: int | th.Tensor
    ) -> None:
        without_layers(self)
        self._keys, self._values, self._column = keys, values, column

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """Store new keys and values, (rows, heads, 1, head size), and return those to attend to."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        for held, new in ((keys, key_states), (values, value_states)):
            if isinstance(self._column, int):
                held[:, :, self._column] = new[:, :, 0]
            else:
                held.index_copy_(2, self._column, new)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Return how many columns there were before."""
        return self._column if isinstance(self._column, int) else self._column[0]


@dataclass
class RowMemory:
    """What is remembered of rows.

    Args:
        weights: The version of the weights that it is of.
        rows: How many there are.
        longest: The most tokens that a row reads.
        column: The last one that was written.
        starts: (rows,) the column of each row's first token.
        sources: (rows,) how many prompt tokens were encoded.
        steps: How many steps there have been.
        keys: Of the decoder's own tokens, by layer.
        values: Likewise.
        cross: Keys and values of what was encoded, (rows, heads, width, head size) each.
        seen: The last observation.
    """

    weights: object
    rows: int
    longest: int
    column: int
    starts: Tokens
    sources: Tokens
    steps: int = 0
    keys: list[th.Tensor] = field(default_factory=list)
    values: list[th.Tensor] = field(default_factory=list)
    cross: DynamicCache = field(default_factory=DynamicCache)
    seen: dict[str, Tokens] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """How many columns there are."""
        return 2 * self.longest + 1

    def goes_on(self, observation: Observation) -> npt.NDArray[np.bool_]:
        """Return which rows (rows,) have the same prompt, and one token more, than before."""
        # The budget is that of the memory; prompts may be padded to another width.
        if not self.seen or self.seen["prompt"].shape != observation["prompt"].shape:
            return np.zeros(self.rows, dtype=np.bool_)
        before, lengths = self.seen["response"], self.seen["response_length"]
        kept = np.arange(before.shape[1]) < lengths
        same = (observation["response_length"] == lengths + 1)[:, 0]
        same &= ((observation["response"] == before) | ~kept).all(axis=1)
        for key in ("prompt", "prompt_length"):
            same &= (observation[key] == self.seen[key]).all(axis=1)
        return cast("npt.NDArray[np.bool_]", same)

    def advance(self) -> None:
        """Go to the next column; the last ones are moved to the front if none is left."""
        self.column += 1
        if self.column < self.capacity:
            return
        longest = self.longest
        by = self.column - longest
        for layer in (*self.keys, *self.values):
            layer[:, :, :longest] = layer[:, :, by : self.column].clone()
        self.column, self.starts = longest, self.starts - by

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Keep these rows alone, in this order."""
        index = th.as_tensor(rows)
        for layers in (self.keys, self.values):
            layers[:] = [layer[index.to(layer.device)] for layer in layers]
        for layer in self.cross.layers:
            held = cast("Any", layer)
            held.keys, held.values = (
                part[index.to(part.device)] for part in (held.keys, held.values)
            )
        self.rows, self.starts, self.sources = len(rows), self.starts[rows], self.sources[rows]
        self.seen = {name: array[rows] for name, array in self.seen.items()}

    def store(
        self, rows: npt.NDArray[np.intp], cache: EncoderDecoderCache, lengths: Tokens
    ) -> None:
        """Take over the keys and values of some rows, whose last token has the newest column."""
        caches = cast("Any", (cache.self_attention_cache, cache.cross_attention_cache))
        own, cross = (part.layers for part in caches)
        if not self.keys:
            for layer in own:
                for held, new in ((self.keys, layer.keys), (self.values, layer.values)):
                    shape = (self.rows, new.shape[1], self.capacity, new.shape[3])
                    held.append(new.new_zeros(shape))
        where = th.as_tensor(rows, device=self.keys[0].device)
        for i, layer in enumerate(own):
            for held, added in ((self.keys, layer.keys), (self.values, layer.values)):
                at = slice(self.column + 1 - added.shape[2], self.column + 1)
                held[i][where, :, at] = added
        width = int(lengths.max())
        for i, layer in enumerate(cross):
            keys, values = layer.keys, layer.values
            if len(self.cross.layers) <= i:
                empty = keys.new_zeros(self.rows, keys.shape[1], 0, keys.shape[3])
                self.cross.update(empty, empty.clone(), i)
            held_layer = cast("Any", self.cross.layers[i])
            for name, new in (("keys", keys), ("values", values)):
                held_part = getattr(held_layer, name)
                if held_part.shape[2] < width:
                    more = (*held_part.shape[:2], width - held_part.shape[2], held_part.shape[3])
                    held_part = th.cat([held_part, held_part.new_zeros(more)], dim=2)
                    setattr(held_layer, name, held_part)
                held_part[where, :, :width] = new
        self.sources[rows] = lengths
