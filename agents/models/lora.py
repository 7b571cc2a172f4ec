"""LoRA: a small adapter is trained and the model's own weights stay as they are.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), by the package `peft`.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch as th
from torch import nn

from agents.compat import adapter_config_file, trunk_of
from agents.decoding.layer_masks import keeps_states
from agents.decoding.prepacked import LINEAR

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    AdapterSpec = LoraConfig | dict[str, Any]
else:
    AdapterSpec = Any

# What peft takes where nothing is said.
PEFT_RANK, PEFT_ALPHA = 8, 8
# Linear layers of recurrent ones whose weights are read past the layer, so that an adapter of
# theirs would do nothing.
STATE_LAYERS = ("out_proj", "dt_proj", "conv1d")


class Adapter:
    """A LoRA adapter inside a model, whose layers it replaces in place.

    Args:
        model: The model; only the adapter's parameters are trainable from now on.
        spec: A `peft.LoraConfig`, or its arguments, e.g. `{"r": 16}`; or the folder of an adapter
            that `peft` has saved, which is trained on. Without `target_modules` these are `peft`'s
            for the kind of model, or all linear layers but the head, see `linear_layers`.
        base: The name or path that the model was loaded from. None: it was not.

    Attributes:
        config: The adapter's `peft.LoraConfig`.
        base: See above.

    Raises:
        ImportError: If `peft` is not installed.
        TypeError: If `spec` is none of these.
        ValueError: If a folder holds an adapter of another kind.
    """

    def __init__(
        self, model: PreTrainedModel, spec: AdapterSpec | Path, base: str | None = None
    ) -> None:
        try:
            from peft import LoraConfig, PeftModel, get_peft_model
            from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
        except ImportError as error:
            raise ImportError(
                'LoRA needs the package peft: install the extra, pip install "textenvs[lora]".'
            ) from error
        self.base = base
        if base is not None:  # what peft writes into the folder of an adapter
            model.config.name_or_path = base
        if isinstance(spec, Path):
            self._peft_model = PeftModel.from_pretrained(
                model, str(spec), is_trainable=True, autocast_adapter_dtype=True
            )
            (config,) = self._peft_model.peft_config.values()
            if not isinstance(config, LoraConfig):
                raise ValueError(
                    f"{spec} holds an adapter of the kind {config.peft_type}, and only LoRA is "
                    "supported: merge it into the model and save that."
                )
            self.config: LoraConfig = copy.deepcopy(config)
        else:
            if isinstance(spec, dict):
                kind = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
                spec = LoraConfig(**{"task_type": kind, "lora_dropout": 0.0, **spec})
            if not isinstance(spec, LoraConfig):
                raise TypeError(
                    "peft_config must be a peft.LoraConfig or a dict of its arguments, but it is a "
                    f"{type(spec).__name__}."
                )
            self.config = copy.deepcopy(spec)
            own = copy.deepcopy(spec)
            own.base_model_name_or_path = None  # peft takes the model's
            if own.target_modules is None and not own.target_parameters:
                kind = model.config.model_type
                own.target_modules = list(TARGETS.get(kind, ())) or linear_layers(model)
            self._peft_model = cast("PeftModel", get_peft_model(model, own))
        self._peft_model.eval()
        self._in_place = True

    @property
    def in_place(self) -> bool:
        """Whether the model computes with its own adapter at present."""
        return self._in_place

    def weights(self) -> dict[str, th.Tensor]:
        """Return a copy of all that is trained."""
        return {name: p.detach().clone() for name, p in self._trained().items()}

    @contextmanager
    def replaced(self, weights: dict[str, th.Tensor]) -> Iterator[None]:
        """Let the model compute with what `weights` gave earlier; its own come back at the end."""
        trained = self._trained()
        own = {name: parameter.data for name, parameter in trained.items()}
        self._in_place = False
        try:
            for name, parameter in trained.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = own[name]
            self._in_place = True

    def merged(self) -> PreTrainedModel:
        """Return a copy of the model with the adapter added to its weights."""
        return _merged(copy.deepcopy(self._peft_model))

    def merge(self) -> PreTrainedModel:
        """Add the adapter to the model's weights for good, and return the model."""
        return _merged(self._peft_model)

    def save_pretrained(self, folder: Path) -> None:
        """Write the adapter alone, as `peft` does."""
        self._peft_model.save_pretrained(str(folder), save_embedding_layers=False)

    def _trained(self) -> dict[str, th.nn.Parameter]:
        return {n: p for n, p in self._peft_model.named_parameters() if p.requires_grad}


def _merged(peft_model: PeftModel) -> PreTrainedModel:
    """Return a model with its adapter added to its weights, and its config as it was."""
    model = cast("PreTrainedModel", peft_model.get_base_model())
    layers = model.get_input_embeddings(), cast("Any", model.get_output_embeddings())
    if _shares_embeddings(model) and any(hasattr(layer, "base_layer") for layer in layers):
        # What is added to one of them is not the other's.
        head = getattr(layers[1], "base_layer", layers[1])
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    tied, shared = model.config.tie_word_embeddings, _shares_embeddings(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = cast("PreTrainedModel", peft_model.merge_and_unload())
    if _shares_embeddings(merged) == shared:
        # It is taken to be untied where the head shares something else (T5Gemma).
        merged.config.tie_word_embeddings = tied
    return merged


def _shares_embeddings(model: PreTrainedModel) -> bool:
    """Return whether a model's head has the weights of its input embeddings."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(layer, "weight", None) for layer in layers)
    return first is last


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's linear layers, its head left out, that an adapter works in.

    What is derived from a linear layer, such as a router, may return something else.
    """
    halves = (cast("nn.Module", part) for part in (model.get_encoder(), model.get_decoder()))
    trunks = halves if model.config.is_encoder_decoder else (trunk_of(model),)
    left_out: tuple[str, ...] = ()
    if keeps_states(model.config.get_text_config()):
        left_out = STATE_LAYERS
    inside = {id(module) for trunk in trunks for module in trunk.modules()}
    return [
        name
        for name, module in model.named_modules()
        if type(module) in LINEAR and id(module) in inside and not name.endswith(left_out)
    ]


def strength(model: Any, spec: AdapterSpec | None) -> float:
    """Return how much a step of an adapter's does, in steps of one with `peft`'s own `lora_alpha`.

    Args:
        model: A name or path, where an adapter may be that is trained on.
        spec: What makes a new one; see `Adapter`. None: there is one at `model`.
    """
    found = adapter_folder(model) if spec is None else None
    if found is not None:
        file = found[0] / "adapter_config.json"
        spec = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
    settings = spec if isinstance(spec, dict) else getattr(spec, "__dict__", {})
    alpha, rank = settings.get("lora_alpha", PEFT_ALPHA), settings.get("r", PEFT_RANK)
    if not all(isinstance(number, (int, float)) and number > 0 for number in (alpha, rank)):
        return 1.0  # It is refused elsewhere.
    return float(alpha / PEFT_ALPHA * (math.sqrt(rank) if settings.get("use_rslora") else 1))


def adapter_folder(model: str | Path) -> tuple[Path, str] | None:
    """Return the folder of an adapter and the name of its model, if `peft` saved one there.

    Args:
        model: A name or path.

    Raises:
        ValueError: If it does not say which model it belongs to.
    """
    file = adapter_config_file(str(model))
    if file is None:
        return None
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{str(model)!r} holds an adapter that does not say of which model: expected "
            "a base_model_name_or_path in its adapter_config.json."
        )
    return Path(file).parent, str(base)
