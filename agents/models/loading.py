"""How a language model is made: by name, from a folder, or from a config; and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch as th
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from agents.compat import fixed_positions, keep_gradients
from agents.models.lora import adapter_folder
from textenvs.text.loading import model_is_seq2seq, why_not_loaded

ModelSpec = str | Path | PretrainedConfig
# What is trained: weights that were drawn at random, somebody's, or an adapter beside them.
ModelKind = Literal["new", "pretrained", "adapter"]

# Rotary embeddings whose frequencies, for all rows, follow the longest one beyond their original
# length.
LENGTH_DEPENDENT = ("dynamic", "longrope")


TINY_WIDTH = 128

# Arguments of `from_pretrained` that are given otherwise here, and those that find its files.
ELSEWHERE = {
    "dtype": "weights are trained in float32; autocast='bfloat16' computes in less",
    "torch_dtype": "weights are trained in float32; autocast='bfloat16' computes in less",
    "device_map": "device=... says where a model is",
    "config": "give the config as model=..., or save the model with it",
}
OF_CONFIGS = (
    *("revision", "code_revision", "trust_remote_code", "token", "cache_dir", "force_download"),
    *("local_files_only", "proxies", "subfolder"),
)


def tiny_config(vocab_size: int, max_positions: int) -> LlamaConfig:
    """Return the embedded default: a Llama of about one million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=TINY_WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        # As wide as a small model wants it: with 0.02, made for large ones, learning starts late.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
    )


def model_kind(model: Any, peft_config: Any = None) -> ModelKind:
    """Return what is trained of a model, as `TransformerPolicy` takes both arguments."""
    named = isinstance(model, (str, Path)) and model != "tiny"
    if peft_config is not None or (named and adapter_folder(model) is not None):
        return "adapter"
    return "pretrained" if named else "new"


def load_model(model: ModelSpec, init_kwargs: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a language model in float32, causal or an encoder-decoder.

    Its config's dtype stays that of the checkpoint, in which it is to be saved.

    Args:
        model: A name or path that `AutoModelForCausalLM.from_pretrained` resolves, or a config,
            whose model is initialised at random.
        init_kwargs: Further arguments of `from_pretrained`, such as `revision`.

    Raises:
        TypeError: If it is something else.
        ValueError: If it cannot be loaded, with the cause, or is no causal language model, or the
            arguments have what is given elsewhere.
    """
    init_kwargs = dict(init_kwargs or {})
    for name, elsewhere in ELSEWHERE.items():
        if name in init_kwargs:
            raise ValueError(f"model_init_kwargs must not have {name}: {elsewhere}.")
    if isinstance(model, PretrainedConfig):
        dtype = model.dtype
        loaded: Any = _loader(model).from_config(model, dtype=th.float32)
        loaded.config.dtype = dtype
    elif isinstance(model, (str, Path)):
        loaded = _from_pretrained(str(model), init_kwargs)
    else:
        raise TypeError(
            "model must be 'tiny', a name, a path or a config, "
            f"but it is a {type(model).__name__}. A model itself would be pickled into every "
            "checkpoint: save it with save_pretrained and pass the folder."
        )
    freeze_positions(loaded)
    # A padding_idx would keep a token's embedding as it is, and many models pad with EOS, or with
    # what their decoder starts with. Padding itself is read by nobody here and learns nothing.
    halves = (loaded.get_encoder(), loaded.get_decoder()) if is_seq2seq(loaded.config) else ()
    for half in (loaded, *halves):
        half.get_input_embeddings().padding_idx = None
    return cast("PreTrainedModel", loaded)


def freeze_positions(model: PreTrainedModel) -> None:
    """Let a model's tables of sines be what they are, where it has some."""
    for parameter in fixed_positions(model):
        parameter.requires_grad_(False)


def _from_pretrained(name: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    # Code that comes with a model is not run, nor asked about, unless somebody wants that.
    options = {"trust_remote_code": False, **init_kwargs}
    try:
        config = AutoConfig.from_pretrained(name, **_of_configs(options))
        if options.get("quantization_config") or getattr(config, "quantization_config", None):
            options["device_map"] = {"": "cpu"}  # where all models are made
        both: Any = _loader(config).from_pretrained(
            name, dtype=th.float32, output_loading_info=True, **options
        )
    except ImportError:  # which says what to install
        raise
    except Exception as error:  # of files there are as many as there are ways to damage them
        raise ValueError(
            f"No language model could be loaded from {name!r}: {why_not_loaded(name, error)}"
            f"{_trust(error)} Expected 'tiny', a folder written by save_pretrained, or a hub id."
        ) from error
    loaded, info = both
    loaded.config.dtype = config.dtype
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name!r} lacks weights of {type(loaded).__name__}, which would be drawn at random: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Expected a whole "
            "language model, as AutoModelForCausalLM or AutoModelForSeq2SeqLM saves it."
        )
    keep_gradients(loaded)
    # safetensors maps tensors at unaligned offsets, and rounding depends on the alignment: clone
    # them, so that a resumed run, whose weights have memory of their own, rounds alike.
    for tensor in chain(loaded.parameters(), loaded.buffers()):
        if tensor.is_floating_point():  # and not quantised
            tensor.data = tensor.data.clone()
    return cast("PreTrainedModel", loaded)


def is_seq2seq(model: ModelSpec, init_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether a name, path or config is that of an encoder-decoder.

    Args:
        model: See `load_model`.
        init_kwargs: Likewise.
    """
    if isinstance(model, PretrainedConfig):
        return bool(model.is_encoder_decoder)
    if str(model) in ("tiny", "copy"):
        return False
    saved = adapter_folder(model)
    name = str(model) if saved is None else saved[1]
    return model_is_seq2seq(name, _of_configs(init_kwargs or {}))


def _of_configs(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments of `from_pretrained` that a config is found by."""
    return {name: given for name, given in init_kwargs.items() if name in OF_CONFIGS}


def _loader(config: PretrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _trust(error: BaseException) -> str:
    """Return how to run code that comes with a model, if that was asked for, as a sentence."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        " If you trust it, model_init_kwargs={'trust_remote_code': True} runs it, or "
        "--trust-remote-code on the command line."
    )


def longest_sequence(config: PretrainedConfig) -> tuple[float, str]:
    """Return how many tokens a model can read, and what they are limited by."""
    limits: list[tuple[float, str]] = [(math.inf, "nothing")]
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each of their types.
    for part in [part for part in rope.values() if isinstance(part, dict)] or [rope]:
        kind = part.get("rope_type", "default")
        if kind in LENGTH_DEPENDENT:
            original = part.get("original_max_position_embeddings") or positions or math.inf
            if kind == "dynamic":
                original = positions or original
            limits.append(
                (
                    original,
                    f"beyond {original} tokens its rotary embedding ({kind!r}) depends on the "
                    "longest row of a batch, so that what is cached for the others would be wrong",
                )
            )
    if positions is not None and positions > 0:
        limits.append((positions, f"the model has only {positions} positions"))
    return min(limits, key=lambda limit: limit[0])


def check_sizes(
    model: PreTrainedModel, vocab_size: int, max_tokens: int, eos_token_id: int | None
) -> None:
    """Check that a model can end a turn, and read sequences of some length.

    A tokenizer may have some tokens that the model lacks, such as an added padding token: they
    cannot be emitted, and must not be read.

    Raises:
        ValueError: If its vocabulary or its positions are too small.
    """
    rows = rows_of(model)
    if eos_token_id is not None and eos_token_id >= rows:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model's vocabulary only {rows}, and "
            f"the token {eos_token_id} that ends a turn is not one of them: use the model's own "
            "tokenizer (gym.make(..., tokenizer=...)), or a model of that size "
            "(model.resize_token_embeddings)."
        )
    most, reason = longest_sequence(model.config.get_text_config())
    if max_tokens > most:
        raise ValueError(
            f"Prompt and response budgets add up to {max_tokens} tokens, but {reason}: lower "
            "max_prompt_tokens or max_new_tokens."
        )


def rows_of(model: PreTrainedModel) -> int:
    """Return how many tokens a model has, to read and to emit."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return min(int(cast("Any", layer).weight.shape[0]) for layer in layers)


def check_device(device: th.device | str, name: str = "device") -> None:
    """Refuse a device that is not there; SB3 takes the CPU instead and says nothing.

    Args:
        device: "auto", or what `torch.device` takes.
        name: What a message calls it.

    Raises:
        ValueError: If there is no such device, or no such kind of device.
    """
    try:
        wanted = th.device("cpu" if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(
            f"{name} must be auto, cpu, cuda, ..., but it is {str(device)!r}."
        ) from error
    if wanted.type == "cpu":
        return
    kind = th.accelerator.current_accelerator() if th.accelerator.is_available() else None
    there = th.accelerator.device_count() if kind is not None and kind.type == wanted.type else 0
    if (wanted.index or 0) >= there:
        have = ["auto", "cpu"] if kind is None else ["auto", "cpu", kind.type]
        count = f" ({there} of its kind are there)" if there else ""
        raise ValueError(
            f"{name} is {str(device)!r}, but torch sees no such device here{count}: choose one of "
            f"{', '.join(have)}, or install a build of torch that has it."
        )
