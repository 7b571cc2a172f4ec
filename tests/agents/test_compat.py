"""What other libraries keep private is as it was: no tested architecture has lost anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
)

from agents import compat
from agents.models.backbone import Capabilities
from agents.models.causal import CausalBackbone
from tests.agents.architectures import ARCHITECTURES

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

FULL = {"gpt2": "GPT-2", "llama": "Llama, SmolLM", "opt": "OPT"}


def backbone(config: PretrainedConfig, **options: Any) -> CausalBackbone:
    with th.random.fork_rng():
        th.manual_seed(0)
        return CausalBackbone(config, VOCAB, 64, **options)


@pytest.mark.parametrize("initializer_range", [0.02, 0.001])
def test_a_window_that_cannot_be_tried_is_not_trusted(initializer_range: float) -> None:
    """Also at initial weights, which are too small for a wrong position to show by itself."""
    options: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2}
    options |= {"num_heads": 2, "initializer_range": initializer_range}
    options["attention_types"] = [[["global", "local"], 1]]
    with pytest.warns(UserWarning, match="beyond 63 tokens it attends"):
        capabilities = backbone(GPTNeoConfig(**options, window_size=63)).capabilities
    assert "beyond 63 tokens it attends" in str(capabilities.caches)
    assert capabilities.packs == "its attention is 'eager', and only 'sdpa' is packed"
    long = backbone(GPTNeoConfig(**options, window_size=64))
    assert long.capabilities.caches is None


def test_a_window_is_left_as_it_was() -> None:
    made = backbone(MistralConfig(**GROUPED, sliding_window=5))
    assert made.capabilities == Capabilities() and made.config.sliding_window == 5
    made = backbone(Gemma2Config(**GROUPED, sliding_window=5))
    windows = [getattr(layer, "sliding_window", None) for layer in made.model.modules()]
    assert [window for window in windows if window is not None] == [5]


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
    assert all(backbone(ARCHITECTURES[name]()).linear_head for name in FULL.values())


def test_logits_that_are_made_of_more_than_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def noisy(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + float(kwargs.get("input_ids") is not None)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", noisy)
    with pytest.raises(ValueError, match=r"makes its logits of more .*differ by up to"):
        backbone(ARCHITECTURES[FULL["llama"]]())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_probes_leave_no_trace(name: str) -> None:
    config = ARCHITECTURES[FULL[name]]()
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
    model = backbone(ARCHITECTURES[FULL["llama"]]()).model
    assert len(compat.checkpointed_layers(model)) == 2


def test_versions_count_what_is_done_in_place() -> None:
    tensor = th.zeros(3)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert compat.version_of(tensor) > before
