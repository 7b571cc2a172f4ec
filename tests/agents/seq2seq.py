"""Encoder-decoders from configs, small, for the tests of all that runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    BartConfig,
    BlenderbotConfig,
    BlenderbotSmallConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MT5Config,
    MvpConfig,
    PegasusConfig,
    PLBartConfig,
    PretrainedConfig,
    SwitchTransformersConfig,
    T5Config,
    T5GemmaConfig,
    UMT5Config,
)

from tests.agents.capabilities import TESTED

VOCAB = 97
ROLES = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
BART: dict[str, Any] = {
    **{"d_model": 32, "vocab_size": VOCAB, "max_position_embeddings": 64},
    **{f"{half}_layers": 2 for half in ("encoder", "decoder")},
    **{f"{half}_attention_heads": 2 for half in ("encoder", "decoder")},
    **{f"{half}_ffn_dim": 64 for half in ("encoder", "decoder")},
    **{**ROLES, "decoder_start_token_id": 2},
}
T5: dict[str, Any] = {
    **{"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2},
    **{"num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GEMMA: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64},
}


def t5gemma() -> PretrainedConfig:
    config: Any = T5GemmaConfig
    made: PretrainedConfig = config(
        encoder=GEMMA,
        decoder={**GEMMA, "cross_attention_hidden_size": 32},
        vocab_size=VOCAB,
        decoder_start_token_id=2,
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    )
    return made


def forcing(config: Any, token: int) -> Any:
    """A config with a forced first token, which its constructor takes no more."""
    config.forced_bos_token_id = token
    return config


# Marian starts with padding and has, at will, a vocabulary for each half.
PAD_LAST: dict[str, Any] = {**BART, "eos_token_id": 0, "pad_token_id": VOCAB - 1}
FAMILIES: dict[str, Callable[[], Any]] = {
    "T5 1.0": lambda: T5Config(**{**T5, "tie_word_embeddings": True}),
    "T5 1.1": lambda: T5Config(**{**T5, **GATED}),
    "mT5": lambda: MT5Config(**T5),
    "UMT5": lambda: UMT5Config(**T5),
    "LongT5": lambda: LongT5Config(**T5),
    "Switch": lambda: SwitchTransformersConfig(**{**T5, "num_experts": 2}),
    "BART": lambda: BartConfig(**BART),
    "mBART": lambda: forcing(MBartConfig(**BART), 7),
    "Pegasus": lambda: PegasusConfig(**{**BART, "pad_token_id": 1, "decoder_start_token_id": 1}),
    "Marian": lambda: MarianConfig(**{**PAD_LAST, "decoder_start_token_id": VOCAB - 1}),
    "Marian of two vocabularies": lambda: MarianConfig(
        **{**PAD_LAST, "decoder_start_token_id": VOCAB - 1, "decoder_vocab_size": VOCAB + 9},
        share_encoder_decoder_embeddings=False,
    ),
    "M2M100": lambda: forcing(M2M100Config(**BART), 9),
    "Blenderbot": lambda: BlenderbotConfig(**{**BART, "decoder_start_token_id": 0}),
    "Blenderbot small": lambda: BlenderbotSmallConfig(**{**BART, "decoder_start_token_id": 0}),
    "PLBart": lambda: PLBartConfig(**BART),
    "MVP": lambda: MvpConfig(**BART),
    "T5Gemma": t5gemma,
}
if not TESTED:
    # With transformers 5.17 it computes a row otherwise when others are beside it, and is refused.
    del FAMILIES["UMT5"]
