"""Which example comes next: a function of slot and count, whatever comes first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.textenvs.toys import random_actions
from textenvs import Example, Task, Transcript
from textenvs.data.sampler import ExampleSampler
from textenvs.envs.vector_env import TextVectorEnv

SEEDS = list(range(7, 19))


class Numbers(Task):
    """Twenty-six prompts, and turns of any length."""

    max_new_tokens = 5

    def examples(self, split: str) -> Sequence[Example]:
        return [Example(f"Say {letter}") for letter in "abcdefghijklmnopqrstuvwxyz"]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [0.0] * len(transcripts)


def drawn(count: int, **kwargs: Any) -> list[list[int]]:
    """The first examples of 12 slots."""
    sampler = ExampleSampler(26, 12, **kwargs)
    rngs = [np.random.default_rng(seed) for seed in SEEDS]
    return [[sampler.draw(s, k, rngs[s], SEEDS) for k in range(count)] for s in range(12)]


def played(env: TextVectorEnv, steps: int, seed: int = 0, plays: int = 0) -> list[list[int]]:
    """The examples of each slot's episodes, with random tokens."""
    rng = np.random.default_rng(plays)
    env.reset(seed=seed)
    found = [[env.engine.playing[slot]] for slot in range(env.num_envs)]
    for _ in range(steps):
        actions = random_actions(rng, env.single_action_space, env.num_envs)
        _, _, terminated, _, _ = env.step(actions)
        if terminated.any():
            env.reset(options={"reset_mask": terminated})
            for slot in np.flatnonzero(terminated):
                found[slot].append(env.engine.playing[slot])
    return found


def env_of(num_envs: int = 6, **kwargs: Any) -> TextVectorEnv:
    return TextVectorEnv(Numbers, num_envs, autoreset_mode="Disabled", **kwargs)


@pytest.mark.parametrize("group_size", [1, 3])
def test_an_epoch_has_every_example_once(group_size: int) -> None:
    groups = 12 // group_size
    every = np.array(drawn(26, sampling="epoch", group_size=group_size))
    assert all((every[slot] == every[slot - slot % group_size]).all() for slot in range(12))
    order = every[::group_size].T.flatten()  # as the groups take them, turn by turn
    epochs = order[: 26 * groups].reshape(groups, 26)
    assert all(sorted(epoch) == list(range(26)) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all() and not (epochs[0] == range(26)).all()


def test_random_groups_play_the_same_and_other_groups_others() -> None:
    every = drawn(40, group_size=4)
    assert every[0] == every[1] == every[3] and every[4] == every[7]
    assert every[0] != every[4] and len(set(every[0])) > 15
    alone = drawn(40)
    rng = np.random.default_rng(SEEDS[3])
    assert alone[3] == [int(rng.integers(26)) for _ in range(40)]


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_what_a_group_plays_does_not_depend_on_when_its_episodes_end(sampling: Any) -> None:
    first, second = (
        played(env_of(group_size=3, sampling=sampling), 60, plays=plays) for plays in (0, 1)
    )
    for group in (0, 3):
        every = [*first[group : group + 3], *second[group : group + 3]]
        assert len({len(one) for one in every}) > 1
        least = min(map(len, every))
        assert least > 5 and all(one[:least] == every[0][:least] for one in every)


@pytest.mark.parametrize("kwargs", [{"group_size": 3}, {"sampling": "epoch"}, {}])
def test_seeds_decide(kwargs: Any) -> None:
    env = env_of(**kwargs)
    runs = [played(env, 40, seed) for seed in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]


def test_without_a_seed_episodes_go_on() -> None:
    env = env_of(sampling="epoch")
    whole = played(env, 30)
    env.reset(seed=0)
    env.reset()
    assert env.engine.playing == [one[1] for one in whole]


@pytest.mark.parametrize("kwargs", [{"group_size": 3}, {"sampling": "epoch"}])
def test_a_state_goes_on_with_the_next_example(kwargs: Any) -> None:
    env, other = env_of(**kwargs), env_of(**kwargs)
    played(env, 20)
    other.set_state(env.get_state())
    for _ in range(3):
        for one in (env, other):
            one.reset()
        assert env.engine.playing == other.engine.playing
    with pytest.raises(ValueError, match=r"(sampling|group_size)=None"):
        env_of().set_state(env.get_state())
    with pytest.raises(ValueError, match=r"expected (sampling|group_size)="):
        env.set_state(env_of().get_state())


def test_states_from_before_there_was_a_choice_are_taken() -> None:
    env = env_of()
    played(env, 20)
    state = env.get_state()
    del state["engine"]["drawn"]
    other = env_of()
    other.set_state(state)
    assert other.engine.playing == env.engine.playing and not any(other.engine.drawn)


def test_a_group_that_starts_anew_is_together_again() -> None:
    env = env_of(group_size=3)
    env.reset(seed=0)
    env.reset(options={"reset_mask": np.array([True, False, False] * 2)})
    assert not env.engine.groups_agree and env.engine.drawn == [2, 1, 1] * 2
    env.reset()
    assert env.engine.groups_agree and env.engine.drawn == [3] * 6


def test_a_chosen_example_is_none_that_is_drawn() -> None:
    env = env_of(sampling="epoch")
    env.reset(seed=0)
    first = list(env.engine.playing)
    env.reset(seed=0, options={"example": 3})
    env.reset()
    assert env.engine.playing == first


def test_a_single_environment_has_epochs_too() -> None:
    env: Any = gym.make("TextGen-v0", dataset=[Example(text) for text in "abcde"], sampling="epoch")
    env.reset(seed=4)
    seen = [env.unwrapped.engine.example(0).prompt]
    for _ in range(9):
        env.reset()
        seen.append(env.unwrapped.engine.example(0).prompt)
    assert sorted(seen[:5]) == sorted(seen[5:]) == list("abcde")
    env.reset(seed=4)
    assert env.unwrapped.engine.example(0).prompt == seen[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 4}, "num_envs must be a multiple of group_size=4, .* but it is 6"),
        ({"group_size": 0}, "group_size must be a positive integer, but it is 0"),
        ({"group_size": 1.5}, "group_size must be a positive integer"),
        ({"sampling": "shuffle"}, "sampling must be 'random' or 'epoch', but it is 'shuffle'"),
    ],
)
def test_mistakes(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env_of(**kwargs)


def test_groups_need_slots() -> None:
    with pytest.raises(TypeError, match=r"gym.make_vec\(..., num_envs=..., group_size=...\)"):
        gym.make("TextGen-v0", group_size=2)
