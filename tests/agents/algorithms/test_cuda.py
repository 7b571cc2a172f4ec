"""On a GPU the same comes out as on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

import textenvs
from agents import PPO

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def full_precision() -> Any:
    """Matrix products in float32, not in TF32."""
    before = th.get_float32_matmul_precision()
    th.set_float32_matmul_precision("highest")
    yield
    th.set_float32_matmul_precision(before)


def agent(device: str, env_id: str = "TextGen-v0", **policy_kwargs: Any) -> PPO:
    assert textenvs.task_ids()
    return PPO(
        "TransformerPolicy",
        gym.make_vec(env_id, num_envs=8),
        n_steps=64,
        batch_size=128,
        kl_coef=0.05,
        seed=0,
        device=device,
        policy_kwargs=policy_kwargs,
    )


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_greedy_rollout_equals_the_cpu_s(env_id: str) -> None:
    on_gpu, on_cpu = agent("cuda", env_id), agent("cpu", env_id)
    on_gpu.policy.load_state_dict(on_cpu.policy.state_dict())
    env = gym.make_vec(env_id, num_envs=8, autoreset_mode="SameStep")
    observations, _ = env.reset(seed=3)
    for _ in range(80):
        actions, _ = on_cpu.predict(observations, deterministic=True)
        logits = []
        for model in (on_gpu, on_cpu):
            tensors, _ = model.policy.obs_to_tensor(observations)
            with th.no_grad():
                logits.append(model.policy.get_distribution(tensors).log_probs.cpu())  # type: ignore[attr-defined]
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
        observations = env.step(np.asarray(actions))[0]


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_cached_rollout_equals_the_uncached_one(env_id: str) -> None:
    rollouts = []
    for use_cache in (True, False):
        model = agent("cuda", env_id, use_cache=use_cache)
        model.learn(1)
        rollouts.append(model.rollout_buffer.actions.copy())
    assert np.array_equal(*rollouts)


def test_first_ratio_is_one_and_the_update_changes_the_weights() -> None:
    model = agent("cuda")
    model.learn(1)
    _, callback = model._setup_learn(10_000, None)
    model._update_current_progress_remaining(0, 1)  # the learning rate is at its start again
    callback.on_training_start({}, {})
    assert model.env is not None
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    for batch in model.rollout_buffer.get(None):
        with th.no_grad():
            _, log_probs, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        ratio = (log_probs - batch.old_log_prob).exp()
        assert (ratio - 1).abs().max() < 1e-4
    before = [p.clone() for p in model.policy.parameters()]
    model.train()
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
