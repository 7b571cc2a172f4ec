"""A trunk and a head by copies of their weights, which multiply faster; see `prepacked`."""

from __future__ import annotations

from collections.abc import Callable

import torch as th
from torch import nn
from transformers import PreTrainedModel

from agents.decoding.prepacked import DecodeModel, Product, fastest_product

# To prepack the weights costs about as much as so many steps save.
PREPACK_AFTER = 4

Modules = tuple[nn.Module, nn.Module]  # trunk and head


class Copies:
    """Makes modules that compute what a model's own do, up to rounding.

    Args:
        model: The model, which says where its weights are and of what precision.
        own: Its trunk and its head.
        autocast: The precision that the trunk computes in. None: the model's own.
        when_made: Called when the modules are others than before.

    Attributes:
        products: What multiplies by the copies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        own: Modules,
        autocast: th.dtype | None = None,
        when_made: Callable[[], None] = lambda: None,
    ) -> None:
        self.products: list[Product] = []
        self._model = model
        self._own = own
        self._autocast = autocast
        self._when_made = when_made
        self._made: Modules | None = None
        self._made_for: tuple[th.device, th.dtype] | None = None
        self._version: object = None  # of the weights that the copies are of

    def of(self, version: object) -> Modules:
        """Return trunk and head; weights are copied if those at hand are of another version."""
        if self._version is None or self._version != version:
            made_for = (self._model.device, self._model.dtype)
            if self._made_for != made_for:
                self._make(*made_for)
            for product in self.products:
                product.refresh()
            self._version = version
        assert self._made is not None
        return self._made

    def let_go(self, memory: bool = True) -> None:
        """Copy the weights anew before they are used again, and let the memory go if it may."""
        self._version = None
        if memory:
            self._made, self._made_for, self.products = None, None, []

    def _make(self, device: th.device, own: th.dtype) -> None:
        trunk, head = (
            DecodeModel(fastest_product(device, dtype), dtype)
            for dtype in (self._autocast or own, own)
        )
        self._made = trunk.of(self._own[0]), head.of(self._own[1])
        self._made_for, self.products = (device, own), trunk.products + head.products
        self._when_made()
