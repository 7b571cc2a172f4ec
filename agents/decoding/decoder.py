"""The steps of a rollout made cheap: a twin of the model with its weights laid out for decoding.

A decode step reads every weight for a handful of tokens, so how the weights lie in memory is what
it costs. The twin shares everything with the model but its linear layers, of which it has copies:
on a CPU in the layout that oneDNN multiplies fastest, under autocast in the lower precision, so
that they are not converted at every step. It computes what the model computes, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary

import torch as th
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from agents.decoding.prefix_cache import (
    ALLOCATION_STEP,
    PrefixMemo,
    RowCache,
    Store,
    WeightsVersion,
)

# To lay the weights out costs about as much as so many steps save.
PACK_AFTER = 4
# Rows that the layout is made for; it serves any other number, too.
PACKED_FOR = 256
# Weights of fewer numbers gain less by the layout than a call of oneDNN costs.
PACK_FROM = 2**17

LINEAR = (nn.Linear, Conv1D)
# Layers of a module that read the same input, by the names that most models give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Modules = tuple[nn.Module, nn.Module]  # trunk and head

_KEYS = count()
_PACKED: WeakValueDictionary[int, Packed] = WeakValueDictionary()

_LIBRARY = th.library.Library("textenvs", "DEF")
# Compilers see it as one operation, since they cannot look at oneDNN's own layout.
_LIBRARY.define("packed_linear(Tensor x, int key, int features) -> Tensor")


_LIBRARY.impl("packed_linear", lambda x, key, features: _PACKED[key].multiply(x), "CPU")
_LIBRARY.impl(
    "packed_linear", lambda x, key, features: x.new_empty(*x.shape[:-1], features), "Meta"
)


class PrepackedLinear:
    """Copies of linear layers that read the same, as one matrix product.

    Args:
        layers: `Linear`s, or `Conv1D`s of GPT-2.
        dtype: The precision to compute in.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: th.dtype) -> None:
        self.dtype = dtype
        self._layers = layers
        self._sizes = [len(_matrix(layer)) for layer in layers]
        self._input: th.Tensor | None = None
        self._outputs: dict[int, th.Tensor] = {}

    def refresh(self) -> None:
        """Copy the layers' weights."""
        raise NotImplementedError

    def product(self, x: th.Tensor) -> th.Tensor:
        """Return all layers' outputs, one behind the other."""
        raise NotImplementedError

    def output(self, part: int, x: th.Tensor) -> th.Tensor:
        """Return a layer's output; that of the others is kept until they ask for it."""
        if len(self._sizes) == 1:
            return self.product(x)
        if x is not self._input or part not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self.product(x).split(self._sizes, dim=-1)))
        output = self._outputs.pop(part)
        if not self._outputs:
            self._input = None
        return output

    def _weight(self) -> th.Tensor:
        """Return all layers' weights, to be read only: a single layer's is no copy."""
        weights = [_matrix(layer) for layer in self._layers]
        weight = weights[0] if len(weights) == 1 else th.cat(weights)
        return weight.to(self.dtype).contiguous()

    def _bias(self) -> th.Tensor | None:
        if not any(_has_bias(layer) for layer in self._layers):
            return None
        biases = [
            cast("th.Tensor", layer.bias).detach()
            if _has_bias(layer)
            else _matrix(layer).new_zeros(size)
            for layer, size in zip(self._layers, self._sizes, strict=True)
        ]
        return th.cat(biases).to(self.dtype)


class Packed(PrepackedLinear):
    """Linear layers in oneDNN's own layout, for a CPU."""

    def __init__(self, layers: Sequence[nn.Module], dtype: th.dtype) -> None:
        super().__init__(layers, dtype)
        self._key = next(_KEYS)
        _PACKED[self._key] = self

    def refresh(self) -> None:
        """Copy the layers' weights."""
        self.packed = th.ops.mkldnn._reorder_linear_weight(self._weight(), PACKED_FOR)
        self.packed_bias = self._bias()

    def product(self, x: th.Tensor) -> th.Tensor:
        """Return all layers' outputs, one behind the other."""
        x = x.to(self.dtype)
        if not th.compiler.is_compiling():
            return self.multiply(x)
        packed_linear = th.ops.textenvs.packed_linear.default
        return cast("th.Tensor", packed_linear(x, self._key, sum(self._sizes)))

    def multiply(self, x: th.Tensor) -> th.Tensor:
        """Return the product, for an `x` in the layout's precision."""
        linear = th.ops.mkldnn._linear_pointwise.default
        return cast("th.Tensor", linear(x, self.packed, self.packed_bias, "none", [], ""))


class Cast(PrepackedLinear):
    """Linear layers whose weights are converted once, and not at every step."""

    def __init__(self, layers: Sequence[nn.Module], dtype: th.dtype) -> None:
        super().__init__(layers, dtype)
        width = _matrix(layers[0]).shape[1]
        self._cast = _matrix(layers[0]).new_empty((sum(self._sizes), width), dtype=dtype)
        self._cast_bias = self._bias()

    def refresh(self) -> None:
        """Copy the layers' weights to where they were: a captured graph reads from there."""
        self._cast.copy_(self._weight())
        if self._cast_bias is not None:
            self._cast_bias.copy_(cast("th.Tensor", self._bias()))

    def product(self, x: th.Tensor) -> th.Tensor:
        """Return all layers' outputs, one behind the other."""
        return F.linear(x.to(self.dtype), self._cast, self._cast_bias)


class Part(nn.Module):
    """What stands in a twin where the model has a linear layer.

    Args:
        layer: The layer, whose parameters and hooks it shares.
        prepacked: What computes its output.
        part: Which of its outputs.
    """

    def __init__(self, layer: nn.Module, prepacked: PrepackedLinear, part: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._laid_out = prepacked
        self._part = part

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Return the layer's output."""
        return self._laid_out.output(self._part, x)


def _isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with code of its own, which is what compilers remember programs by."""

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    run.__code__ = run.__code__.replace(co_name=f"run_{next(_KEYS)}")
    return run


def _replayed(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return a captured program whose answers outlive its next run."""

    def run(*arguments: Any) -> Any:
        th.compiler.cudagraph_mark_step_begin()
        return tree_map(th.Tensor.clone, program(*arguments))

    return run


def _matrix(layer: nn.Module) -> th.Tensor:
    """Return a layer's weight, (out, in)."""
    weight = cast("th.Tensor", layer.weight).detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None


def layout(device: th.device, dtype: th.dtype) -> type[PrepackedLinear] | None:
    """Return the layout that is fastest, or None: the model's own."""
    if device.type != "cpu":
        return None if dtype == th.float32 else Cast
    if not (th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")):
        return None
    low = dtype == th.bfloat16 and th.ops.mkldnn._is_mkldnn_bf16_supported()
    return Packed if dtype == th.float32 or low else None


class Twin:
    """Makes a module that shares everything with another but its large linear layers.

    Args:
        layout: The layout of their copies. None: they are shared, too.
        dtype: The precision of their copies.
    """

    def __init__(self, layout: type[PrepackedLinear] | None, dtype: th.dtype) -> None:
        self._layout = layout
        self._dtype = dtype
        self.layers: list[PrepackedLinear] = []

    def of(self, module: nn.Module) -> nn.Module:
        """Return the twin of a module."""
        if self._layout is None:
            return module
        if type(module) in LINEAR:
            return self._parts([module])[0]
        twin = copy.copy(module)
        twin._modules = {}
        for names in SIBLINGS:
            together = [module._modules.get(name) for name in names]
            if all(type(layer) is nn.Linear for layer in together):
                parts = self._parts(cast("list[nn.Module]", together))
                twin._modules.update(zip(names, parts, strict=True))
        for name, part in module._modules.items():
            if name not in twin._modules:
                twin._modules[name] = None if part is None else self.of(part)
        return twin

    def _parts(self, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        layout = self._layout
        assert layout is not None
        weights = [_matrix(layer) for layer in layers]
        if layout is Packed and sum(map(th.Tensor.numel, weights)) < PACK_FROM:
            if len(layers) == 1 and weights[0].dtype == self._dtype:
                return layers
            layout = Cast
        self.layers.append(layout(layers, self._dtype))
        return [Part(layer, self.layers[-1], i) for i, layer in enumerate(layers)]


class Decoder:
    """Runs a model for rollouts, by a twin of it that is renewed when the weights have changed.

    Args:
        model: The model.
        autocast: The precision that the trunk computes in. None: the model's own.
        compiled: Whether `torch.compile` makes a program of each step, on a GPU a captured graph.
            Shapes are then few, and memory for the longest sequences is held throughout.
        positions: The most tokens of a sequence.
    """

    def __init__(
        self, model: PreTrainedModel, autocast: th.dtype | None, compiled: bool, positions: int
    ) -> None:
        self.weights_version = WeightsVersion(model)
        self.compiled = compiled
        self.prepacked = False  # whether the copies are what runs
        self._copied: object = None  # the version of the weights that they are of
        self._model = model
        self._autocast = autocast
        self._positions = positions
        self._made_for: tuple[th.device, th.dtype] | None = None
        self._layers: list[PrepackedLinear] = []
        self._own: Modules = (model.base_model, model.get_output_embeddings())
        self._twins: Modules = self._own
        self._trunk, self._head = self._own
        self._stores: dict[Hashable, Store] = {}
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def __reduce__(self) -> Any:
        """Give a copy of a model no decoder: it makes its own."""
        return type(None), ()

    def new_memo(self, rows: int, weights: object, purpose: Hashable = None) -> PrefixMemo:
        """Return an empty memo; programs go on with the memory that they were captured with.

        Args:
            rows: See `PrefixMemo`.
            weights: Likewise.
            purpose: Memos of different purposes share no memory.
        """
        if not self.compiled:
            return PrefixMemo(rows, weights)
        store = self._stores.setdefault((rows, purpose), Store())
        return PrefixMemo(rows, weights, store, self._positions, ALLOCATION_STEP)

    def prepack(self, version: object) -> None:
        """Run by copies of the weights, made now if those at hand are of another version."""
        if self._copied is None or self._copied != version:
            made_for = (self._model.device, self._model.dtype)
            if self._made_for != made_for:
                self._make_twins(*made_for)
            for layer in self._layers:
                layer.refresh()
            self._copied = version
        self._trunk, self._head = self._twins
        self.prepacked = True

    def use_original(self) -> None:
        """Run by the model itself."""
        self._trunk, self._head = self._own
        self.prepacked = False

    def forget(self) -> None:
        """Let the copies go, since the weights will change; programs keep theirs to renew."""
        self.prepacked, self._copied = False, None
        if not self.compiled:
            self._made_for, self._layers, self._twins = None, [], self._own
            self.use_original()

    def trunk(
        self, tokens: th.Tensor, positions: th.Tensor, mask: th.Tensor, cache: RowCache
    ) -> th.Tensor:
        """Return the last hidden states (n, q, hidden) of new tokens (n, q)."""
        inputs = (tokens, positions, mask, cache)
        if not cache.allocated:  # a program would have to make room itself
            hidden = self._run(*inputs)
            if self._captures:
                cache.stay()
            return hidden
        if tokens.shape[1] == 1:
            return cast("th.Tensor", self.program("step", self._run)(*inputs))
        return cast("th.Tensor", self.program("prefill", self._run, any_shape=True)(*inputs))

    def head(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self._head(hidden))

    def program(
        self, key: Hashable, function: Callable[..., Any], any_shape: bool = False
    ) -> Callable[..., Any]:
        """Return a function, compiled if this is wanted.

        Args:
            key: Names what is compiled. Whatever else it depends on than its arguments and the
                model belongs here.
            function: The function.
            any_shape: Whether each call comes in another shape, so that there is nothing to
                capture.
        """
        if not self.compiled:
            return function
        if key not in self._programs:
            options: dict[str, Any] = {}
            capture = self._captures and not any_shape
            if capture:
                options["triton.cudagraphs"] = True
            if hasattr(th.compiler, "skip_guard_on_all_nn_modules_unsafe"):
                # Modules stay what they are, and a new twin gets new programs. To ask each of
                # them at every step takes longer than what they compute.
                options["guard_filter_fn"] = th.compiler.skip_guard_on_all_nn_modules_unsafe
            program = th.compile(
                _isolated(function), dynamic=True if any_shape else None, options=options
            )
            self._programs[key] = _replayed(program) if capture else program
        return self._programs[key]

    @property
    def _captures(self) -> bool:
        """Whether programs are captured as graphs."""
        return self.compiled and self._model.device.type == "cuda"

    def _run(
        self, tokens: th.Tensor, positions: th.Tensor, mask: th.Tensor, cache: RowCache
    ) -> th.Tensor:
        with th.autocast(tokens.device.type, self._autocast, enabled=self._autocast is not None):
            output = self._trunk(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        return cast("th.Tensor", output.last_hidden_state).float()

    def _make_twins(self, device: th.device, own: th.dtype) -> None:
        trunk, head = (Twin(layout(device, d), d) for d in (self._autocast or own, own))
        self._twins = trunk.of(self._own[0]), head.of(self._own[1])
        self._made_for, self._layers = (device, own), trunk.layers + head.layers
        self._programs.clear()
