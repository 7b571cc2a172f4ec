"""Versions of prompts: when they change, and what becomes of them in copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from tests.textenvs.toys import Chat, random_actions, same
from textenvs.envs.engine import TextEngine
from textenvs.envs.observations import Observations
from textenvs.envs.vector_env import TextVectorEnv

EOS = 0
NUM_ENVS = 3


def started(**kwargs: Any) -> tuple[TextVectorEnv, Observations]:
    env = TextVectorEnv(Chat, NUM_ENVS, **kwargs)
    return env, env.reset(seed=0)[0]


def act(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.int64)


def changed(before: Observations, after: Observations) -> list[bool]:
    return list(after.prompt_versions != before.prompt_versions)


def test_a_version_changes_when_a_conversation_grows_and_when_an_episode_starts() -> None:
    env, first = started(autoreset_mode="Disabled")
    assert first.prompt_versions.shape == (NUM_ENVS,)
    assert first.prompt_versions.dtype == np.int64
    assert len(set(first.prompt_versions.tolist())) == NUM_ENVS
    second = env.step(act(5, 6, 7))[0]
    assert changed(first, second) == [False] * 3
    third = env.step(act(5, EOS, 7))[0]
    assert changed(second, third) == [False, True, False]
    env.step(act(5, EOS, 7))
    fourth = env.step(act(5, EOS, 7))[0]  # the last turn's end leaves its prompt
    assert env.engine.turns[1][-1].role == "agent"
    fifth, _ = env.reset(options={"reset_mask": np.array([False, True, True])})
    assert changed(fourth, fifth) == [False, True, True]
    versions = [o.prompt_versions[1] for o in (first, third, fourth, fifth)]
    assert versions == sorted(set(versions))


def test_one_version_means_one_prompt_and_a_response_that_grew() -> None:
    env, _ = started(autoreset_mode="SameStep", max_episode_steps=9)
    seen: dict[int, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    repeated = 0
    for _ in range(200):
        observations = env.step(random_actions(rng, env.single_action_space, NUM_ENVS))[0]
        for slot, version in enumerate(observations.prompt_versions.tolist()):
            now = {key: array[slot] for key, array in observations.items()}
            before = seen.get(version)
            if before is not None:
                repeated += 1
                length = before["response_length"][0]
                assert np.array_equal(now["prompt"], before["prompt"])
                assert now["response_length"][0] == length + 1
                assert np.array_equal(now["response"][:length], before["response"][:length])
            seen[version] = now
    assert repeated > 300 and len(seen) > 50


@pytest.mark.parametrize("copied", [True, False])
def test_versions_are_those_of_their_observation(copied: bool) -> None:
    env, first = started(copy=copied)
    kept = first.prompt_versions.copy()
    env.step(act(EOS, EOS, EOS))
    assert first.prompt_versions.tolist() == kept.tolist()


def test_a_state_that_is_set_has_new_versions() -> None:
    env, first = started()
    state = env.get_state()
    env.set_state(state)
    assert all(changed(first, env.step(act(5, 5, 5))[0]))


def test_environments_share_no_version() -> None:
    env, first = started()
    versions = first.prompt_versions.tolist()
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env)), TextVectorEnv(Chat, 3)):
        twin.reset(seed=0)
        versions += twin.step(act(5, 5, 5))[0].prompt_versions.tolist()
    # A copy may say other tokens from here, so it has new versions at once.
    twin = copy.deepcopy(env)
    twin.step(act(9, 9, 9))
    versions += twin.step(act(9, 9, 9))[0].prompt_versions.tolist()
    assert len(set(versions)) == 5 * NUM_ENVS
    assert changed(first, env.step(act(5, 5, 5))[0]) == [False] * 3


def test_slots_of_another_number_have_versions_of_their_own() -> None:
    engine = TextEngine(Chat, 2)
    other = engine.with_slots(2)
    mine, others = engine.observe().prompt_versions, other.observe().prompt_versions
    assert not set(mine.tolist()) & set(others.tolist())


def test_observations_are_dicts() -> None:
    env, observations = started()
    assert isinstance(observations, dict) and env.observation_space.contains(observations)
    plain = dict(observations)
    assert type(plain) is dict and not hasattr({**observations}, "prompt_versions")
    twin = copy.deepcopy(observations)
    assert isinstance(twin, Observations) and same(twin, plain)
    assert twin.prompt_versions.tolist() == observations.prompt_versions.tolist()
    twin["prompt"][:] = 3
    twin.prompt_versions[:] = 3
    assert same(observations, plain) and 3 not in observations.prompt_versions
    # Versions of another process would mean nothing.
    loaded = pickle.loads(pickle.dumps(observations))
    assert type(loaded) is dict and same(loaded, plain)
