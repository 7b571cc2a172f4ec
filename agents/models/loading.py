"""How a language model is made: by name, from a folder, or from a config; and whether it fits."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch as th
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

ModelSpec = str | Path | PretrainedConfig
# What is trained: weights that were drawn at random, somebody's, or an adapter beside them.
ModelKind = Literal["new", "pretrained", "adapter"]


def tiny_config(vocab_size: int, max_positions: int) -> LlamaConfig:
    """Return the embedded default: a Llama of about one million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
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
    if peft_config is not None:
        return "adapter"
    return "pretrained" if isinstance(model, (str, Path)) and model != "tiny" else "new"


def load_model(model: ModelSpec) -> PreTrainedModel:
    """Return a causal language model in float32.

    Args:
        model: A name or path that `AutoModelForCausalLM.from_pretrained` resolves, or a config,
            whose model is initialised at random.

    Raises:
        TypeError: If it is something else.
        ValueError: If it cannot be loaded.
    """
    if isinstance(model, PretrainedConfig):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(model, dtype=th.float32))
    if not isinstance(model, (str, Path)):
        raise TypeError(
            "model must be 'tiny', a name, a path or a config, "
            f"but it is a {type(model).__name__}. A model itself would be pickled into every "
            "checkpoint: save it with save_pretrained and pass the folder."
        )
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=th.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No causal language model could be loaded from {str(model)!r}. Expected 'tiny', a "
            "folder written by save_pretrained, or a hub id (needs a connection or a cached copy)."
        ) from error
    # safetensors maps tensors at unaligned offsets, and rounding depends on the alignment: clone
    # them, so that a resumed run, whose weights have memory of their own, rounds alike.
    for tensor in chain(loaded.parameters(), loaded.buffers()):
        tensor.data = tensor.data.clone()
    return loaded


def check_sizes(model: PreTrainedModel, vocab_size: int, max_tokens: int) -> None:
    """Check that a model can read all tokens of a tokenizer, and sequences of some length.

    Raises:
        ValueError: If its vocabulary, its positions or its window are too small.
    """
    config = model.config.get_text_config()
    embeddings = cast("th.nn.Embedding", model.get_input_embeddings())
    rows = embeddings.weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model's vocabulary only {rows}: use "
            "the model's own tokenizer (gym.make(..., tokenizer=...)), or a model of that size."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ValueError(
            f"Prompt and response budgets add up to {max_tokens} tokens, but the model has only "
            f"{positions} positions: lower max_prompt_tokens or max_new_tokens."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_tokens > window:
        raise ValueError(
            f"The model attends to a sliding window of {window} tokens, but the budgets add up to "
            f"{max_tokens}: lower them, since only full attention is supported."
        )
