from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from transformers import OPTConfig

from agents import PPO
from agents.policies.observations import action_hidden
from tests.agents.agents import (
    ITERATION,
    N_STEPS,
    NUM_ENVS,
    PLAIN_STEPS,
    STILL,
    Calls,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import FEW, VOCAB, gpt2, llama, policy_for, vec_env

CHECKPOINTED = {"gradient_checkpointing": True}


def opt(**changes: Any) -> OPTConfig:
    """A tiny OPT, whose layers apply dropout by themselves."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
        "init_std": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    return OPTConfig(**{**settings, **changes})


CONFIGS = {"gpt2": gpt2, "llama": llama, "opt": opt}
DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
}


def inner_layers(model: Any) -> list[th.nn.Module]:
    """A module in the middle of each layer of an agent's models."""
    modules = model.policy.named_modules()
    return [module for name, module in modules if name.endswith((".mlp", ".fc1"))]


@pytest.mark.parametrize(
    ("config", "value_model"), [("gpt2", "copy"), ("llama", None), ("opt", None)]
)
def test_checkpointing_computes_twice_and_changes_nothing(
    config: str, value_model: str | None
) -> None:
    updates, rollouts = [], []
    models = 1 if value_model is None else 2
    for checkpointed in (False, True):
        policy = {"model": CONFIGS[config](), "value_model": value_model, **PLAIN_STEPS}
        policy["gradient_checkpointing"] = checkpointed
        model = make_agent(policy=policy, ent_coef=0.1, **STILL)
        for _ in range(2):  # the second time after an update
            calls = Calls(*inner_layers(model))
            collect(model)
            # Of each layer a decode step for each token, and prefills for the resets.
            assert 2 * N_STEPS <= calls.tokens(32) // NUM_ENVS // models < 2 * 4 * N_STEPS
            calls.take()
            rollouts.append(model.rollout_buffer.log_probs.copy())
            shake(model.policy)
            updates.append(train(model))
            assert calls.take() == models * 2 * (ITERATION // 32) * (1 + checkpointed)
    for plain, twice in zip(updates[:2], updates[2:], strict=True):
        assert plain.difference(twice) < 1e-5
    assert np.array_equal(rollouts[0], rollouts[2]) and np.array_equal(rollouts[1], rollouts[3])


@pytest.mark.parametrize(
    ("config", "checkpointed"),
    [("gpt2", False), ("gpt2", True), ("llama", True), ("opt", False), ("opt", True)],
)
def test_dropout_is_off_everywhere(config: str, checkpointed: bool) -> None:
    updates = []
    for dropout in ({}, DROPOUT[config]):
        policy: dict[str, Any] = {
            "model": CONFIGS[config](**{**dict.fromkeys(DROPOUT[config], 0.0), **dropout})
        }
        policy |= {"gradient_checkpointing": checkpointed, "value_model": "copy", **PLAIN_STEPS}
        model = make_agent(policy=policy, kl_coef=0.1, **STILL)
        collect(model)
        # Nothing has changed yet: not the policy, and the reference is the policy.
        assert abs(model.logger.name_to_value["kl/per_token"]) < 1e-5
        shake(model.policy)
        updates.append(train(model))
        collect(model)
        assert train(model).log["train/first_ratio_error"] < 1e-5
    assert updates[0].difference(updates[1]) == 0


def test_checkpointing_that_a_model_does_not_support() -> None:
    env = vec_env()
    policy = policy_for(env, gpt2())
    type(policy.backbone.model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ValueError, match="GPT2LMHeadModel does not support gradient checkp"):
            policy_for(env, gpt2(), gradient_checkpointing=True)
    finally:
        type(policy.backbone.model).supports_gradient_checkpointing = True


@pytest.mark.parametrize(
    ("config", "value_model"), [("gpt2", None), ("llama", "copy"), ("opt", None)]
)
def test_autocast_computes_the_trunk_only_in_bfloat16(config: str, value_model: str | None) -> None:
    results = []
    for autocast in (None, "bfloat16"):
        policy = {"model": CONFIGS[config](), "value_model": value_model, "autocast": autocast}
        model = make_agent(policy={**policy, **PLAIN_STEPS}, **STILL)
        backbone = model.policy.backbone
        kept: set[th.dtype] = set()

        def look(_: Any, kept: Any = kept, caches: Any = backbone.decoder.memories) -> None:
            kept.update(keys.dtype for keys in caches["rollout"].key_values.keys.values())

        collect(model, look)
        with th.no_grad():
            low = backbone.trunk(input_ids=th.tensor([[5, 6, 7]]), use_cache=False)
        assert low.dtype == th.float32
        assert kept == {th.bfloat16 if autocast else th.float32}
        assert {p.dtype for p in model.policy.parameters()} == {th.float32}
        buffer = model.rollout_buffer
        arrays = ("log_probs", "values", "advantages", "returns", "rewards")
        assert {getattr(buffer, name).dtype for name in arrays} == {np.dtype(np.float32)}
        samples = buffer.samples(buffer.sequences)
        observations, _ = model.policy.obs_to_tensor(model.env.reset())
        with th.no_grad():
            answers = model.policy.evaluate_actions(samples.observations, samples.actions)
            _, *others = model.policy(observations)
        assert all(answer.dtype == th.float32 for answer in (*answers, *others))
        # From the last hidden states on, everything is computed in float32.
        with th.no_grad():
            hidden = action_hidden(backbone, samples.observations)
        logits = hidden @ backbone.model.get_output_embeddings().weight.detach().T
        log_probs = logits[:, FEW].log_softmax(-1)
        at = [FEW.index(int(action)) for action in samples.actions]
        assert (answers[1] - log_probs[range(len(at)), at]).abs().max() < 1e-5
        # The cache's way of computing and that of the update differ by rounding only.
        error = float((answers[1] - samples.old_log_prob).abs().max())
        assert error < (0.15 if autocast else 1e-5)
        results.append((low, model))
    (exact, precise), (low, rough) = results
    assert 1e-4 < (exact - low).abs().max() < 0.1 * exact.abs().max()
    # On the same tokens.
    buffer = precise.rollout_buffer
    samples = buffer.samples(buffer.sequences)
    with th.no_grad():
        both = [
            model.policy.evaluate_actions(samples.observations, samples.actions)
            for _, model in results
        ]
    for name, fine, coarse in zip(("value", "log-prob", "entropy"), *both, strict=True):
        assert (fine - coarse).abs().max() < 0.2 and (fine - coarse).abs().mean() < 0.03, name
    rough.rollout_buffer = buffer
    assert 0 < train(precise).difference(train(rough)) < 0.1


def test_training_in_bfloat16(tmp_path: Path) -> None:
    policy = {"autocast": "bfloat16", "gradient_checkpointing": True}
    model = make_agent(policy=policy, kl_coef=0.1, learning_rate=1e-2)
    before = weights(model.policy)
    logs = []
    for _ in range(3):
        collect(model)
        logs.append(train(model).log)
    after = weights(model.policy)
    assert not same(before, after) and all(value.isfinite().all() for value in after.values())
    assert {value.dtype for value in after.values()} <= {th.float32, th.bool}
    # The reference computes in bfloat16 as well, or the first KL would be rounding.
    assert model.reference.autocast == th.bfloat16
    assert abs(logs[0]["kl/per_token"]) < 2e-3
    assert all(log["train/first_ratio_error"] < 0.1 for log in logs)
    # And a loaded one does.
    model.save(tmp_path / "agent")
    loaded: Any = PPO.load(tmp_path / "agent", device="cpu")
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    with th.no_grad():
        first, second = (
            m.policy.log_probs(m.reference, samples.observations, samples.actions)
            for m in (model, loaded)
        )
    assert th.equal(first, second)


@pytest.mark.parametrize("autocast", ["float16", "bf16", True])
def test_other_precisions(autocast: Any) -> None:
    with pytest.raises(ValueError, match=f"autocast must be None or 'bfloat16', .*{autocast}"):
        policy_for(vec_env(), autocast=autocast)


def test_failing_forward_leaves_no_layer_in_training() -> None:
    policy = policy_for(vec_env(), gpt2(), gradient_checkpointing=True)
    backbone = policy.backbone

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    layer = next(m for n, m in policy.named_modules() if n.endswith(".mlp"))
    handle = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone.trunk(input_ids=th.tensor([[1, 2]]), use_cache=False)
    handle.remove()
    assert not any(module.training for module in backbone.modules() if module is not backbone)
