"""What an encoder-decoder says of itself: what is read first, how much, how to generate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedModel

from agents.decoding.layer_masks import window_of
from agents.models.loading import longest_sequence, rows_of

HALVES = ("encoder", "decoder")
# Settings of `generate` that change which token comes next, and what they are when they do nothing.
SETTINGS = {
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "repetition_penalty": (None, 1.0),
    "length_penalty": (None, 1.0),
    "num_beams": (None, 1),
}


def prefix_of(model: PreTrainedModel) -> Sequence[int]:
    """Return what a decoder reads before a response, and write it into the model's config."""
    settings = [getattr(model, "generation_config", None), model.config]

    def setting(name: str) -> int | None:
        values = (getattr(source, name, None) for source in settings)
        return next((int(value) for value in values if value is not None), None)

    start, forced = setting("decoder_start_token_id"), setting("forced_bos_token_id")
    if start is None:
        raise ValueError(
            f"{type(model).__name__} has no decoder_start_token_id, so that nobody knows what its "
            "decoder reads first: set it in the model's config (T5: the padding token, BART: EOS)."
        )
    prefix = (start,) if forced is None else (start, forced)
    known = rows_of(model)
    if max(prefix) >= known:
        raise ValueError(
            f"{type(model).__name__} has {known} tokens, but its decoder would read {max(prefix)} "
            "first: set decoder_start_token_id and forced_bos_token_id in the model's config."
        )
    # A saved agent keeps the config alone, from which its model is made again.
    model.config.decoder_start_token_id, model.config.forced_bos_token_id = start, forced
    return prefix


def warn_of_settings(model: PreTrainedModel) -> None:
    """Warn of settings that its authors generate with, and that are none of the policy's."""
    settings = getattr(model, "generation_config", None)
    found = {
        name: value
        for name, nothing in SETTINGS.items()
        if (value := getattr(settings, name, None)) not in nothing
    }
    if found.get("forced_eos_token_id") == getattr(settings, "eos_token_id", None):
        found.pop("forced_eos_token_id", None)  # The budget ends a turn without it.
    if found:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        warnings.warn(
            f"{type(model).__name__} is meant to generate with {said}. The policy samples without: "
            "what is sampled is what is scored.",
            stacklevel=3,
        )


def check_sizes(
    model: PreTrainedModel, vocab_size: int, max_prompt: int, max_response: int
) -> None:
    """Raise a ValueError if a model has too few positions, or reads fewer tokens than there are."""
    for what, half, most in (
        ("Prompts", "encoder", max_prompt),
        ("Responses, with what the decoder reads first,", "decoder", max_response),
    ):
        longest, reason = limit_of(model, half)
        if most > longest:
            raise ValueError(
                f"{what} may have {most} tokens, but {reason}: lower max_prompt_tokens or "
                "max_new_tokens."
            )
    # Of two vocabularies the tokenizer counts the larger one.
    known = max(readable_tokens(half) for half in (model.get_encoder(), model.get_decoder()))
    if known < vocab_size:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model reads only {known}: use the "
            "model's own tokenizer (gym.make(..., tokenizer=...)), or resize the model "
            "(model.resize_token_embeddings)."
        )


def limit_of(model: PreTrainedModel, half: str) -> tuple[float, str]:
    """Return how many tokens a half of a model can read, and what they are limited by."""
    part = cast("Any", model.get_encoder() if half == "encoder" else model.get_decoder())
    longest, reason = longest_sequence(part.config.get_text_config(decoder=half == "decoder"))
    window = window_of(part.config)
    if window is not None and window < longest:
        return window, (
            f"the model attends to a sliding window of {window} tokens there, and encoder-decoders "
            "are supported with full attention only"
        )
    return longest, reason


def readable_tokens(half: Any) -> int:
    """Return how many tokens an encoder or decoder has embeddings of."""
    return int(half.get_input_embeddings().weight.shape[0])


def expert_capacity(model: PreTrainedModel) -> float | int:
    """Return how many tokens of a row experts read: of what is read at once, the first ones."""
    if model.config.model_type != "switch_transformers":
        return math.inf
    return int(model.config.expert_capacity)
