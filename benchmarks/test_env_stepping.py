"""One step of many environments: the batched engine against Gymnasium's loop over single ones."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textenvs

NUM_ENVS = 256


@pytest.mark.benchmark(group=f"step of {NUM_ENVS} environments")
@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
@pytest.mark.parametrize("env_id", textenvs.task_ids())
def test_step(benchmark: Any, env_id: str, mode: str) -> None:
    env = gym.make_vec(env_id, num_envs=NUM_ENVS, vectorization_mode=mode)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    eos = env.single_action_space.eos_token_id  # type: ignore[attr-defined]
    actions = rng.integers(env.single_action_space.n, size=(64, NUM_ENVS))  # type: ignore[attr-defined]
    actions[rng.random(actions.shape) < 0.05] = eos

    def steps() -> None:
        for row in actions:
            env.step(row)

    benchmark.extra_info["tokens"] = actions.size
    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
