"""Steps of rows that go on from one prompt: its keys and values are read once for all of them.

A step reads all keys that there are, and of long prompts that is most of its time. What a query
makes of the common keys and of its row's own ones is put together in one softmax, so that the
result is that of attention to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from transformers import AttentionInterface

from agents.compat import layer_of
from agents.decoding.row_cache import KeyValues

ATTENTION = "textenvs_shared_prefix"

# It is worth the trouble where rows have at least so many keys in common, and where so many rows
# have them on average.
LEAST_KEYS = 64
LEAST_ROWS = 3.0


@dataclass(frozen=True)
class SharedPrefix:
    """Rows in groups that have their first keys in common.

    Args:
        length: How many keys these are.
        keys: Of each layer (groups, key heads, length, size).
        values: Likewise.
        places: (rows,) each row's place among groups times the rows of the largest one.
        largest: How many rows that one has.
    """

    length: int
    keys: dict[int, th.Tensor]
    values: dict[int, th.Tensor]
    places: th.Tensor
    largest: int

    @staticmethod
    def of(
        key_values: KeyValues, sources: npt.NDArray[np.intp], length: int
    ) -> SharedPrefix | None:
        """Return what rows have in common, or None if too few of them have it.

        Args:
            key_values: Of all rows.
            sources: (rows,) a row that has the same first keys, the same one for all that have.
            length: How many first keys.
        """
        roots, groups, counts = np.unique(sources, return_inverse=True, return_counts=True)
        if len(sources) < LEAST_ROWS * len(roots):
            return None
        device = next(iter(key_values.keys.values())).device
        of = th.as_tensor(roots, device=device)
        keys, values = (
            {i: layer[of, :, :length].contiguous() for i, layer in layers.items()}
            for layers in (key_values.keys, key_values.values)
        )
        places = _places(groups, int(counts.max()))
        return SharedPrefix(
            length, keys, values, th.as_tensor(places, device=device), int(counts.max())
        )

    def kept(self, rows: npt.NDArray[np.intp]) -> SharedPrefix:
        """Return the same for some of the rows."""
        places = self.places[th.as_tensor(rows, device=self.places.device)]
        return SharedPrefix(self.length, self.keys, self.values, places, self.largest)

    def by_group(self, rows: th.Tensor) -> th.Tensor:
        """Return (groups, heads, largest x width, size) of (rows, heads, width, size)."""
        _, heads, width, size = rows.shape
        groups = len(next(iter(self.keys.values())))
        spread = rows.new_zeros(groups * self.largest, heads, width, size)
        spread[self.places] = rows
        spread = spread.view(groups, self.largest, heads, width, size).transpose(1, 2)
        return spread.reshape(groups, heads, self.largest * width, size)

    def by_row(self, groups: th.Tensor, width: int) -> th.Tensor:
        """Return the reverse of `by_group`."""
        count, heads, _, size = groups.shape
        spread = groups.view(count, heads, self.largest, width, size).transpose(1, 2)
        return spread.reshape(count * self.largest, heads, width, size)[self.places]


def _places(groups: npt.NDArray[np.intp], largest: int) -> npt.NDArray[np.intp]:
    """Return a place of its own for each row, among those of its group."""
    taken: dict[int, int] = {}
    places = []
    for group in groups.tolist():
        place = taken[group] = taken.get(group, -1) + 1
        places.append(group * largest + place)
    return np.array(places, dtype=np.intp)


def shared_attention(
    module: th.nn.Module,
    query: th.Tensor,
    key: th.Tensor,
    value: th.Tensor,
    attention_mask: th.Tensor | None,
    shared: SharedPrefix,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[th.Tensor, None]:
    """Attend to common keys and to each row's own; see `transformers.AttentionInterface`.

    Args:
        module: The attention layer.
        query: (rows, heads, 1, size)
        key: (rows, key heads, positions, size), from the first one on that is not shared.
        value: Likewise.
        attention_mask: (rows, 1, 1, positions), to be added to the scores of all positions.
        shared: What the rows have in common.
        scaling: What scores are multiplied by. None: one by the root of the size.
        sliding_window: How many keys a query sees. None: all.
        kwargs: Ignored.
    """
    layer = layer_of(module)
    rows, heads, _, size = query.shape
    # The heads that share keys stand where positions of one head would.
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], size)
    grouped = grouped * (size**-0.5 if scaling is None else scaling)
    width = grouped.shape[2]
    common = shared.by_group(grouped) @ shared.keys[layer].transpose(2, 3)
    own = grouped @ key.transpose(2, 3)
    common = shared.by_row(common, width)
    if attention_mask is not None:
        own = own + attention_mask[..., shared.length :]
        if sliding_window is not None:
            common = common + attention_mask[..., : shared.length]
    weights = th.cat([common, own], dim=-1)
    weights = weights.softmax(dim=-1, dtype=th.float32).to(value.dtype)
    common = shared.by_group(weights[..., : shared.length]) @ shared.values[layer]
    attended = shared.by_row(common, width) + weights[..., shared.length :] @ value
    return attended.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, shared_attention)
