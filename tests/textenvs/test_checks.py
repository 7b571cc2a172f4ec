"""`check_text_env` accepts text environments and finds what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests.textenvs.toys import Chat, Echo
from textenvs import wrappers
from textenvs.checks import check_text_env
from textenvs.envs.env import TextEnv

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Broken(gym.Wrapper[Any, Any, Any, Any]):
    """A text environment with something changed in its steps or resets."""

    def __init__(
        self,
        env: gym.Env[Any, Any],
        step: Callable[[Step], Any] | None = None,
        reset: Callable[[Any, dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__(env)
        self._step = step
        self._reset = reset

    def step(self, action: Any) -> Step:
        result: Step = self.env.step(action)  # type: ignore[assignment]
        if self._step is not None:
            self._step(result)
        return result

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        if self._reset is not None:
            self._reset(observation, info)
        return observation, info


class Reward(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return float(reward) + 0.5


def drop(key: str) -> Callable[[Step], Any]:
    return lambda result: result[4].pop(key, None)


def fill(key: str, value: int) -> Callable[[Step], Any]:
    def change(result: Step) -> None:
        result[0][key][...] = value

    return change


def add_transcript(result: Step) -> None:
    result[4].setdefault("transcript", None)


def retokenise(result: Step) -> None:
    """Change what was emitted, once it is part of the prompt."""
    if "transcript" in result[4] and not result[2]:
        length = int(result[0]["prompt_length"][0])
        result[0]["prompt"][: length - 1] = 7


@pytest.mark.parametrize(
    "env",
    [
        lambda: TextEnv(Echo),
        lambda: TextEnv(Chat),
        lambda: gym.wrappers.TimeLimit(TextEnv(Chat), max_episode_steps=5),
        lambda: wrappers.AddReward(TextEnv(Chat), "length_penalty"),
        lambda: gym.wrappers.RecordEpisodeStatistics(TextEnv(Echo)),
        lambda: gym.make("TextClassification-v0"),
    ],
)
def test_text_environments_pass(env: Callable[[], gym.Env[Any, Any]]) -> None:
    check_text_env(env(), episodes=4)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda env: Broken(env, drop("transcript")), "must have a transcript exactly when"),
        (lambda env: Broken(env, add_transcript), "must have a transcript exactly when"),
        (lambda env: Broken(env, fill("response", 7)), "padded with the pad id 1 behind"),
        (
            lambda env: Broken(env, fill("prompt_length", 10**6)),
            r"prompt_length is \[1000000\], which is not in",
        ),
        (lambda env: Broken(env, retokenise), "next prompt must start with the prompt and the"),
        (lambda env: Broken(env, fill("response_length", 0)), "response must be padded|appended"),
        (
            lambda env: Broken(env, reset=lambda _, info: info.update(transcript=None)),
            "reset must not report a transcript",
        ),
        (Reward, r"must be 0, but it is 0\.5|must add up to the reward"),
    ],
)
def test_what_is_wrong_is_found(
    broken: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"Not a text environment: .*(?:{message})"):
        check_text_env(broken(TextEnv(Chat)), episodes=4)


def test_other_spaces_are_found() -> None:
    with pytest.raises(ValueError, match=r"observation space must be a Dict of .*prompt_length"):
        check_text_env(gym.make("CartPole-v1"))
    env = TextEnv(Echo)
    env.action_space = spaces.Discrete(5)
    with pytest.raises(ValueError, match=r"must be a textenvs\.TokenSpace, but it is Discrete\(5"):
        check_text_env(env)


def test_resets_that_ignore_the_seed_are_found() -> None:
    class Unseeded(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
            return self.env.reset(options=options)

    with pytest.raises(ValueError, match=r"reset\(seed\) must start the same episode"):
        for _ in range(3):  # two of thousands of examples are hardly ever the same
            check_text_env(Unseeded(TextEnv("TextGen-v0")))


def test_ignored_options_are_found() -> None:
    class Deaf(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
            return self.env.reset(seed=seed)

    with pytest.raises(ValueError, match=r"options=\{'example': 0\}"):
        for seed in range(10):
            check_text_env(Deaf(TextEnv(Echo)), seed=seed)


def test_the_check_plays_no_random_tokens_twice() -> None:
    """The same seed checks the same episodes, so that a failure can be looked at again."""
    actions: list[list[int]] = [[], []]
    for record in actions:

        class Record(gym.Wrapper[Any, Any, Any, Any]):
            record_to = record

            def step(self, action: Any) -> Any:
                self.record_to.append(int(action))
                return self.env.step(action)

        check_text_env(Record(TextEnv(Chat)), seed=3)
    assert actions[0] == actions[1] and len(np.unique(actions[0])) > 5
