"""What backbones of `transformers`' models share: weights, an adapter, precision, checkpointing."""

from __future__ import annotations

import copy
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from agents.compat import has_own_code, is_quantised, kept_in_float32
from agents.decoding.step_decoder import StepDecoder
from agents.models.backbone import Backbone
from agents.models.checkpointing import checkpoint_layers, recomputing
from agents.models.loading import ModelSpec, freeze_positions, load_model
from agents.models.lora import Adapter, AdapterSpec, adapter_folder


class HuggingFaceBackbone(Backbone):
    """A model of `transformers`, with or without an adapter, in float32.

    It is made in three steps: this, what kinds of models need and are tried for, `finish`.

    Args:
        model: A name or path, or a config, whose model is initialised at random. An adapter that
            `peft` has saved is trained on.
        adapter: A LoRA adapter to train instead of the weights; see `agents.models.lora`.
        init_kwargs: Further arguments of `from_pretrained`.

    Attributes:
        model: The model.
        autocast: The lower precision that it computes in; see `CausalBackbone`.
        compiled: Whether rollouts run compiled programs.

    Raises:
        ValueError: If the model cannot be loaded, or it is an adapter and another one is to be
            trained, or its weights are quantised and no adapter is.
    """

    def __init__(
        self,
        model: ModelSpec,
        adapter: AdapterSpec | None = None,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        saved = adapter_folder(model) if isinstance(model, (str, Path)) else None
        if saved is not None and adapter is not None:
            raise ValueError(
                f"{str(model)!r} is an adapter, which is trained on: leave peft_config out, or "
                "merge it into its model (policy.save_pretrained(..., merge=True)) and give that."
            )
        source = model if saved is None else saved[1]
        self.model = load_model(source, init_kwargs)
        self.model.eval()
        if is_quantised(self.model) and saved is None and adapter is None:
            raise ValueError(
                "Weights that are quantised cannot be trained: train an adapter beside them "
                "(peft_config={'r': 16}), or load them as they were."
            )
        self.adapter = None
        self._name = None if isinstance(source, PretrainedConfig) else _absolute(source)
        if saved is not None or adapter is not None:
            spec = cast("AdapterSpec", adapter) if saved is None else saved[0]
            self.adapter = Adapter(self.model, spec, self._name)
        # What is tried is the model in float32.
        self.autocast: th.dtype | None = None
        self._checkpointed: list[nn.Module] = []
        self._decoder: StepDecoder[Any] | None = None
        self.compiled = False

    def finish(
        self, autocast: th.dtype | None, gradient_checkpointing: bool, compiled: bool
    ) -> None:
        """Let the model compute as it is wanted, and warn if its steps cannot be compiled."""
        self.autocast, self._decoder = autocast, None
        self.compiled = compiled and self.capabilities.compiles is None
        if compiled and not self.compiled:
            warnings.warn(
                f"The steps of {type(self.model).__name__} are not compiled: "
                f"{self.capabilities.compiles}. They run as they are.",
                stacklevel=3,
            )
        if gradient_checkpointing:
            self._checkpointed = checkpoint_layers(self.model)

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def made_of(self) -> PretrainedConfig | str:
        """The config, or the name of a model whose code came with it."""
        return self._name if self._name and has_own_code(self.config) else self.config

    @property
    def decodes(self) -> bool:
        """Whether a decoder runs now; what it remembers is of the model with its own adapter."""
        return self.capabilities.caches is None and (self.adapter is None or self.adapter.in_place)

    @property
    @abstractmethod
    def decoder(self) -> StepDecoder[Any]:
        """What rollouts run the model by; it is kept as `_decoder`."""

    def next_logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states, by what rollouts run the head by."""
        return self.decoder.head(hidden) if self.decodes else self.logits(hidden)

    def program(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of hidden states as rollouts run it, compiled if that is wanted."""
        return self.decoder.program(key, function) if self.decodes else function

    def start_rollout(self, steps: int) -> None:
        """Drop what is remembered, and prepare for a rollout of so many steps."""
        self.decoder.start_rollout(steps)

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        self.decoder.keep_rows(rows)

    def clear_cache(self) -> None:
        """Let all memory of rollouts go but that of compiled programs."""
        if self._decoder is not None:
            self._decoder.clear()

    def save_pretrained(self, folder: Path) -> None:
        """Write the model; of one that can be loaded from elsewhere, its adapter alone."""
        if self.adapter is not None and self.adapter.base is not None:
            self.adapter.save_pretrained(folder)
        else:
            self.save_merged(folder)

    def save_merged(self, folder: Path) -> None:
        """Write the whole model, an adapter added, in its checkpoint's precision."""
        if is_quantised(self.model):
            raise ValueError(
                "An adapter is not merged into weights that are quantised, which would round it: "
                "save it as it is, and merge it into the model as it was before "
                "(peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload())."
            )
        model = self.model if self.adapter is None else self.adapter.merged()
        rounded(model, model.config.dtype).save_pretrained(folder)

    def merge_adapter(self) -> None:
        """Add the adapter, if there is one, to the weights, which are all trained from now on."""
        if self.adapter is not None:
            self.model, self.adapter, self._decoder = self.adapter.merge(), None, None
            self.model.requires_grad_(True)
            freeze_positions(self.model)

    def _autocasting(self, device: th.device) -> AbstractContextManager[Any]:
        return th.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def _recomputing(self) -> AbstractContextManager[None]:
        return recomputing(self._checkpointed, th.is_grad_enabled())


def rounded(model: PreTrainedModel, dtype: th.dtype | str | None) -> PreTrainedModel:
    """Return a model in a checkpoint's precision: itself, or a copy in half the bits."""
    if not isinstance(dtype, th.dtype) or dtype not in (th.bfloat16, th.float16):
        return model
    model = copy.deepcopy(model)
    kept = "|".join(re.escape(name) for name in kept_in_float32(model, dtype))
    whole = re.compile(rf"(^|\.)({kept})(\.|$)")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and not (kept and whole.search(name)):
            tensor.data = tensor.data.to(dtype)
    return model


def _absolute(model: str | Path) -> str:
    """Return a name, or a path that is the same from everywhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)
