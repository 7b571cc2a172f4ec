"""Whatever other libraries keep private, or name otherwise from version to version: used here only.

Each function says in which versions it was seen to work. `tests/agents/test_compat.py` fails if an
architecture loses its cache or its packing by a change of what is private.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from operator import attrgetter
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch as th
from accelerate.state import AcceleratorState
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.peft_utils import find_adapter_config_file

T = TypeVar("T")

# A parameter's place: the dict of its module that holds it, and its name there.
Place = tuple[Mapping[str, th.Tensor | None], str]

# torch 2.11, 2.13: counts what is done to a tensor in place, except by way of `.data` and by fused
# optimizers.
version_of = cast("Callable[[th.Tensor], int]", attrgetter("_version"))


def on_optimizer_step(function: Callable[[], None]) -> None:
    """Call a function after each step of each optimizer; torch 2.11, 2.13."""
    register_optimizer_step_post_hook(lambda *_: function())


def parameter_places(module: nn.Module) -> list[Place]:
    """Return where a module's parameters are held; torch 2.11, 2.13."""
    return [(part._parameters, name) for part in module.modules() for name in part._parameters]


def with_children(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """Return a module that shares everything with another but its children; torch 2.11, 2.13."""
    shared = copy.copy(module)
    shared._modules = children
    return shared


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's children by name, those that are None included; torch 2.11, 2.13."""
    return module._modules


def map_tensors(function: Callable[[th.Tensor], th.Tensor], tree: T) -> T:
    """Return tuples, lists and dicts of tensors with a function applied; torch 2.11, 2.13."""
    return cast("T", tree_map(function, tree))


def fix_address(tensor: th.Tensor) -> None:
    """Promise compilers that a tensor stays where it is in memory; torch 2.11, 2.13."""
    th._dynamo.mark_static_address(tensor, guard=False)


def onednn_multiplies(dtype: th.dtype) -> bool:
    """Return whether oneDNN multiplies by prepacked weights on this CPU; torch 2.11, 2.13."""
    if not (th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == th.bfloat16:
        return bool(th.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == th.float32


def onednn_prepack(weight: th.Tensor, rows: int) -> th.Tensor:
    """Return a weight (out, in) in oneDNN's own layout.

    torch 2.11, 2.13.

    Args:
        weight: The weight.
        rows: The number of rows that the layout is made for; it serves any other, too.
    """
    return cast("th.Tensor", th.ops.mkldnn._reorder_linear_weight(weight, rows))


def onednn_linear(x: th.Tensor, prepacked: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """Return a linear layer's output by a prepacked weight; torch 2.11, 2.13."""
    linear = th.ops.mkldnn._linear_pointwise.default
    return cast("th.Tensor", linear(x, prepacked, bias, "none", [], ""))


def without_layers(cache: Cache) -> None:
    """Initialise a cache that keeps nothing in layers of `transformers`' own.

    transformers 5.17, 5.23: masks are then made for the keys of a forward alone, and `None` stays
    a causal mask of these. The parent's layers grow by appending, which ragged rows cannot.
    """
    cache.layers = []


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """Return what makes a model's hidden states, without its head; transformers 5.17, 5.23."""
    ways = (lambda: model.base_model, model.get_decoder, lambda: getattr(model, "model", None))
    found = (way() for way in ways)
    return next(trunk for trunk in found if trunk is not None and trunk is not model)


def cache_name(model: PreTrainedModel) -> str:
    """Return what a model calls the cache that it is given; transformers 5.17, 5.23."""
    names = signature(trunk_of(model).forward).parameters
    return "past_key_values" if "past_key_values" in names else "cache_params"


def attention_of(config: PretrainedConfig) -> str:
    """Return the name of the attention that a model uses; transformers 5.17, 5.23."""
    return str(config._attn_implementation)


@contextmanager
def using_attention(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Let a model use another attention for a while; transformers 5.17, 5.23."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def causal_attention(
    module: nn.Module,
    query: th.Tensor,
    key: th.Tensor,
    value: th.Tensor,
    seen: th.Tensor | None = None,
    **options: Any,
) -> th.Tensor:
    """Return what SDPA gives for queries that see all keys up to their own.

    transformers 5.17, 5.23.

    Args:
        module: The attention layer.
        query: (sequences, heads, width, size)
        key: (sequences, key heads, width, size)
        value: Likewise.
        seen: Boolean (1, 1, width, keys), where queries see others. None: see above.
        options: What a model gives to its attention besides.

    Returns:
        (sequences, width, heads, size)
    """
    return sdpa_attention_forward(module, query, key, value, seen, **options)[0]


def layer_of(module: nn.Module) -> int:
    """Return the number of the layer that an attention is of; transformers 5.17, 5.23."""
    return int(cast("Any", module).layer_idx)


def checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the outermost layers whose inner results need not be kept; transformers 5.17, 5.23."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def fixed_positions(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return what is computed from positions and not learned; transformers 5.17, 5.23.

    Loading weights (Marian's, Pegasus') makes it trainable, which a new model's is not.
    """
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding))
    fixed = (table for table in tables if "SinusoidalPosition" in type(table).__name__)
    return [parameter for table in fixed for parameter in table.parameters()]


def is_quantised(model: nn.Module) -> bool:
    """Return whether a model's weights, or those of one in it, are of few bits.

    transformers 5.17, 5.23.
    """
    return any(getattr(part, "is_quantized", False) for part in model.modules())


def keep_gradients(model: nn.Module) -> None:
    """Let layers of 4 bits compute by what gradients go through, on any CPU; bitsandbytes 0.50."""
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            cast("Any", part).support_avx512bf16_for_cpu = False


def has_own_code(config: Any) -> bool:
    """Return whether a config is of code that came with a model; transformers 5.17, 5.23."""
    return type(config).__module__.startswith("transformers_modules")


def kept_in_float32(model: PreTrainedModel, dtype: th.dtype) -> set[str]:
    """Return the names of parts that a checkpoint of lower precision has in float32.

    transformers 5.17, 5.23. A name may be that of a module, a parameter, or several with dots.
    """
    names = set(model._keep_in_fp32_modules_strict or ())
    if dtype == th.float16:  # of a smaller range than bfloat16
        names |= set(model._keep_in_fp32_modules or ())
    return names


def set_recomputation(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function(forward, *inputs)` run a layer while its `training` is set.

    transformers 5.17, 5.23.
    """
    checkpointed = cast("Any", layer)
    checkpointed.gradient_checkpointing = True
    checkpointed._gradient_checkpointing_func = function


def adapter_config_file(name: str) -> str | None:
    """Return where an adapter's adapter_config.json is, if `name` is that of an adapter.

    transformers 5.17, 5.23.
    """
    try:
        return find_adapter_config_file(name)
    except OSError:  # neither a folder nor a hub id
        return None


def use_one_device(arguments: Any) -> None:
    """Let a `transformers.Trainer` use one GPU of all that it sees; transformers 5.17, 5.23."""
    arguments._n_gpu = min(1, arguments.n_gpu)


def forget_processes() -> None:
    """Let accelerate find out anew which processes there are; accelerate 1.15."""
    AcceleratorState._reset_state(reset_partial_state=True)


def is_idle(env: AsyncVectorEnv) -> bool:
    """Return whether an asynchronous environment waits for nothing; gymnasium 1.4."""
    return env._state == AsyncState.DEFAULT


def used_generator(space: gym.Space[Any]) -> np.random.Generator | None:
    """Return a space's generator, or None: it was never used; gymnasium 1.4."""
    return space._np_random
