from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from agents import evaluate_split
from agents.rollouts.vec_env import engine_of
from agents.training.evaluation import Evaluation, best_at_k, reward_text
from tests.agents.helpers import FEW, llama, policy_for, vec_env
from textenvs import Example, Transcript, Turn
from textenvs.envs.playing import Episode


class Scripted:
    """An agent that ends each response after a number of tokens that the prompt decides."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        fresh = observation["response_length"][:, 0] == 0
        self.prompts += [tuple(row) for row in observation["prompt"][fresh]]
        stop = observation["response_length"][:, 0] >= observation["prompt"][:, 1] % 7
        return np.where(stop, 0, observation["prompt"][:, 2]), None


def make(env_id: str = "TextGen-v0", **kwargs: Any) -> Any:
    return gym.make(env_id, split="validation", **kwargs)


@pytest.mark.parametrize("num_envs", [1, 7, 64, 1000])
def test_each_example_is_played_once_in_order(num_envs: int) -> None:
    env = make()
    engine = env.unwrapped.engine
    result = evaluate_split(Scripted(), env, num_envs=num_envs)
    count = len(engine.examples)
    assert [episode.example for episode in result.episodes] == list(range(count))
    assert [e.transcript and e.transcript.example for e in result.episodes] == list(engine.examples)
    assert all(e.transcript and e.transcript.final for e in result.episodes)


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_number_of_environments_changes_nothing_deterministic(env_id: str) -> None:
    env = make(env_id, max_new_tokens=8)
    policy = policy_for(env, llama(), allowed_tokens=FEW)
    first, second = (
        evaluate_split(policy, env, 12, deterministic=True, num_envs=num_envs).episodes
        for num_envs in (1, 6)
    )
    for one, other in zip(first, second, strict=True):
        assert (one.example, one.transcript, one.reward) == (
            other.example,
            other.transcript,
            other.reward,
        )


def test_rewards_are_those_of_the_environment() -> None:
    env = make(reward=["task", ("length_penalty", 0.1)])
    for episode in evaluate_split(Scripted(), env, 5).episodes:
        env.reset(options={"example": episode.example})
        total, done = 0.0, False
        ((_, response),) = episode.turns
        for token in response:
            assert not done
            _, reward, done, _, info = env.step(token)
            total += reward
        assert done and total == pytest.approx(episode.reward)
        assert info["reward_terms"] == pytest.approx(episode.reward_terms)
        assert info["is_success"] == episode.is_success


def test_some_examples_are_spread_over_the_split() -> None:
    env = make()
    count = len(env.unwrapped.engine.examples)
    for wanted in (1, 2, 10, count - 1, count, count + 5):
        played = [e.example for e in evaluate_split(Scripted(), env, wanted).episodes]
        assert len(played) == len(set(played)) == min(wanted, count)
        assert played[0] == 0 and (wanted == 1 or played[-1] == count - 1)
        gaps = np.diff(played)
        assert wanted == 1 or gaps.max() - gaps.min() <= 1


def test_generators_and_the_environment_are_left_alone() -> None:
    vector: Any = gym.make_vec("Dialogue-v0", num_envs=3, max_new_tokens=6)
    vector.reset(seed=0)
    policy = policy_for(vec_env("Dialogue-v0", max_new_tokens=6), allowed_tokens=FEW)
    engine: Any = vector.unwrapped.engine
    before = {key: value.copy() for key, value in engine.observations.items()}
    states = th.get_rng_state(), repr(np.random.get_state()), random.getstate()
    streams = [rng.bit_generator.state for rng in vector.unwrapped.np_random]
    first = evaluate_split(policy, vector, 8, seed=1)
    assert th.equal(th.get_rng_state(), states[0])
    assert repr(np.random.get_state()) == states[1]
    assert random.getstate() == states[2]
    assert [rng.bit_generator.state for rng in vector.unwrapped.np_random] == streams
    assert all(np.array_equal(engine.observations[key], before[key]) for key in before)
    # The same seed says the same, another one something else.
    th.rand(3)
    again, other = (evaluate_split(policy, vector, 8, seed=seed) for seed in (1, 2))
    assert [e.transcript for e in again.episodes] == [e.transcript for e in first.episodes]
    assert [e.transcript for e in other.episodes] != [e.transcript for e in first.episodes]


def test_figures() -> None:
    rewards = [1.0, 2.0, 4.0]
    result = Evaluation([Episode(i, reward=r) for i, r in enumerate(rewards)])
    assert result.mean == pytest.approx(7 / 3)
    assert result.standard_error == pytest.approx(np.std(rewards, ddof=1) / np.sqrt(3))
    assert result.success_rate is None
    result = Evaluation([Episode(i, is_success=s) for i, s in enumerate([True, False, None])])
    assert result.success_rate == 0.5
    assert np.isnan(Evaluation([Episode(0, reward=1.0)]).standard_error)


def test_summary_and_records() -> None:
    env = make("Dialogue-v0", max_new_tokens=6)
    result = evaluate_split(Scripted(), env, 6)
    summary = result.summary()
    assert summary["examples"] == 6 and summary["mean_reward"] == result.mean
    tokens = [sum(len(response) for _, response in e.turns) for e in result.episodes]
    assert summary["response_tokens"] == pytest.approx(np.mean(tokens))
    assert summary["reward_terms"]["task"] == pytest.approx(result.mean)
    records = result.records()
    assert [record["example"] for record in records] == [e.example for e in result.episodes]
    assert records[0]["turns"][0]["role"] == "user" and len(records[0]["turns"]) > 2


def test_at_least_one_example() -> None:
    with pytest.raises(ValueError, match="max_examples must be at least 1"):
        evaluate_split(Scripted(), make(), 0)


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_every_kind_of_environment_leads_to_its_engine(mode: str) -> None:
    from stable_baselines3.common.env_util import make_vec_env

    kwargs: Any = {"split": "test", "max_new_tokens": 4}
    envs = [
        gym.make("TextGen-v0", **kwargs),
        gym.make_vec("TextGen-v0", num_envs=2, vectorization_mode=mode, **kwargs),
        make_vec_env("TextGen-v0", n_envs=2, env_kwargs=kwargs),
    ]
    assert {len(engine_of(env).examples) for env in envs} == {318}
    with pytest.raises(TypeError, match="environment of textenvs"):
        engine_of(gym.make("CartPole-v1"))


def test_several_samples_of_each_example() -> None:
    env = make("Dialogue-v0", max_new_tokens=6)
    policy = policy_for(env, allowed_tokens=FEW)
    once, thrice = (evaluate_split(policy, env, 4, samples=samples) for samples in (1, 3))
    assert [e.example for e in thrice.episodes] == [e.example for e in once.episodes for _ in "123"]
    assert [e.transcript for e in thrice.episodes[::3]] == [e.transcript for e in once.episodes]
    assert len({str(e.transcript) for e in thrice.episodes}) > 4
    means = thrice.rewards.reshape(4, 3).mean(axis=1)
    assert thrice.standard_error == pytest.approx(means.std(ddof=1) / 2)
    summary = thrice.summary()
    assert (summary["examples"], summary["samples"]) == (4, 3)
    assert summary["pass@1"] == pytest.approx(summary["success_rate"]) and "pass@2" in summary
    assert "pass@4" not in summary and "pass@1" not in once.summary()
    rewards = thrice.rewards.reshape(4, 3)
    assert summary["best@1"] == pytest.approx(summary["mean_reward"])
    best = thrice.best()
    assert [e.example for e in best.episodes] == [e.example for e in once.episodes]
    assert best.rewards == pytest.approx(rewards.max(axis=1))
    assert "best@2" in summary and "best@4" not in summary and "best@1" not in once.summary()
    with pytest.raises(ValueError, match="samples must be at least 1"):
        evaluate_split(policy, env, 4, samples=0)


@pytest.mark.parametrize("successes", range(6))
def test_pass_at_k_is_the_share_of_choices_with_a_success(successes: int) -> None:
    outcomes = [i < successes for i in range(5)]
    for k in range(1, 6):
        subsets = list(combinations(outcomes, k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert best_at_k(outcomes, k) == pytest.approx(expected)


def test_best_at_k_is_the_mean_of_the_largest() -> None:
    rewards = [0.3, -1.0, 0.3, 2.0, 0.5]
    for k in range(1, 6):
        expected = np.mean([max(chosen) for chosen in combinations(rewards, k)])
        assert best_at_k(rewards, k) == pytest.approx(expected)


def test_pass_at_powers_of_two() -> None:
    # One of two examples never succeeds, the other in one of eight samples.
    outcomes = {0: [False] * 8, 1: [True] + [False] * 7}
    result = Evaluation(
        [
            Episode(i, transcript=spoken(), is_success=success)
            for i, own in outcomes.items()
            for success in own
        ]
    )
    shares = {name: value for name, value in result.summary().items() if name.startswith("pass@")}
    expected = {f"pass@{k}": k / 16 for k in (1, 2, 4, 8)}
    assert shares == pytest.approx(expected)


def spoken(text: str = "yes") -> Transcript:
    return Transcript(Example("Go on:"), (Turn("user", "Go on:"), Turn("agent", text)))


def test_what_is_observed_is_told() -> None:
    values: list[dict[str, Any]] = [{"chrf": 0.5, "well_formed": True}, {"chrf": 0.25}]
    episodes = [Episode(i, transcript=spoken(), observed=own) for i, own in enumerate(values)]
    result = Evaluation(episodes)
    assert result.summary()["observed"] == {"chrf": 0.375, "well_formed": 1.0}
    assert [record["observed"] for record in result.records()] == values


def test_one_example_has_no_standard_error() -> None:
    summary = Evaluation([Episode(0, transcript=spoken(), reward=0.5)]).summary()
    assert summary["standard_error"] is None
    assert reward_text(summary) == "0.500 (n=1)"
