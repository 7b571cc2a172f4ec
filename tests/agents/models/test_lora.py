from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from transformers import AutoModelForCausalLM

from agents import PPO, warm_start
from agents.decoding import copies as decoding
from agents.decoding.prepacked import CastProduct
from agents.models.loading import model_kind
from agents.rollouts.sequences import split_by_size
from tests.agents.agents import (
    ITERATION,
    NUM_ENVS,
    PLAIN_STEPS,
    Calls,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import FEW, llama, policy_for, roll_out, vec_env
from tests.agents.oracle import Critic, Diary

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
SPECS: dict[str, Any] = {
    "dict": LORA,
    # With dropout, which stays off.
    "LoraConfig": peft.LoraConfig(**LORA, lora_dropout=0.5, task_type="CAUSAL_LM"),
}


def lora_agent(spec: Any = LORA, kind: str = "one turn", **kwargs: Any) -> Any:
    policy = {"model": llama(), "peft_config": spec, "temperature": 0.7, **kwargs.pop("policy", {})}
    return make_agent(kind, policy=policy, **kwargs)


def adapter_weights(model: Any) -> dict[str, th.Tensor]:
    return {name: value for name, value in weights(model.policy).items() if "lora_" in name}


def other_weights(model: Any) -> dict[str, th.Tensor]:
    return {
        name: value
        for name, value in weights(model.policy).items()
        if "lora_" not in name and "value_head" not in name
    }


def shake_adapter(model: Any) -> None:
    """Let the adapter make a difference."""
    generator = th.Generator().manual_seed(3)
    with th.no_grad():
        for name, parameter in model.policy.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * th.randn(parameter.shape, generator=generator)


def plain(model: Any) -> Any:
    """The model without an adapter, of the class that `transformers` made."""
    with th.random.fork_rng():
        bare = AutoModelForCausalLM.from_config(llama())
    state = {
        name.replace(".base_layer", ""): value
        for name, value in weights(model.policy.backbone.model).items()
        if "lora_" not in name
    }
    bare.load_state_dict(state)
    return bare


@pytest.mark.parametrize("spec", list(SPECS))
def test_only_adapter_and_value_head_are_trained(spec: str) -> None:
    given = SPECS[spec]
    before = repr(given)
    model = lora_agent(given, kl_coef=0.1, ent_coef=0.1, learning_rate=1e-2)
    frozen, adapter, head = (
        other_weights(model),
        adapter_weights(model),
        weights(model.policy.value_head),
    )
    assert len(adapter) == 2 * 3 * 2 and all(
        value.shape[0] == 4 for n, value in adapter.items() if "lora_A" in n
    )
    trained = {n for n, p in model.policy.named_parameters() if p.requires_grad}
    assert trained == set(adapter) | {"value_head.weight", "value_head.bias"}
    groups = model.policy.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for n, p in model.policy.named_parameters() if n in trained
    }
    model.learn(2 * ITERATION)
    assert repr(given) == before  # what was passed in is the caller's
    assert same(frozen, other_weights(model))
    after = adapter_weights(model)
    assert all(not th.equal(value, after[name]) for name, value in adapter.items())
    assert not same(head, weights(model.policy.value_head))
    # Dropout is off, the adapter's as well.
    collect(model)
    assert train(model).log["train/first_ratio_error"] < 1e-5


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_reference_is_the_model_with_its_adapter_as_it_was(kind: str) -> None:
    model = lora_agent(kind=kind, kl_coef=0.3)
    model.set_reference()
    shake_adapter(model)
    diary = Diary()
    calls = Calls(model.policy.backbone.model.get_input_embeddings())
    collect(model, diary)
    kept = model.get_parameters()["reference"].values()
    assert sum(map(th.numel, kept)) == sum(map(th.numel, adapter_weights(model).values()))
    sequences = model.rollout_buffer.sequences
    parts = len(split_by_size(sequences, model.batch_size))
    reads = sum(rows * width for rows, width in calls.shapes[-parts:])
    # Each sequence once, less what those of a part share.
    assert 0.8 < reads / sum(sequence.length - 1 for sequence in sequences) <= 1
    reference = Critic(plain(model), FEW, 0.7)
    with th.no_grad():
        truth = [reference.log_probs(t.context)[FEW.index(t.token)].item() for t in diary.tokens]
    buffer = model.rollout_buffer
    assert np.abs(buffer.ref_log_probs - np.array(truth).reshape(-1, NUM_ENVS)).max() < 1e-5
    kl = buffer.log_probs - np.array(truth).reshape(-1, NUM_ENVS)
    assert np.abs(kl).max() > 0.05
    raw = np.array([token.reward for token in diary.tokens]).reshape(-1, NUM_ENVS)
    assert np.abs(buffer.rewards - (raw - 0.3 * kl)).max() < 1e-5
    # Afterwards the adapter is there again, and learns.
    assert train(model).log["train/first_ratio_error"] < 1e-5
    assert all(p.requires_grad for n, p in model.policy.named_parameters() if "lora_" in n)


def test_reference_may_be_another_model(tmp_path: Path) -> None:
    other = policy_for(vec_env(), llama())
    shake(other)
    other.save_pretrained(tmp_path / "model")
    model = collect(lora_agent(kl_coef=0.1, ref_model=str(tmp_path / "model")))
    assert same(weights(model.reference.model), weights(other.backbone.model))
    assert abs(model.rollout_buffer.log_probs - model.rollout_buffer.ref_log_probs).max() > 0.01


def test_kl_is_zero_at_first_also_after_a_warm_start(tmp_path: Path) -> None:
    model = lora_agent(kl_coef=0.1, learning_rate=1e-2)
    log = collect(model).logger.name_to_value
    assert abs(log["kl/per_token"]) < 1e-6 and abs(log["kl/per_episode"]) < 1e-5
    train(model)
    assert abs(collect(model).logger.name_to_value["kl/per_token"]) > 1e-6
    # What the adapter has learned from demonstrations is what it starts as.
    for cache in (tmp_path, tmp_path):  # once computed, once found
        model = lora_agent(kind="several turns", kl_coef=0.1, learning_rate=1e-2)
        base = plain(model)
        warm_start(model, passes=30, progress=False, cache=cache)
        policy = model.policy
        obs, _ = policy.obs_to_tensor(model.env.reset())
        with th.no_grad():
            before = policy.get_distribution(obs).log_probs
        assert same(weights(base), weights(plain(model)))
        learned = adapter_weights(model)
        assert all(value.any() for value in learned.values())
        collect(model)
        assert (
            np.abs(model.rollout_buffer.log_probs - model.rollout_buffer.ref_log_probs).max() < 1e-5
        )
        allowed = th.tensor(FEW)
        logits = policy.backbone.model(th.tensor([read_first(obs)])).logits[0, -1, allowed]
        truth = (logits / 0.7).log_softmax(-1)
        assert (before[0, allowed] - truth).abs().max() < 1e-4
        train(model)
        assert not same(learned, adapter_weights(model))


def read_first(obs: Any) -> list[int]:
    return [int(t) for t in obs["prompt"][0, : int(obs["prompt_length"][0, 0])]]


def test_an_adapter_that_was_comes_back_and_goes() -> None:
    model = lora_agent()
    adapter, network = model.policy.backbone.adapter, model.policy.backbone.model
    earlier, ids = adapter.weights(), th.tensor([[5, 6, 7]])
    shake_adapter(model)
    own = weights(model.policy)
    with th.no_grad():
        before = network(ids).logits
        with pytest.raises(RuntimeError, match="in the middle"), adapter.replaced(earlier):
            assert (network(ids).logits - plain(model)(ids).logits).abs().max() < 1e-4
            assert not adapter.in_place
            raise RuntimeError("in the middle")
        assert th.equal(network(ids).logits, before) and adapter.in_place
    assert same(own, weights(model.policy))
    assert all(p.requires_grad == ("lora_" in n) for n, p in network.named_parameters())


@pytest.mark.parametrize("spec", list(SPECS))
def test_save_and_load_and_the_penalty_goes_on(spec: str, tmp_path: Path) -> None:
    model = lora_agent(SPECS[spec], kl_coef=0.2, kl_target=1.0, learning_rate=1e-2)
    model.learn(2 * ITERATION)
    model.save(tmp_path / "agent")
    loaded: Any = PPO.load(tmp_path / "agent", device="cpu", env=model.env)
    assert same(weights(model.policy), weights(loaded.policy))
    assert loaded.kl_coef == model.kl_coef != 0.2
    assert same(weights(loaded.reference), weights(model.reference))
    assert {n for n, p in loaded.policy.named_parameters() if p.requires_grad} == {
        n for n, p in model.policy.named_parameters() if p.requires_grad
    }
    first, second = (roll_out(m.policy, vec_env(), 6) for m in (model, loaded))
    assert np.array_equal(first.actions, second.actions)
    assert np.array_equal(first.log_probs, second.log_probs)
    frozen = other_weights(loaded)
    diary = Diary()
    collect(loaded, diary)
    reference = Critic(plain(model), FEW, 0.7)
    with th.no_grad():
        truth = [reference.log_probs(t.context)[FEW.index(t.token)].item() for t in diary.tokens]
    got = loaded.rollout_buffer.ref_log_probs
    assert np.abs(got - np.array(truth).reshape(-1, NUM_ENVS)).max() < 1e-5
    train(loaded)
    assert same(frozen, other_weights(loaded))
    model.policy.save(str(tmp_path / "policy.pt"))
    assert same(
        weights(model.policy), weights(type(model.policy).load(str(tmp_path / "policy.pt")))
    )


def test_saved_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    model = lora_agent()
    shake_adapter(model)
    before, ids = weights(model.policy), th.tensor([[5, 6, 7, 8]])
    model.policy.save_pretrained(tmp_path / "model")
    assert same(before, weights(model.policy))
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(folder).__name__ == "LlamaForCausalLM"
    assert set(folder.state_dict()) == set(plain(model).state_dict())
    with th.no_grad():
        assert (folder(ids).logits - model.policy.backbone.model(ids).logits).abs().max() < 1e-4
        assert (folder(ids).logits - plain(model)(ids).logits).abs().max() > 0.1
    # It still learns afterwards.
    assert np.isfinite(train(collect(model)).log["train/loss"])
    assert not same(before, weights(model.policy))


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "autocast": "bfloat16"}])
def test_adapter_gradients_are_those_of_the_merged_weights(options: dict[str, Any]) -> None:
    # d/dB of W + s * B A is s * (d/dW) A^T, and likewise for A.
    still: dict[str, Any] = {"learning_rate": 0.0, "max_grad_norm": 1e9, "n_epochs": 1}
    model = lora_agent(policy={**PLAIN_STEPS, **options}, **still)
    shake_adapter(model)
    collect(model)
    update = train(model)
    name = "backbone.model.model.layers.1.mlp.down_proj"
    merged = make_agent(policy={"model": llama(), "temperature": 0.7, **PLAIN_STEPS}, **still)
    network = model.policy.backbone.adapter.merged()
    merged.policy.backbone.model.load_state_dict(network.state_dict())
    merged.policy.value_head.load_state_dict(model.policy.value_head.state_dict())
    merged.rollout_buffer = model.rollout_buffer
    merged._setup_learn(1000)
    truth = train(merged)
    scale = 8 / 4
    gradients, after = update.gradients[0], weights(model.policy)
    whole = truth.gradients[0][f"{name}.weight"]
    a, b = after[f"{name}.lora_A.default.weight"], after[f"{name}.lora_B.default.weight"]
    tolerance = 0.1 if options else 1e-4
    for key, expected in (("lora_B", scale * whole @ a.T), ("lora_A", scale * b.T @ whole)):
        error = (gradients[f"{name}.{key}.default.weight"] - expected).abs().max()
        assert error < tolerance * expected.abs().max()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_merged_adapter_of_tied_embeddings_is_not_the_others(target: str, tmp_path: Path) -> None:
    spec = {"r": 4, "target_modules": [target], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora_agent(spec, policy={"model": llama(tie_word_embeddings=True)})
    backbone = model.policy.backbone
    tokens = th.arange(5, 20)[None]
    with th.no_grad():
        expected = backbone.logits(backbone.trunk(input_ids=tokens, use_cache=False)[0])
        backbone.save_merged(tmp_path)
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        actual = plain(input_ids=tokens).logits[0]
    th.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_memory_holds_one_model_only() -> None:
    model = collect(lora_agent(kl_coef=0.1))
    backbone = model.policy.backbone.model
    modules = [value for value in vars(model).values() if isinstance(value, th.nn.Module)]
    assert {*modules} == {model.policy, model.reference}
    assert not list(model.reference.parameters())
    count = sum(p.numel() for p in model.policy.parameters())
    base = sum(p.numel() for p in plain(model).parameters())
    lora = sum(p.numel() for n, p in backbone.named_parameters() if "lora_" in n)
    assert count == base + lora + 33 and lora < 0.2 * base


# --- Adapters of models that can be found again ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    policy_for(vec_env(), llama()).save_pretrained(folder)
    return str(folder)


def logits_of(network: Any) -> th.Tensor:
    with th.no_grad():
        return network(th.tensor([[5, 6, 7, 8]])).logits  # type: ignore[no-any-return]


def test_an_adapter_is_saved_as_one_and_trained_on(base: str, tmp_path: Path) -> None:
    model = lora_agent(policy={"model": base}, kl_coef=0.1, learning_rate=1e-2)
    model.learn(ITERATION)
    folders = [tmp_path / name for name in ("first", "second", "merged")]
    model.policy.save_pretrained(folders[0])
    assert not list(folders[0].glob("model*")) and (folders[0] / "value_head.safetensors").exists()
    said = logits_of(model.policy.backbone.model)
    assert th.equal(logits_of(AutoModelForCausalLM.from_pretrained(folders[0])), said)
    # An adapter as a model: trained on, and the KL is to what it was.
    again = make_agent(policy={"model": str(folders[0])}, kl_coef=0.1, learning_rate=1e-2)
    assert model_kind(str(folders[0])) == "adapter"  # whose rate it learns by
    assert again.policy.pretrained and again.policy.backbone.adapter.base == base
    assert th.equal(logits_of(again.policy.backbone.model), said)
    trained = {n for n, p in again.policy.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.policy.named_parameters() if p.requires_grad}
    log = collect(again).logger.name_to_value
    assert abs(log["kl/per_token"]) < 1e-6
    before = adapter_weights(again)
    train(again)
    assert all(not th.equal(value, before[n]) for n, value in adapter_weights(again).items())
    assert same(other_weights(again), other_weights(model))
    again.policy.save_pretrained(folders[1])
    assert not list(folders[1].glob("model*"))
    said = logits_of(again.policy.backbone.model)
    assert th.equal(logits_of(AutoModelForCausalLM.from_pretrained(folders[1])), said)
    again.policy.save_pretrained(folders[2], merge=True)
    assert not list(folders[2].glob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(folders[2])
    assert (logits_of(merged) - said).abs().max() < 1e-4
    assert again.policy.backbone.adapter is not None  # which still trains


def test_an_adapter_beside_the_policys_model_is_merged(base: str, tmp_path: Path) -> None:
    model = lora_agent(policy={"model": base})
    shake_adapter(model)
    model.policy.save_pretrained(tmp_path / "adapter")
    said, folder = logits_of(model.policy.backbone.model), str(tmp_path / "adapter")
    other = make_agent(policy={"value_model": folder}, ref_model=folder, kl_coef=0.1)
    for backbone in (other.policy.value_backbone, other.reference):
        assert backbone.adapter is None
        assert (logits_of(backbone.model) - said).abs().max() < 1e-4
    assert all(p.requires_grad for p in other.policy.value_backbone.parameters())
    assert not any(p.requires_grad for p in other.reference.parameters())
    train(collect(other))
    other.save(tmp_path / "agent")
    loaded: Any = PPO.load(tmp_path / "agent", device="cpu")
    assert same(weights(loaded.policy), weights(other.policy))


def test_an_agent_is_saved_without_what_is_not_trained(base: str, tmp_path: Path) -> None:
    def made() -> Any:
        return lora_agent(policy={"model": base}, kl_coef=0.1, learning_rate=1e-2)

    whole = made().learn(2 * ITERATION)
    half = made().learn(ITERATION)
    half.save(tmp_path / "agent")
    kept = half.get_parameters()["policy"]
    assert {n for n in kept if "lora_" not in n} == {"value_head.weight", "value_head.bias"}
    loaded: Any = PPO.load(tmp_path / "agent", env=made().env, device="cpu")
    assert same(weights(loaded.policy), weights(half.policy))
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert same(weights(loaded.policy), weights(whole.policy))
    assert same(weights(loaded.reference), weights(whole.reference))
    # What somebody has changed is saved with all the rest.
    with th.no_grad():
        half.policy.backbone.model.get_input_embeddings().weight[3] += 1
    assert set(half.get_parameters()["policy"]) == set(weights(half.policy))
    half.save(tmp_path / "all")
    loaded = PPO.load(tmp_path / "all", device="cpu")
    assert same(weights(loaded.policy), weights(half.policy))


def test_a_base_that_is_another_one_by_now(base: str, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    lora_agent(policy={"model": copy}).save(tmp_path / "agent")
    other = policy_for(vec_env(), llama())
    shake(other)
    other.save_pretrained(copy)
    with pytest.raises(ValueError, match="whose weights are others now"):
        PPO.load(tmp_path / "agent", device="cpu")
    shutil.rmtree(copy)
    with pytest.raises(ValueError, match=f"could be loaded from '{copy}'"):
        PPO.load(tmp_path / "agent", device="cpu")


def test_the_share_of_what_is_trained_is_said_once(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lora_agent(policy={"model": base}, verbose=1)
    trained = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
    model.learn(ITERATION)
    model.learn(ITERATION, reset_num_timesteps=False)
    every = sum(p.numel() for p in model.policy.parameters())
    said = capsys.readouterr().out
    assert said.count(f"Training {trained:,} of {every:,} parameters ({trained / every:.2%})") == 1
    assert said.count("trained_share") == 1
    make_agent(verbose=1).learn(ITERATION)
    assert "trained_share" not in capsys.readouterr().out


def test_adapters_that_make_no_sense(base: str, tmp_path: Path) -> None:
    lora_agent(policy={"model": base}).policy.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, which is trained on: leave peft_config"):
        lora_agent(policy={"model": str(tmp_path / "adapter")})
    with pytest.raises(ValueError, match="the critic shares the trunk"):
        make_agent(policy={"model": str(tmp_path / "adapter"), "value_model": "copy"})
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(json.dumps(base), "null"))
    with pytest.raises(ValueError, match="does not say of which model"):
        make_agent(policy={"model": str(tmp_path / "adapter")})


def test_peft_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "textenvs\[lora\]"'):
        lora_agent()
    make_agent()  # Nobody else needs it.


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match=r"a peft\.LoraConfig or a dict .* but it is a str"):
        lora_agent("lora")
    with pytest.raises(ValueError, match="leave value_model out"):
        lora_agent(policy={"value_model": "copy"})


def test_without_its_adapter_a_policy_answers_as_if_it_never_had_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by its head, which rollouts run in a layout of its own."""
    monkeypatch.setattr(decoding, "fastest_product", lambda _, dtype: CastProduct)
    spec = {"r": 2, "target_modules": ["lm_head"]}
    model = lora_agent(spec).learn(ITERATION)
    policy = model.policy
    obs, _ = policy.obs_to_tensor(model.env.reset())
    with th.no_grad():
        for name, parameter in policy.backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.5)
        policy.start_rollout(decoding.PREPACK_AFTER)
        policy(obs)
        assert policy.backbone.decoder.prepacked
        adapter = policy.backbone.adapter
        nothing = {k: th.zeros_like(v) for k, v in adapter.weights().items()}
        with adapter.replaced(nothing):
            answer = policy.get_distribution(obs).log_probs.exp()
            policy.use_cache = False
            expected = policy.get_distribution(obs).log_probs.exp()
        with_adapter = policy.get_distribution(obs).log_probs.exp()
    th.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    assert (answer - with_adapter).abs().max() > 1e-2
