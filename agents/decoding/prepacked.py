"""Linear layers with their weights as a decode step reads them fastest.

A decode step reads every weight for a handful of tokens, so how the weights lie in memory is what
it costs. On a CPU they are copied into the layout that oneDNN multiplies fastest, under autocast
into the lower precision, so that they are not converted at every step. Layers that read the same
input are one product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import cast
from weakref import WeakValueDictionary

import torch as th
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from agents.compat import (
    children_of,
    onednn_linear,
    onednn_multiplies,
    onednn_prepack,
    with_children,
)

# Rows that oneDNN's layout is made for; it serves any other number, too.
PREPACKED_ROWS = 256
# Weights of fewer numbers gain less by oneDNN's layout than a call of it costs.
PREPACK_FROM = 2**17

LINEAR = (nn.Linear, Conv1D)
# Layers of a module that read the same input, by the names that most models give them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
# Where queries read something else than keys and values: of them a step needs the queries alone.
CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "cross_attn"}

_KEYS = count()
_PREPACKED: WeakValueDictionary[int, OneDNNProduct] = WeakValueDictionary()

_LIBRARY = th.library.Library("textenvs", "DEF")
# Compilers see it as one operation, since they cannot look at oneDNN's own layout.
_LIBRARY.define("prepacked_linear(Tensor x, int key, int features) -> Tensor")
_LIBRARY.impl("prepacked_linear", lambda x, key, features: _PREPACKED[key].multiply(x), "CPU")
_LIBRARY.impl(
    "prepacked_linear", lambda x, key, features: x.new_empty(*x.shape[:-1], features), "Meta"
)


class Product(ABC):
    """Copies of linear layers that read the same input, as one matrix product.

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

    @abstractmethod
    def refresh(self) -> None:
        """Copy the layers' weights."""

    @abstractmethod
    def product(self, x: th.Tensor) -> th.Tensor:
        """Return all layers' outputs, one behind the other."""

    def output(self, layer: int, x: th.Tensor) -> th.Tensor:
        """Return a layer's output; that of the others is kept until they ask for it."""
        if len(self._sizes) == 1:
            return self.product(x)
        if x is not self._input or layer not in self._outputs:
            self._input = x
            self._outputs = dict(enumerate(self.product(x).split(self._sizes, dim=-1)))
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._input = None
        return output

    def _weight(self) -> th.Tensor:
        """Return all layers' weights, to be read only: a single layer's is no copy."""
        weights = [_matrix(layer) for layer in self._layers]
        weight = weights[0] if len(weights) == 1 else th.cat(weights)
        return weight.to(self.dtype).contiguous()

    def _bias(self) -> th.Tensor | None:
        if all(layer.bias is None for layer in self._layers):
            return None
        biases = [
            _matrix(layer).new_zeros(size)
            if layer.bias is None
            else cast("th.Tensor", layer.bias).detach()
            for layer, size in zip(self._layers, self._sizes, strict=True)
        ]
        return th.cat(biases).to(self.dtype)


class OneDNNProduct(Product):
    """Linear layers in oneDNN's own layout, for a CPU."""

    def __init__(self, layers: Sequence[nn.Module], dtype: th.dtype) -> None:
        super().__init__(layers, dtype)
        self._key = next(_KEYS)
        _PREPACKED[self._key] = self

    def refresh(self) -> None:
        """Copy the layers' weights."""
        self._prepacked = onednn_prepack(self._weight(), PREPACKED_ROWS)
        self._prepacked_bias = self._bias()

    def product(self, x: th.Tensor) -> th.Tensor:
        """Return all layers' outputs, one behind the other."""
        x = x.to(self.dtype)
        if not th.compiler.is_compiling():
            return self.multiply(x)
        prepacked_linear = th.ops.textenvs.prepacked_linear.default
        return cast("th.Tensor", prepacked_linear(x, self._key, sum(self._sizes)))

    def multiply(self, x: th.Tensor) -> th.Tensor:
        """Return the product, for an `x` in the precision of the weights."""
        return onednn_linear(x, self._prepacked, self._prepacked_bias)


class CastProduct(Product):
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


class PrepackedLinear(nn.Module):
    """What stands in a decode model where the model has a linear layer.

    Args:
        layer: The layer, whose parameters and hooks it shares.
        product: What computes its output.
        number: Which of the product's layers it is.
    """

    def __init__(self, layer: nn.Module, product: Product, number: int) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._product = product
        self._number = number

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Return the layer's output."""
        return self._product.output(self._number, x)


class DecodeModel:
    """Makes modules that share everything with others but their large linear layers.

    Args:
        product: What multiplies by their copies. None: they are shared, too.
        dtype: The precision of their copies.

    Attributes:
        products: What has been made, to be refreshed before it is used.
    """

    def __init__(self, product: type[Product] | None, dtype: th.dtype) -> None:
        self._product = product
        self._dtype = dtype
        self.products: list[Product] = []

    def of(self, module: nn.Module, name: str = "") -> nn.Module:
        """Return a module that computes the same, of one that has this name in its parent."""
        if self._product is None:
            return module
        if type(module) in LINEAR:
            return self._linear([module])[0]
        children: dict[str, nn.Module | None] = {}
        for names in SIBLINGS if name not in CROSS_ATTENTION else ():
            siblings = [getattr(module, name, None) for name in names]
            if all(type(layer) is nn.Linear for layer in siblings):
                layers = self._linear(cast("list[nn.Module]", siblings))
                children.update(zip(names, layers, strict=True))
        for own, child in children_of(module).items():
            if own not in children:
                children[own] = None if child is None else self.of(child, own)
        return with_children(module, children)

    def _linear(self, layers: Sequence[nn.Module]) -> Sequence[nn.Module]:
        product = self._product
        assert product is not None
        weights = [_matrix(layer) for layer in layers]
        if product is OneDNNProduct and sum(map(th.Tensor.numel, weights)) < PREPACK_FROM:
            if len(layers) == 1 and weights[0].dtype == self._dtype:
                return layers
            product = CastProduct
        self.products.append(product(layers, self._dtype))
        return [PrepackedLinear(layer, self.products[-1], i) for i, layer in enumerate(layers)]


def fastest_product(device: th.device, dtype: th.dtype) -> type[Product] | None:
    """Return what multiplies fastest by prepacked weights, or None: the model's own layers do."""
    if device.type != "cpu":
        return None if dtype == th.float32 else CastProduct
    return OneDNNProduct if onednn_multiplies(dtype) else None


def _matrix(layer: nn.Module) -> th.Tensor:
    """Return a layer's weight, (out, in)."""
    weight = cast("th.Tensor", layer.weight).detach()
    return weight.t() if isinstance(layer, Conv1D) else weight
