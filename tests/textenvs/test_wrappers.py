"""Added reward terms, single and vectorised, and Gymnasium's own reward wrappers on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import ClipReward, NormalizeReward, RecordEpisodeStatistics, TransformReward
from gymnasium.wrappers import vector as gym_vector

from tests.textenvs.toys import Chat, Echo, encode, random_actions, same, say
from textenvs import LengthPenalty, Transcript, wrappers
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards import CallableReward
from textenvs.wrappers import vector

EOS = 0
SLOTS = 3
every_mode = pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: str(mode.value))


def characters(transcripts: Sequence[Transcript]) -> list[float]:
    return [float(len(transcript.response)) for transcript in transcripts]


# One term for each turn, one for the last turn, and one with a weight.
TERMS: list[Any] = [LengthPenalty(0.4), (characters, 0.5)]


def native(mode: AutoresetMode, reward: Any = None) -> TextVectorEnv:
    return TextVectorEnv(
        Chat, SLOTS, autoreset_mode=mode, reward=reward, max_episode_steps=12, max_new_tokens=5
    )


def single() -> gym.Env[Any, Any]:
    return gym.wrappers.TimeLimit(TextEnv(Chat, max_new_tokens=5), max_episode_steps=12)


def play(env: VectorEnv[Any, Any, Any], steps: int = 300) -> list[Any]:
    rng, space = np.random.default_rng(0), native(AutoresetMode.DISABLED).single_action_space
    record: list[Any] = [env.reset(seed=3)]
    for _ in range(steps):
        record.append(env.step(random_actions(rng, space, SLOTS)))
        done = record[-1][2] | record[-1][3]
        if env.metadata["autoreset_mode"] == AutoresetMode.DISABLED and done.any():
            env.reset(options={"reset_mask": done})
    return record


def test_terms_are_added_by_name_at_the_end_of_a_turn() -> None:
    env = wrappers.AddReward(TextEnv(Chat), TERMS)
    env.reset(seed=0)
    _, reward, terminated, _, info = say(env, "hm")
    tokens = len(encode("hm")) + 1
    assert not terminated
    assert info["reward_terms"] == {"task": 1.0, "length_penalty": -0.4 * tokens, "characters": 0.0}
    assert type(reward) is float and reward == pytest.approx(1 - 0.4 * tokens)
    _, reward, terminated, _, info = say(env, "stop")
    assert terminated and info["reward_terms"]["characters"] == 2.0
    assert reward == pytest.approx(sum(info["reward_terms"].values()))


def test_added_terms_do_not_leak_into_the_environment_below() -> None:
    below = TextEnv(Chat, render_mode="ansi")
    env = wrappers.AddReward(below, "length_penalty")
    env.reset(seed=0)
    say(env, "hm")
    assert "length_penalty" not in str(below.render())


@every_mode
def test_single_and_vectorised_agree(mode: AutoresetMode) -> None:
    wrapped_within = SyncVectorEnv(
        [lambda: wrappers.AddReward(single(), TERMS)] * SLOTS, autoreset_mode=mode
    )
    wrapped_around = vector.AddReward(native(mode), TERMS)
    around_sync = vector.AddReward(SyncVectorEnv([single] * SLOTS, autoreset_mode=mode), TERMS)
    built_in = native(mode, reward=["task", *TERMS])
    expected = play(wrapped_within)
    rewards = np.array([step[1] for step in expected[1:]])
    assert (rewards < 0).any() and (rewards > 1).any()
    assert any("transcript" in step[4] for step in expected[1:])
    for env in (wrapped_around, around_sync, built_in):
        got = play(env)
        assert same([step[0] for step in got], [step[0] for step in expected])
        for ours, theirs in zip(got[1:], expected[1:], strict=True):
            assert np.allclose(ours[1], theirs[1]) and ours[1].dtype == theirs[1].dtype
            assert same(ours[2:], theirs[2:])


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: str(mode.value))
def test_around_async(mode: AutoresetMode) -> None:
    env = gym.make_vec(
        "TextGen-v0",
        num_envs=SLOTS,
        vectorization_mode="async",
        vector_kwargs={"autoreset_mode": mode},
    )
    wrapped = vector.AddReward(env, [LengthPenalty(0.5)])
    wrapped.reset(seed=0)
    _, rewards, terminated, _, info = wrapped.step(np.array([EOS, 5, EOS]))
    assert terminated.tolist() == [True, False, True]
    assert rewards.tolist() == [-0.5, 0.0, -0.5]
    ended = info["final_info"] if mode == AutoresetMode.SAME_STEP else info
    assert ended["reward_terms"]["length_penalty"].tolist() == [-0.5, 0.0, -0.5]
    wrapped.close()


def test_the_turns_of_a_step_are_scored_in_one_call() -> None:
    batches: list[int] = []

    def count(transcripts: Sequence[Transcript]) -> list[float]:
        batches.append(len(transcripts))
        return [0.0] * len(transcripts)

    env = vector.AddReward(TextVectorEnv(Echo, 3), count)
    env.reset(seed=0)
    env.step(np.array([EOS, 5, EOS]))
    assert batches == [2]


def test_a_name_that_is_taken_is_an_error() -> None:
    message = "already is a reward term 'task': give the added one another name with name="
    env = wrappers.AddReward(TextEnv(Echo), "task")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(EOS)
    stacked = wrappers.AddReward(wrappers.AddReward(TextEnv(Echo), "chrf"), "chrf")
    stacked.reset(seed=0)
    with pytest.raises(ValueError, match="'chrf'"):
        stacked.step(EOS)
    many = vector.AddReward(TextVectorEnv(Echo, 2), "task")
    many.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        many.step(np.array([EOS, EOS]))


def test_failing_terms_are_named() -> None:
    bad = CallableReward(lambda ts: [float("nan")] * len(ts), name="bad")
    env = vector.AddReward(TextVectorEnv(Echo, 2), bad)
    env.reset(seed=0, options={"example": 2})
    with pytest.raises(ValueError, match=r"'bad' returned nan for the example with prompt 'Why'"):
        env.step(np.array([5, EOS]))
    with pytest.raises(ValueError, match="Unknown reward 'no'"):
        wrappers.AddReward(TextEnv(Echo), "no")


def test_the_wrapper_is_in_the_spec() -> None:
    env = wrappers.AddReward(gym.make("TextGen-v0"), [("length_penalty", 0.5)])
    assert env.spec is not None
    twin = gym.make(env.spec)
    for each in (env, twin):
        each.reset(seed=0)
        assert each.step(EOS)[4]["reward_terms"]["length_penalty"] == -0.5


def test_statistics_of_wrapped_rewards() -> None:
    env: gym.Env[Any, Any] = RecordEpisodeStatistics(wrappers.AddReward(TextEnv(Echo), TERMS))
    env.reset(seed=0)
    info = say(env, "good")[4]
    assert info["episode"]["r"] == pytest.approx(sum(info["reward_terms"].values()))


def test_gymnasiums_reward_wrappers_single() -> None:
    """They change the reward and leave the terms as they were."""
    clipped: gym.Env[Any, Any] = ClipReward(TextEnv(Echo), -1.0, 1.0)
    halved: gym.Env[Any, Any] = TransformReward(TextEnv(Echo), lambda value: float(value) / 2)
    for env, expected in ((clipped, 1.0), (halved, 2.0)):
        env.reset(seed=0)
        _, reward, _, _, info = say(env, "good")
        assert reward == expected and info["reward_terms"] == {"task": 4.0}
    normalized: gym.Env[Any, Any] = NormalizeReward(TextEnv(Echo))
    normalized.reset(seed=0)
    rewards = []
    for _ in range(30):
        rewards.append(float(say(normalized, "good")[1]))
        normalized.reset()
    assert np.isfinite(rewards).all() and len(set(rewards)) == 30


@every_mode
def test_gymnasiums_reward_wrappers_vectorised(mode: AutoresetMode) -> None:
    plain = np.array([step[1] for step in play(native(mode))[1:]])
    clipped = play(gym_vector.ClipReward(native(mode), 0.0, 0.5))
    assert np.array_equal([step[1] for step in clipped[1:]], np.clip(plain, 0.0, 0.5))
    halved = play(gym_vector.TransformReward(native(mode), lambda rewards: rewards / 2))
    assert np.array_equal([step[1] for step in halved[1:]], plain / 2)
    normalized = np.array([s[1] for s in play(gym_vector.NormalizeReward(native(mode)))[1:]])
    assert np.array_equal(normalized == 0, plain == 0) and not np.allclose(normalized, plain)
    on_top = play(gym_vector.ClipReward(vector.AddReward(native(mode), TERMS), 0.0, 0.5))
    assert max(step[1].max() for step in on_top[1:]) == 0.5
