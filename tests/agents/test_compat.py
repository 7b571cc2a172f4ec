"""What other libraries keep private is as it was: no tested architecture has lost anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from agents import compat
from agents.models.backbone import Capabilities
from agents.models.causal import CausalBackbone

VOCAB = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}

# Whose keys and values are remembered and whose sequences are packed: to lose it is no warning.
FULL: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=False),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma": GemmaConfig(**GROUPED),
    "phi": PhiConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}


def backbone(config: PretrainedConfig, **options: Any) -> CausalBackbone:
    with th.random.fork_rng():
        th.manual_seed(0)
        return CausalBackbone(config, VOCAB, 64, **options)


@pytest.mark.parametrize("name", list(FULL))
def test_every_architecture_that_is_claimed_caches_and_packs(name: str) -> None:
    assert backbone(FULL[name]).capabilities == Capabilities()


# Whose attention is told nothing of what a model was given.
CACHED: dict[str, PretrainedConfig] = {
    "falcon": FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "stablelm": StableLmConfig(**SIZES, num_key_value_heads=4),
}


@pytest.mark.parametrize("name", list(CACHED))
def test_architectures_that_cache_but_do_not_pack(name: str) -> None:
    capabilities = backbone(CACHED[name]).capabilities
    assert capabilities.caches is None and capabilities.compiles is None
    assert str(capabilities.packs).startswith("TypeError: ")


NOT_CACHED: dict[str, tuple[PretrainedConfig, str]] = {
    "alibi": (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2), "ValueError: "),
    "recurrent": (
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
        "RuntimeError: ",
    ),
    "local": (
        GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            initializer_range=0.001,
        ),
        "the results differ by up to ",
    ),
}


@pytest.mark.parametrize("name", list(NOT_CACHED))
def test_each_no_has_its_reason(name: str) -> None:
    """Also at initial weights, which are too small for a wrong position to show by itself."""
    config, reason = NOT_CACHED[name]
    with pytest.warns(UserWarning, match=reason):
        capabilities = backbone(config).capabilities
    assert str(capabilities.caches).startswith(reason)
    assert capabilities.packs == "its attention is 'eager', and only 'sdpa' is packed"
    assert "cache" in str(capabilities.compiles)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GROUPED, sliding_window=128),  # a soft-cap, which leaves small logits alone
        CohereConfig(**GROUPED),
        GraniteConfig(**GROUPED, logits_scaling=8.0),
    ],
)
def test_logits_that_are_changed_behind_the_head_show_at_initial_weights(
    config: PretrainedConfig,
) -> None:
    made = backbone(config)
    assert not made.linear_head and made.capabilities.caches is None
    assert all(backbone(FULL[name]).linear_head for name in FULL)


def test_logits_that_are_made_of_more_than_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def noisy(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + float(kwargs.get("input_ids") is not None)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", noisy)
    with pytest.raises(ValueError, match=r"makes its logits of more .*differ by up to"):
        backbone(FULL["llama"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_probes_leave_no_trace(name: str) -> None:
    config = FULL[name]
    with th.random.fork_rng():
        th.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config).state_dict()
        state = th.get_rng_state()
    model = backbone(config).model
    assert all(th.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert compat.attention_of(model.config) == "sdpa"
    with th.random.fork_rng():
        th.manual_seed(0)
        CausalBackbone(config, VOCAB, 64)
        assert th.equal(th.get_rng_state(), state)


def test_prepacked_products_are_the_layers() -> None:
    """By oneDNN where there is one: its operators are private."""
    x, weight, bias = th.randn(3, 8), th.randn(5, 8), th.randn(5)
    assert compat.onednn_multiplies(th.float32) == th.backends.mkldnn.is_available()
    assert not compat.onednn_multiplies(th.float64)
    if compat.onednn_multiplies(th.float32):
        product = compat.onednn_linear(x, compat.onednn_prepack(weight, 256), bias)
        th.testing.assert_close(product, x @ weight.T + bias)


def test_layers_that_are_checkpointed_are_found() -> None:
    model = backbone(FULL["llama"]).model
    assert len(compat.checkpointed_layers(model)) == 2


def test_versions_count_what_is_done_in_place() -> None:
    tensor = th.zeros(3)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert compat.version_of(tensor) > before
