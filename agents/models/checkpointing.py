"""Gradient checkpointing: a layer's inner results are computed once more in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from agents.compat import attention_of, checkpointed_layers, set_recomputation, using_attention


def checkpoint_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Let a model's layers keep their inputs only, within `recomputing`, and return them.

    Raises:
        ValueError: If the model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing: leave "
            "gradient_checkpointing out."
        )
    layers = checkpointed_layers(model)
    for layer in layers:
        set_recomputation(layer, partial(_recomputed, layer, model.config))
    return layers


@contextmanager
def recomputing(layers: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Let layers keep their inputs only, if that is wanted."""
    for layer in layers:
        # The layer's own flag, not that of the modules in it, in which dropout stays off.
        layer.training = wanted
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _recomputed(
    layer: nn.Module, config: PretrainedConfig, forward: Callable[..., Any], *inputs: Any
) -> Any:
    """Run a layer's forward, once more in the backward pass, and keep no more than its inputs."""
    # `training` was set only so that this function is called; reset it, so that dropout that the
    # layer applies by itself stays off.
    layer.training = False
    attention = attention_of(config)

    def run(*inputs: Any) -> Any:
        with using_attention(config, attention):
            return forward(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)
