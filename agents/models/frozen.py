"""Copies of a model whose weights stay while its own are trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch as th

from agents.models.backbone import Backbone, Observation
from agents.models.layout import SequenceBatch
from agents.models.lora import Adapter


def frozen_copy(backbone: Backbone) -> Backbone:
    """Return a model as it is now, whose weights stay; with LoRA a copy of the adapter alone."""
    if backbone.adapter is not None:
        return AdapterReference(backbone)
    backbone.clear_cache()
    return copy.deepcopy(backbone).requires_grad_(False)


def renew(old: Backbone, backbone: Backbone) -> None:
    """Let a copy of a model be what that is now."""
    if isinstance(old, AdapterReference):
        old.renew()
    else:
        old.load_state_dict(backbone.state_dict())
    old.clear_cache()


class AdapterReference(Backbone):
    """A policy's model with its LoRA adapter as it was: no second model is kept.

    Args:
        backbone: The policy's model, which has an adapter.
    """

    CONFIG = "adapter"  # what a saved agent has in place of a model's config

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.hidden_size, self.num_logits = backbone.hidden_size, backbone.num_logits
        self.layout, self.capabilities = backbone.layout, backbone.capabilities
        self._actor = (backbone,)  # no submodule, whose weights would be saved again
        for name, value in self._adapter.weights().items():
            self.register_buffer(name.replace(".", "/"), value)

    def renew(self) -> None:
        """Take the adapter as it is now."""
        for name, value in self._adapter.weights().items():
            self.get_buffer(name.replace(".", "/")).copy_(value)

    @property
    def config(self) -> str:
        """What stands for it in a saved agent."""
        return self.CONFIG

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from."""
        with self._in_place():
            return self._actor[0].hidden_states(batch)

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state (rows, hidden) at each row's last token."""
        with self._in_place():
            return self._actor[0].last_hidden(observation)

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits (n, num_logits) of hidden states."""
        with self._in_place():
            return self._actor[0].logits(hidden)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model as it was."""
        with self._in_place():
            self._actor[0].save_pretrained(folder)

    @property
    def _adapter(self) -> Adapter:
        adapter = self._actor[0].adapter
        if adapter is None:
            raise RuntimeError("The policy's model has no adapter any more.")
        return adapter

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let the policy's model compute with the adapter that it had."""
        weights = {name.replace("/", "."): value for name, value in self.named_buffers()}
        with self._adapter.replaced(weights):
            yield
