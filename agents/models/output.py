"""What makes logits of a model's last hidden states, whatever it does behind its output layer."""

from __future__ import annotations

from typing import Any, cast

import torch as th
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from agents.compat import children_of, with_children


class WholeHead(nn.Module):
    """A causal model's own forward behind its trunk: the output layer, scales, soft-caps.

    Args:
        model: The model, with which it shares everything.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        trunk = {model.base_model_prefix: _Given()}
        self.model = with_children(model, {**children_of(model), **trunk})

    def forward(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits (n, vocabulary) of hidden states (n, hidden)."""
        return cast("th.Tensor", self.model(inputs_embeds=hidden[None]).logits[0])


class _Given(nn.Module):
    """Stands where the trunk was: its last hidden states are what it is given."""

    def forward(
        self, *args: Any, inputs_embeds: th.Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Return the hidden states."""
        return BaseModelOutputWithPast(last_hidden_state=cast("Any", inputs_embeds))
