"""Rollout and update of the tiny model, with and without the memory of keys and values."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from agents import PPO


@pytest.mark.benchmark(group="rollout of 16 episodes of 16 + 48 tokens")
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_rollout(benchmark: Any, use_cache: bool) -> None:
    model = agent(use_cache)
    _, callback = model._setup_learn(10**9, None)
    callback.on_training_start({}, {})
    assert model.env is not None
    benchmark.extra_info["tokens"] = model.n_steps * model.n_envs
    benchmark.pedantic(
        model.collect_rollouts,
        (model.env, callback, model.rollout_buffer, model.n_steps),
        rounds=5,
        warmup_rounds=1,
    )


@pytest.mark.benchmark(group="update on 16 episodes of 16 + 48 tokens")
def test_update(benchmark: Any) -> None:
    model = agent(use_cache=True)
    model.learn(1)
    benchmark.extra_info["tokens"] = model.n_steps * model.n_envs
    benchmark.pedantic(model.train, rounds=5, warmup_rounds=1)


def agent(use_cache: bool) -> PPO:
    env = gym.make_vec("TextGen-v0", num_envs=16, max_prompt_tokens=16, max_new_tokens=48)
    policy_kwargs = {"model": "tiny", "use_cache": use_cache}
    return PPO("TransformerPolicy", env, n_steps=48, policy_kwargs=policy_kwargs, seed=0)
