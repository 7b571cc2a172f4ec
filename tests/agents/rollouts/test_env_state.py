"""Whole stacks of environments: a state put into a fresh one, it goes on identically."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

import textenvs  # noqa: F401 (registers the ids)
from agents import GymnasiumVecEnv
from agents.rollouts.env_state import get_env_state, set_env_state, shows
from textenvs.wrappers import AddReward
from textenvs.wrappers.vector import AddReward as AddRewards

SLOTS = 3
SHORT: dict[str, Any] = {"max_new_tokens": 6, "max_prompt_tokens": 120}


def single(env_id: str = "Dialogue-v0") -> gym.Env[Any, Any]:
    env: Any = gym.make(env_id, max_episode_steps=14, **SHORT)
    return Monitor(NormalizeReward(AddReward(env, "length_penalty"), gamma=1.0))


def native(env_id: str = "Dialogue-v0", **kwargs: Any) -> Any:
    return gym.make_vec(env_id, num_envs=SLOTS, **{**SHORT, **kwargs})


def monitored() -> Any:
    return VecMonitor(GymnasiumVecEnv(native()))


def normalized() -> Any:
    inside = VecMonitor(GymnasiumVecEnv(native("TextGen-v0", autoreset_mode="SameStep")))
    return VecNormalize(inside, norm_obs=False, gamma=1.0)


def wrapped() -> Any:
    env = AddRewards(native(), "length_penalty")
    counted = vector_wrappers.RecordEpisodeStatistics(vector_wrappers.NormalizeReward(env))
    return GymnasiumVecEnv(counted)


def vectorized(mode: str) -> Any:
    kwargs: Any = {"vectorization_mode": mode, "max_episode_steps": 14, **SHORT}
    return VecMonitor(GymnasiumVecEnv(gym.make_vec("Dialogue-v0", num_envs=SLOTS, **kwargs)))


def dummy() -> Any:
    return DummyVecEnv([single] * SLOTS)


STACKS: dict[str, Callable[[], Any]] = {
    "native": monitored,
    "VecNormalize": normalized,
    "vector wrappers": wrapped,
    "sync": lambda: vectorized("sync"),
    "async": lambda: vectorized("async"),
    "DummyVecEnv": dummy,
    "VecNormalize over DummyVecEnv": lambda: VecNormalize(dummy(), norm_obs=False),
    "SubprocVecEnv": lambda: SubprocVecEnv([single] * SLOTS, start_method="fork"),
}


def actions(steps: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(300, 2000, (steps, SLOTS))
    return np.where(rng.random((steps, SLOTS)) < 0.2, 0, tokens)


def plain(infos: Any) -> Any:
    """Infos without the time that an episode took."""
    return [
        {
            key: {k: v for k, v in value.items() if k != "t"} if key == "episode" else value
            for key, value in info.items()
        }
        for info in infos
    ]


def assert_steps_equal(first: Any, second: Any) -> None:
    np.testing.assert_equal(first[:3], second[:3])
    np.testing.assert_equal(plain(first[3]), plain(second[3]))


@pytest.mark.parametrize("name", STACKS)
def test_stack_goes_on(name: str) -> None:
    first, second = STACKS[name](), STACKS[name]()
    first.seed(5)
    observation = first.reset()
    for row in actions(23, 0):
        before = observation
        observation, *_ = first.step(row)
    state = pickle.loads(pickle.dumps(get_env_state(first)))
    assert shows(state, observation) and not shows(state, before)
    second.reset()
    set_env_state(second, state)
    ended = 0
    for row in actions(60, 1):
        expected = first.step(row)
        assert_steps_equal(expected, second.step(row))
        ended += expected[2].sum()
    assert ended >= SLOTS
    # What was taken out is nobody's live array: it can be used again.
    set_env_state(first, state)
    set_env_state(second, state)
    for row in actions(20, 2):
        assert_steps_equal(first.step(row), second.step(row))
    for env in (first, second):
        env.close()


def test_other_environments_have_no_state() -> None:
    for env in (
        make_vec_env("CartPole-v1", n_envs=2),
        GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="async")),
        GymnasiumVecEnv(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")),
    ):
        env.reset()
        assert get_env_state(env) is None
        env.close()
    with pytest.raises(ValueError, match="Expected environments of textenvs"):
        set_env_state(make_vec_env("CartPole-v1"), {})


def test_workers_that_cannot_be_asked() -> None:
    for name in ("async", "SubprocVecEnv"):
        env = STACKS[name]()
        env.reset()
        if name == "SubprocVecEnv":
            env.step_async(np.full(SLOTS, 400))
            assert get_env_state(env) is None
            env.step_wait()
            assert get_env_state(env) is not None
            env.processes[0].kill()
            env.processes[0].join()
            assert get_env_state(env) is None
            env.remotes = env.remotes[1:]  # or closing would wait for it
        env.close()
        assert get_env_state(env) is None


def test_refused() -> None:
    env = monitored()
    env.reset()
    state: Any = get_env_state(env)
    others = {
        "expected VecNormalize over VecMonitor over .*, got VecMonitor over a native": normalized(),
        "expected 3 single environments with .*, got VecMonitor over a native": dummy(),
        "expected max_new_tokens=7, got max_new_tokens=6": VecMonitor(
            GymnasiumVecEnv(native(max_new_tokens=7))
        ),
        "expected examples=": VecMonitor(GymnasiumVecEnv(native(split="test"))),
    }
    for message, other in others.items():
        other.reset()
        before = pickle.dumps(get_env_state(other))
        with pytest.raises(ValueError, match=message):
            set_env_state(other, state)
        assert pickle.dumps(get_env_state(other)) == before
