"""LoRA: a small adapter is trained and the model's own weights stay as they are.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), by the package `peft`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    AdapterSpec = LoraConfig | dict[str, Any]
else:
    AdapterSpec = Any


class Adapter:
    """A LoRA adapter inside a model, whose layers it replaces in place.

    Args:
        model: The model; only the adapter's parameters are trainable from now on.
        spec: A `peft.LoraConfig`, or its arguments, e.g. `{"r": 16}`.

    Raises:
        ImportError: If `peft` is not installed.
        TypeError: If `spec` is neither.
    """

    def __init__(self, model: PreTrainedModel, spec: AdapterSpec) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError(
                'LoRA needs the package peft: install the extra, pip install "textenvs[lora]".'
            ) from error
        if isinstance(spec, dict):
            spec = LoraConfig(**{"task_type": "CAUSAL_LM", "lora_dropout": 0.0, **spec})
        if not isinstance(spec, LoraConfig):
            raise TypeError(
                "peft_config must be a peft.LoraConfig or a dict of its arguments, but it is a "
                f"{type(spec).__name__}."
            )
        self.config = copy.deepcopy(spec)
        self._peft_model = cast("PeftModel", get_peft_model(model, copy.deepcopy(spec)))
        self._peft_model.eval()
        self._enabled = True

    @property
    def enabled(self) -> bool:
        """Whether the model computes with it at present."""
        return self._enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model be what it is without the adapter."""
        self._enabled = False
        try:
            with self._peft_model.disable_adapter():
                yield
        finally:
            self._enabled = True

    def merged(self) -> PreTrainedModel:
        """Return a copy of the model with the adapter added to its weights."""
        return cast("PreTrainedModel", copy.deepcopy(self._peft_model).merge_and_unload())

    def fold(self) -> None:
        """Add the adapter to the model's weights and start with a new one that changes nothing."""
        from peft.tuners.lora import LoraLayer

        for layer in self._peft_model.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()
                # What is merged is now the model's own, not to be taken out again.
                layer.merged_adapters.clear()
                for name in layer.active_adapters:
                    layer.reset_lora_parameters(name, init_lora_weights=True)
