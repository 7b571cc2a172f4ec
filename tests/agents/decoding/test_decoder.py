"""What makes rollouts fast computes what the plain way computes."""

from __future__ import annotations

import copy
import gc
import io
import shutil
import weakref
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from agents.decoding import copies as decoding
from agents.decoding import prepacked
from agents.decoding.copies import PREPACK_AFTER
from agents.decoding.prepacked import (
    CastProduct,
    DecodeModel,
    OneDNNProduct,
    Product,
    fastest_product,
)
from agents.models.causal import CausalBackbone
from tests.agents.helpers import FEW, VOCAB, compiled_by, gpt2, llama, policy_for, ragged, vec_env
from tests.agents.helpers import roll_out as play
from tests.agents.models.test_causal import opt

CPU = th.device("cpu")
needs_onednn = pytest.mark.skipif(
    fastest_product(CPU, th.float32) is not OneDNNProduct,
    reason="this build of PyTorch has no oneDNN",
)


def backbone(config: Any, **kwargs: Any) -> CausalBackbone:
    with th.random.fork_rng():
        th.manual_seed(0)
        made = CausalBackbone(config, VOCAB, 256, **kwargs)
    assert made.capabilities.caches is None  # what is compared would else be the same twice
    return made


def stepped(model: CausalBackbone, steps: int, start: int = 5) -> th.Tensor:
    """The last hidden states of rows that have grown by so many steps."""
    rows = [[start, 6, 7], [8], [9, 10, 11, 12, 13]]
    for step in range(steps):
        hidden = model.next_hidden(ragged(rows))
        rows = [[*row, 20 + step] for row in rows]
    plain = model.last_hidden(ragged([row[:-1] for row in rows]))
    th.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-5)
    return hidden


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with th.no_grad():
        yield


@pytest.fixture(autouse=True)
def prepack_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is something to prepack in tiny models."""
    monkeypatch.setattr(prepacked, "PREPACK_FROM", 0)


@pytest.mark.parametrize("config", [gpt2, llama, opt])
def test_decode_model_is_made_after_some_steps_and_computes_the_same(config: Any) -> None:
    model = backbone(config())
    stepped(model, PREPACK_AFTER)
    assert not model.decoder.prepacked
    model.clear_cache()
    stepped(model, PREPACK_AFTER + 3)
    assert model.decoder.prepacked and model.decoder.copies.products
    assert model.decoder._trunk is not model.model.base_model
    hidden = th.randn(4, 32)
    th.testing.assert_close(model.decoder.head(hidden), model.logits(hidden), rtol=1e-5, atol=1e-5)


def test_decode_model_is_made_at_once_for_many_steps() -> None:
    model = backbone(llama())
    model.start_rollout(steps=PREPACK_AFTER)
    stepped(model, 1)
    assert model.decoder.prepacked
    model.start_rollout(steps=PREPACK_AFTER - 1)
    stepped(model, 1)
    assert not model.decoder.prepacked
    model.start_rollout(steps=PREPACK_AFTER)
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})
    stepped(model, 1)  # which compares with the plain way


@pytest.mark.parametrize("compiled", [False, True])
def test_layouts_made_in_inference_mode_can_be_renewed(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th, "compile", lambda function, **_: function)
    monkeypatch.setattr(decoding, "fastest_product", lambda _, dtype: CastProduct)
    model = backbone(llama(), compiled=compiled)
    rows = ragged([[5, 6, 7], [8]])
    with th.inference_mode():
        for _ in range(PREPACK_AFTER + 2):
            model.next_hidden(rows, scope="predict")
    assert model.decoder.prepacked
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})
    stepped(model, PREPACK_AFTER + 2)  # which compares with the plain way


def test_predictions_with_new_weights_leave_a_rollouts_layout_alone() -> None:
    model = backbone(llama())
    model.start_rollout(steps=PREPACK_AFTER)
    for factor in (1.1, 1.3):
        model.next_hidden(ragged([[5, 6, 7], [8]]), scope="predict")
        assert not model.decoder.prepacked
        model.load_state_dict({k: v * factor for k, v in model.state_dict().items()})
    model.next_hidden(ragged([[5, 6, 7], [8]]), scope="predict")
    stepped(model, 1)
    assert model.decoder.prepacked


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_decode_model_does_not_outlive_the_weights(change: str) -> None:
    model = backbone(llama())
    before = stepped(model, PREPACK_AFTER + 2)
    assert model.decoder.prepacked
    state = {name: value * 1.3 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=change == "replaced")
    after = stepped(model, PREPACK_AFTER + 2)  # which compares with the plain way
    assert model.decoder.prepacked and (before - after).abs().max() > 1e-2
    with th.enable_grad():
        model.trunk(input_ids=th.tensor([[1, 2]]), use_cache=False)
    assert not model.decoder.prepacked and not model.decoder.copies.products  # and lets memory go


@pytest.mark.parametrize("kind", [pytest.param(OneDNNProduct, marks=needs_onednn), CastProduct])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(3, 5, 2), (3,)])
def test_layouts(kind: type[Product], bias: bool, sizes: tuple[int, ...]) -> None:
    layers = nn.ModuleList(nn.Linear(8, size, bias=bias and size != 5) for size in sizes)
    product = kind(list(layers), th.float32)
    for _ in range(2):
        product.refresh()
        for x in (th.randn(4, 8), th.randn(2, 3, 8)):
            outputs = [product.output(i, x) for i in range(len(layers))]
            for layer, output in zip(layers, outputs, strict=True):
                th.testing.assert_close(output, layer(x))
        for parameter in layers.parameters():
            parameter.mul_(1.5)
    asked = weakref.ref(x)
    del x, outputs, output
    assert asked() is None  # nothing is held


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1, 2, 2)])
def test_layers_that_read_the_same_may_be_asked_in_any_order(order: tuple[int, ...]) -> None:
    layers = [nn.Linear(8, size) for size in (3, 5, 2)]
    prepacked = CastProduct(layers, th.float32)
    prepacked.refresh()
    first, second = th.randn(4, 8), th.randn(4, 8)
    for x in (first, second, first):
        for part in order:
            th.testing.assert_close(prepacked.output(part, x), layers[part](x))


def test_logits_stay_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "fastest_product", lambda _, dtype: CastProduct)
    model = backbone(gpt2(), autocast=th.bfloat16)
    model.start_rollout(steps=PREPACK_AFTER)
    hidden = model.next_hidden(ragged([[5, 6, 7], [8]]))
    logits = model.decoder.head(hidden)
    assert model.decoder.prepacked and logits.dtype == th.float32
    th.testing.assert_close(logits, model.logits(hidden), rtol=1e-5, atol=1e-5)


def test_layers_are_converted_once_under_autocast() -> None:
    layer = nn.Linear(8, 3)
    prepacked = CastProduct([layer], th.bfloat16)
    prepacked.refresh()
    x = th.randn(4, 8)
    with th.autocast("cpu", th.bfloat16):
        assert th.equal(prepacked.output(0, x), layer(x))
    place = prepacked._cast.data_ptr()
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    prepacked.refresh()
    with th.autocast("cpu", th.bfloat16):
        assert th.equal(prepacked.output(0, x), layer(x))
    assert prepacked._cast.data_ptr() == place  # where a captured graph reads it


@pytest.mark.parametrize("config", [gpt2, llama, opt])
def test_converted_weights_change_no_rounding(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: under autocast the decode model's numbers are autocast's own."""
    monkeypatch.setattr(
        decoding, "fastest_product", lambda _, dtype: CastProduct if dtype != th.float32 else None
    )
    own, prepacked = (backbone(config(), autocast=th.bfloat16) for _ in range(2))
    monkeypatch.setattr(own.decoder, "prepack", lambda version: None)
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    for step in range(PREPACK_AFTER + 4):
        first, second = (model.next_hidden(ragged(rows)) for model in (own, prepacked))
        assert th.equal(first, second)
        rows = [[*row, 20 + step] for row in rows]
    assert prepacked.decoder.prepacked and not own.decoder.prepacked


def test_decode_model_shares_hooks_and_everything_but_linear_layers() -> None:
    model = backbone(llama())
    seen: list[str] = []
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    stepped(model, PREPACK_AFTER + 1)
    layers = model.decoder.copies.products
    model.decoder.prepack(object())
    seen.clear()
    made = model.decoder._trunk
    made(input_ids=th.tensor([[1, 2, 3]]), use_cache=False)
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "model.norm"} <= set(seen)
    assert (
        dict(made.named_parameters()).keys()
        == dict(model.model.base_model.named_parameters()).keys()
    )
    for name, parameter in made.named_parameters():
        assert parameter is model.model.base_model.get_parameter(name)
    # Of a layer's seven, three and two are one product each; and there is the head.
    assert len(layers) == 2 * 4 + 1


@needs_onednn
def test_small_layers_are_joined_but_not_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "PREPACK_FROM", VOCAB * 32)
    model = backbone(llama())
    stepped(model, PREPACK_AFTER + 2)
    assert [type(part) for part in model.decoder.copies.products] == [CastProduct] * 4 + [
        OneDNNProduct
    ]
    small = DecodeModel(OneDNNProduct, th.bfloat16)
    small.of(nn.Sequential(nn.Linear(4, 4)))
    assert [type(part) for part in small.products] == [CastProduct]  # to be converted once


def test_modules_of_other_kinds_are_left_alone() -> None:
    class Own(nn.Linear):
        def forward(self, x: th.Tensor) -> th.Tensor:
            return super().forward(x) + 1

    module = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    made = DecodeModel(CastProduct, th.float32)
    copied = made.of(module)
    made.products[0].refresh()
    assert len(made.products) == 1 and next(type(part) for part in copied.children()) is Own
    x = th.randn(2, 4)
    assert th.equal(copied(x), module(x))


def test_copies_of_a_model_have_decoders_of_their_own() -> None:
    model = backbone(gpt2())
    stepped(model, PREPACK_AFTER + 2)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.3)
    assert (
        stepped(model, PREPACK_AFTER + 2) - stepped(other, PREPACK_AFTER + 2)
    ).abs().max() > 1e-2


def test_models_can_be_pickled_in_the_middle_of_a_rollout() -> None:
    model = backbone(gpt2())
    stepped(model, PREPACK_AFTER + 2)
    file = io.BytesIO()
    th.save(model, file)
    file.seek(0)
    other = th.load(file, weights_only=False)
    answers = [stepped(m, PREPACK_AFTER + 2) for m in (model, other)]
    th.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


def test_layouts_are_let_go() -> None:
    model = backbone(gpt2())
    gc.collect()
    before = len(prepacked._PREPACKED)
    stepped(model, PREPACK_AFTER + 2)
    assert (
        fastest_product(CPU, th.float32) is not OneDNNProduct or len(prepacked._PREPACKED) > before
    )
    model.clear_cache()
    gc.collect()
    assert len(prepacked._PREPACKED) == before


@pytest.mark.parametrize("config", [llama])
def test_compiled_rollout_is_the_plain_one(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tokens and values, over resets, several weights, and two policies side by side.

    What is compiled, and when again, without machine code, which would take minutes.
    """
    functions = compiled_by("eager", monkeypatch)
    env = vec_env("Dialogue-v0", num_envs=3, max_new_tokens=6)
    kwargs: dict[str, Any] = {"allowed_tokens": FEW, "temperature": 0.7, "top_k": 4}
    layers = {"num_hidden_layers": 1}
    policies = [
        policy_for(env, config(**layers), compile=compile, **kwargs) for compile in (True, False)
    ]
    other = policy_for(env, config(**layers, initializer_range=0.1), compile=True, **kwargs)
    for scale in (1.0, 1.1):
        for policy in policies:
            for parameter in policy.backbone.parameters():
                parameter.mul_(scale)
        compiled, plain = (play(policy, env, 40) for policy in policies)
        assert np.array_equal(compiled.actions, plain.actions)
        assert np.abs(compiled.log_probs - plain.log_probs).max() < 1e-5
        assert np.abs(compiled.values - plain.values).max() < 1e-5
        play(other, env, 3)  # in between, by programs of its own
    # For each of two policies: steps, prompts, what prompts grow by, the choice of the next token.
    assert 2 * 3 <= len(functions) <= 2 * 4
    observations, _ = policies[0].obs_to_tensor(env.reset())
    for policy in policies:
        policy.sampling = type(policy.sampling)(temperature=0.1)
    first, second = (policy(observations, deterministic=True)[2] for policy in policies)
    th.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_machine_code_computes_the_same() -> None:
    env = vec_env(num_envs=3, max_new_tokens=6)
    config = llama(num_hidden_layers=1)
    runs = [play(policy_for(env, config, compile=c), env, 5, True) for c in (True, False)]
    assert np.array_equal(runs[0].actions, runs[1].actions)
    assert np.abs(runs[0].log_probs - runs[1].log_probs).max() < 1e-5
