"""What each kind of a model's layers sees in a step: all keys so far, a window of them, a chunk.

Rows have lengths of their own, so that a model cannot make these masks itself.
"""

from __future__ import annotations

import torch as th
from transformers import PretrainedConfig

# Kinds of layers that see keys; "hybrid" ones remember a state besides.
FULL, SLIDING, CHUNKED, HYBRID = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "hybrid",
)

ModelMask = th.Tensor | dict[str, th.Tensor | None]


class LayerMasks:
    """Makes a model's `attention_mask` of which keys rows have.

    Args:
        config: The model's, that of its text if it has several.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config

    def of(self, seen: th.Tensor, positions: th.Tensor, dtype: th.dtype) -> ModelMask | None:
        """Return the mask, in the form that the model takes.

        Args:
            seen: Boolean (n, 1, q, k), which of the keys are there and not behind a token.
            positions: (n, q) the tokens' positions.
            dtype: The precision of the scores.
        """
        kinds = kinds_of(self._config)
        if not kinds:
            return _added(self._seen(SLIDING, seen, positions), dtype)
        if not kinds & {FULL, SLIDING, CHUNKED, HYBRID}:
            return None
        masks: dict[str, th.Tensor | None] = dict.fromkeys(kinds | {"linear_attention"})
        for kind in (kinds | {FULL}) & {FULL, SLIDING, CHUNKED}:
            masks[kind] = _added(self._seen(kind, seen, positions), dtype)
        return masks if kinds != {FULL} else masks[FULL]

    def _seen(self, kind: str, seen: th.Tensor, positions: th.Tensor) -> th.Tensor:
        """Return which keys a kind of layer sees; where all are of one kind, see `window_of`."""
        keys, at = th.arange(seen.shape[-1], device=seen.device), positions[:, None, :, None]
        if kind == SLIDING and (window := window_of(self._config)) is not None:
            return seen & (keys > at - window)
        if kind == CHUNKED:
            chunk: int = self._config.attention_chunk_size
            same: th.Tensor = keys // chunk == at // chunk
            return seen & same
        return seen


def kinds_of(config: PretrainedConfig) -> frozenset[str]:
    """Return the kinds of a model's layers; none if its config says nothing of them."""
    return frozenset(getattr(config, "layer_types", None) or ())


def keeps_states(config: PretrainedConfig) -> bool:
    """Return whether layers remember a state of what they have read, and not its keys."""
    return not kinds_of(config) <= {FULL, SLIDING, CHUNKED}


def has_windows(config: PretrainedConfig) -> bool:
    """Return whether layers may see a number of tokens back; some configs have it for none."""
    kinds = kinds_of(config) or set(getattr(config, "attention_layers", ()))
    return not kinds or bool(kinds & {SLIDING, CHUNKED, "local"})


def window_of(config: PretrainedConfig) -> int | None:
    """Return how many keys layers with a sliding window see, or None: no layer has one."""
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _added(seen: th.Tensor, dtype: th.dtype) -> th.Tensor:
    """Return a mask to be added to the scores.

    SDPA would make it of a boolean one in each layer anew, and other attentions take no boolean
    one.
    """
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, th.finfo(dtype).min)
