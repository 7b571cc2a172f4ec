"""States: taken anywhere in an episode, put into another environment, it goes on identically."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.textenvs.toys import EXAMPLES, Chat, Echo, random_actions, same
from textenvs import Example
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv

MODES = list(AutoresetMode)


class Vector:
    """A vector environment that is stepped at random, whatever its autoreset mode."""

    def __init__(self, mode: AutoresetMode, seed: int | None = None, **kwargs: Any) -> None:
        self.env = TextVectorEnv(Chat, 3, autoreset_mode=mode, max_episode_steps=20, **kwargs)
        if seed is not None:
            self.env.reset(seed=seed)

    def step(self, rng: np.random.Generator) -> Any:
        over = self.env.get_state()["over"]
        if self.env.autoreset_mode == AutoresetMode.DISABLED and over.any():
            return self.env.reset(options={"reset_mask": over})
        return self.env.step(random_actions(rng, self.env.single_action_space, 3))


@pytest.mark.parametrize("steps", [0, 1, 5, 12, 30])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(mode.value))
def test_vector(mode: AutoresetMode, steps: int) -> None:
    first = Vector(mode, seed=3, render_mode="ansi")
    rng = np.random.default_rng(steps)
    for _ in range(steps):
        first.step(rng)
    state = pickle.loads(pickle.dumps(first.env.get_state()))
    second = Vector(mode, render_mode="ansi")
    second.env.set_state(state)
    assert second.env.np_random_seed == first.env.np_random_seed
    assert second.env.render() == first.env.render()
    seed = rng.integers(100)
    ours, theirs = (np.random.default_rng(seed) for _ in range(2))
    ended = 0
    for _ in range(60):
        expected, found = first.step(ours), second.step(theirs)
        assert same(expected, found)
        ended += len(expected[-1])
    assert ended
    assert first.env.render() == second.env.render()


@pytest.mark.parametrize("task", [Echo, Chat])
@pytest.mark.parametrize("steps", [0, 1, 4, 9, 14])
def test_single(task: Any, steps: int) -> None:
    first, second = TextEnv(task, render_mode="ansi"), TextEnv(task, render_mode="ansi")
    first.reset(seed=4)
    rng = np.random.default_rng(steps)

    def step(env: TextEnv, rng: np.random.Generator) -> Any:
        if not env.get_state()["running"]:
            return env.reset()
        return env.step(random_actions(rng, env.action_space, 1)[0])

    for _ in range(steps):
        step(first, rng)
    second.set_state(pickle.loads(pickle.dumps(first.get_state())))
    assert second.np_random_seed == 4 and second.render() == first.render()
    ours, theirs = (np.random.default_rng(8) for _ in range(2))
    for _ in range(50):
        assert same(step(first, ours), step(second, theirs))


def test_never_reset() -> None:
    env = TextEnv(Echo)
    env.set_state(TextEnv(Echo).get_state())
    with pytest.raises(gym.error.ResetNeeded):
        env.step(5)
    vector = TextVectorEnv(Echo, 2)
    vector.set_state(TextVectorEnv(Echo, 2).get_state())
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(np.array([5, 5]))
    vector.reset(seed=1)
    assert vector.np_random_seed == (1, 2)


def test_a_state_is_a_copy() -> None:
    env = TextVectorEnv(Chat, 2, autoreset_mode="SameStep", copy=False)
    observation, _ = env.reset(seed=0)
    env.step(np.array([5, 6]))
    state = env.get_state()
    kept = pickle.dumps(state)
    for _ in range(20):
        env.step(np.array([5, 0]))
    assert pickle.dumps(state) == kept
    env.set_state(state)
    # The live arrays stay those that were handed out.
    assert observation["response"][:, 0].tolist() == [5, 6]
    for _ in range(20):
        env.step(np.array([5, 0]))
    assert pickle.dumps(state) == kept
    single = TextEnv(Chat)
    single.reset(seed=0)
    state = single.get_state()
    kept = pickle.dumps(state)
    single.step(5)
    assert pickle.dumps(state) == kept


def test_a_state_is_small() -> None:
    env = gym.make_vec("TextGen-v0", num_envs=8)
    env.reset(seed=0)
    size = sum(array.nbytes for array in env.unwrapped.engine.observations.values())  # type: ignore[attr-defined]
    assert len(pickle.dumps(env.unwrapped.get_state())) < size + 8 * 2000  # type: ignore[attr-defined]


OTHERS: dict[str, dict[str, Any]] = {
    "max_new_tokens=7": {"max_new_tokens": 7},
    "max_prompt_tokens=99": {"max_prompt_tokens": 99},
    "examples=1": {"dataset": EXAMPLES[:1], "max_prompt_tokens": 90},
    "digest=": {"dataset": (*EXAMPLES[:2], Example("Who", ("not",))), "max_prompt_tokens": 90},
}


@pytest.mark.parametrize("expected", OTHERS)
def test_states_of_other_environments_are_refused(expected: str) -> None:
    state = TextVectorEnv(Chat, 2, max_prompt_tokens=90).get_state()
    other = TextVectorEnv(Chat, 2, **OTHERS[expected])
    other.reset(seed=0)
    before = pickle.dumps(other.get_state())
    with pytest.raises(ValueError, match=f"expected .*{expected}.*, got .*Make the environment"):
        other.set_state(state)
    assert pickle.dumps(other.get_state()) == before
    with pytest.raises(ValueError, match="expected num_envs=3, got num_envs=2"):
        TextVectorEnv(Chat, 3, max_prompt_tokens=90).set_state(state)
    single = TextEnv(Chat, **OTHERS[expected])
    with pytest.raises(ValueError, match=expected):
        single.set_state(TextEnv(Chat, max_prompt_tokens=90).get_state())
