"""One environment: reset, step, errors, aliasing, time limits, rendering as Gymnasium wants it."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

from tests.textenvs.toys import EXAMPLES, Chat, Echo, encode, same, say
from textenvs import TokenSpace
from textenvs.envs.env import TextEnv

EOS = 0


def started(seed: int = 0, **kwargs: Any) -> TextEnv:
    env = TextEnv(Echo, **kwargs)
    env.reset(seed=seed)
    return env


def test_reset_starts_an_episode_and_reports_nothing() -> None:
    env = TextEnv(Echo)
    observation, info = env.reset(seed=3)
    assert info == {}
    assert env.observation_space.contains(observation)
    assert observation["response_length"].tolist() == [0]
    assert isinstance(env.action_space, TokenSpace)
    assert env.action_space.n == len(env.tokenizer)


def test_a_turn_as_the_agent_sees_it() -> None:
    observation, reward, terminated, truncated, info = say(started(), "good")
    assert (reward, terminated, truncated) == (4.0, True, False)
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
    assert sorted(info) == ["example", "is_success", "reward_terms", "transcript"]
    tokens = [*encode("good"), EOS]
    assert observation["response"][: len(tokens)].tolist() == tokens


def test_the_seed_decides_the_examples_and_none_goes_on() -> None:
    def examples(env: TextEnv, seed: int) -> list[str]:
        env.reset(seed=seed)
        names = [env.engine.example(0).prompt]
        for _ in range(20):
            env.reset()
            names.append(env.engine.example(0).prompt)
        return names

    env = TextEnv(Echo)
    first = examples(env, 1)
    assert first == examples(TextEnv(Echo), 1) == examples(env, 1)
    assert set(first) == {example.prompt for example in EXAMPLES}
    assert first != examples(env, 2)


def test_options_pick_the_example_and_are_left_alone() -> None:
    env = TextEnv(Echo)
    for index, example in enumerate(EXAMPLES):
        options = {"example": index}
        env.reset(options=options)
        assert options == {"example": index}
        assert env.engine.example(0) == example
        assert say(env, "x")[4]["example"] == index
    with pytest.raises(ValueError, match=r"options\['example'\] must be in \[0, 3\).*but it is 3"):
        env.reset(options={"example": 3})


def test_stepping_before_reset_or_after_the_end_is_an_error() -> None:
    env = TextEnv(Echo)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(5)
    env.reset()
    env.step(EOS)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(5)
    env.reset()
    env.step(5)


@pytest.mark.parametrize("action", [-1, 5000, 1.5, None, [3, 4], "a"])
def test_an_action_must_be_one_token_id(action: Any) -> None:
    env = started()
    with pytest.raises(ValueError, match=r"\[0, \d+\).*but"):
        env.step(action)
    assert env.step(5)[0]["response_length"].tolist() == [1]


@pytest.mark.parametrize("action", [5, np.int64(5), np.int32(5), np.array(5), np.array([5])])
def test_integers_of_all_kinds_are_actions(action: Any) -> None:
    assert started().step(action)[0]["response"][0] == 5


def test_observations_are_the_callers_own() -> None:
    env = started()
    first, *_ = env.step(5)
    kept = copy.deepcopy(first)
    second, *_ = env.step(6)
    assert same(first, kept)
    second["response"][:] = 3
    second["prompt"][:] = 3
    third, *_ = env.step(7)
    assert third["response"][:3].tolist() == [5, 6, 7]
    assert third["prompt"].tolist() == first["prompt"].tolist()


def test_info_is_the_callers_own() -> None:
    """`RecordEpisodeStatistics` writes into it, and rendering reads it."""
    env = gym.wrappers.TimeLimit(TextEnv(Echo, render_mode="ansi"), max_episode_steps=2)
    recorded: gym.Env[Any, Any] = RecordEpisodeStatistics(env)
    recorded.reset(seed=0)
    recorded.step(5)
    info = recorded.step(5)[4]
    assert info["episode"]["l"] == 2
    assert "reward" not in str(recorded.render())


def test_a_time_limit_truncates_and_the_budget_terminates() -> None:
    env: gym.Env[Any, Any] = TimeLimit(TextEnv(Echo, max_new_tokens=3), max_episode_steps=2)
    env.reset(seed=0)
    assert env.step(5)[2:4] == (False, False)
    *_, terminated, truncated, info = env.step(5)
    assert (terminated, truncated, info) == (False, True, {})
    env.reset()
    env.step(5)
    *_, terminated, truncated, info = env.step(EOS)
    assert (terminated, truncated) == (True, True)
    assert info["transcript"].final


def test_record_episode_statistics_sums_the_turns() -> None:
    env: gym.Env[Any, Any] = RecordEpisodeStatistics(TextEnv(Chat))
    env.reset(seed=0)
    assert "episode" not in say(env, "hm")[4]
    info = say(env, "stop")[4]
    assert info["episode"]["r"] == 2.0
    assert info["episode"]["l"] == len(encode("hm")) + len(encode("stop")) + 2


def test_a_copy_in_the_middle_of_an_episode_goes_on_alike_and_apart() -> None:
    env = TextEnv(Chat)
    env.reset(seed=0)
    env.step(5)
    twin = copy.deepcopy(env)
    ours = [env.step(action) for action in (6, EOS, 7, EOS, EOS)]
    theirs = [twin.step(action) for action in (6, EOS, 7, EOS, EOS)]
    assert same(ours, theirs)
    assert ours[0][0]["response_length"].tolist() == [2]


def test_it_takes_a_task_by_class_object_id_and_path() -> None:
    from textenvs.tasks.textgen.task import TextGen

    for task in (TextGen, TextGen(), "TextGen-v0", "textenvs.tasks.textgen.task:TextGen"):
        assert isinstance(TextEnv(task).task, TextGen)


def test_render_modes() -> None:
    assert TextEnv.metadata["render_modes"] == ["ansi", "human"]
    with pytest.raises(TypeError, match=r"None, 'ansi' or 'human', but it is 'rgb_array'"):
        TextEnv(Echo, render_mode="rgb_array")
    env = started()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None
