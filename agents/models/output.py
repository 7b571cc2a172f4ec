"""What makes logits of a model's last hidden states, whatever it does behind its output layer."""

from __future__ import annotations

from typing import Any, cast

import torch as th
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from agents.compat import children_of, with_children


class WholeHead(nn.Module):
    """A model's own forward behind its trunk: the output layer, scales, biases, soft-caps.

    Args:
        model: The model, with which it shares everything.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        children = children_of(model)
        # Some encoder-decoders have no trunk as such, but its halves.
        halves = ("encoder", "decoder")
        trunk = [model.base_model_prefix] if model.base_model_prefix in children else halves
        self._decodes = bool(model.config.is_encoder_decoder)
        config = cast("Any", model.get_decoder()).config if self._decodes else model.config
        self.model = with_children(model, {**children, **{name: _Given(config) for name in trunk}})

    def forward(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits (n, vocabulary) of hidden states (n, hidden)."""
        inputs: dict[str, Any] = {"inputs_embeds": hidden[None]}
        if self._decodes:
            encoded = _HiddenAlone(last_hidden_state=cast("Any", hidden[None, :1]))
            inputs = {"decoder_inputs_embeds": hidden[None], "encoder_outputs": encoded}
        return cast("th.Tensor", self.model(**inputs, use_cache=False).logits[0])


class _Given(nn.Module):
    """Stands where the trunk was: its last hidden states are what it is given.

    Args:
        config: What a model may look up there.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def get_decoder(self) -> nn.Module:
        """Return what stands for the decoder, too."""
        return self

    def forward(
        self,
        *args: Any,
        inputs_embeds: th.Tensor | None = None,
        decoder_inputs_embeds: th.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Return the hidden states."""
        if decoder_inputs_embeds is not None:
            inputs_embeds = decoder_inputs_embeds
        return _HiddenAlone(last_hidden_state=cast("Any", inputs_embeds))


class _HiddenAlone(BaseModelOutput):
    """Last hidden states; whatever else a model asks for, there is none."""

    def __getattr__(self, name: str) -> None:
        return None
