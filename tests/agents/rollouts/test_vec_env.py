from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from agents import GymnasiumVecEnv
from tests.agents.helpers import vec_env
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards import LengthPenalty

NUM_ENVS = 3
KWARGS: dict[str, dict[str, Any]] = {
    "TextGen-v0": {"max_new_tokens": 9},
    "Dialogue-v0": {"max_new_tokens": 6, "max_prompt_tokens": 240},
    "TextClassification-v0": {"max_new_tokens": 3},
}
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


def reward() -> list[Any]:
    return ["task", LengthPenalty(weight=0.5, target=2)]


def adapted(
    env_id: str, vectorization: str = "native", mode: AutoresetMode = MODES[0], **kwargs: Any
) -> GymnasiumVecEnv:
    kwargs = {**KWARGS.get(env_id, {}), **kwargs}
    if vectorization == "native":
        env = gym.make_vec(env_id, num_envs=NUM_ENVS, autoreset_mode=mode, **kwargs)
    else:
        env = gym.make_vec(
            env_id,
            num_envs=NUM_ENVS,
            vectorization_mode=vectorization,
            vector_kwargs={"autoreset_mode": mode},
            **kwargs,
        )
    assert env.metadata["autoreset_mode"] == mode
    return GymnasiumVecEnv(env)


def dummy(env_id: str, **kwargs: Any) -> DummyVecEnv:
    kwargs = {**KWARGS.get(env_id, {}), **kwargs}
    return DummyVecEnv([lambda: gym.make(env_id, **kwargs) for _ in range(NUM_ENVS)])


def actions_of(env_id: str, steps: int) -> Any:
    rng = np.random.default_rng(0)
    if env_id == "CartPole-v1":
        return rng.integers(0, 2, (steps, NUM_ENVS))
    tokens = rng.integers(1, 2000, (steps, NUM_ENVS))
    return np.where(rng.random((steps, NUM_ENVS)) < 0.15, 0, tokens)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Mapping):
        assert set(ours) == set(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, np.ndarray):
        assert ours.shape == theirs.shape and np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    else:
        assert ours == theirs


def assert_follows(ours: Any, theirs: Any, env_id: str, steps: int = 60) -> list[dict[str, Any]]:
    """Step both and compare; return the infos of the ends of episodes."""
    for env in (ours, theirs):
        env.seed(7)
    assert_same(ours.reset(), theirs.reset())
    ends = []
    for actions in actions_of(env_id, steps):
        mine, other = ours.step(actions), theirs.step(actions)
        for part in range(3):  # observations, rewards, dones
            assert_same(mine[part], other[part])
        for i, (info, expected) in enumerate(zip(mine[3], other[3], strict=True)):
            # SB3 says "not truncated" on every step, we on the last one.
            truncated = expected.pop("TimeLimit.truncated")
            assert info.pop("TimeLimit.truncated", False) == truncated
            if "episode" in expected:
                for each in (info, expected):
                    each["episode"].pop("t")
            assert_same(info, expected)
            if other[2][i]:
                assert "terminal_observation" in info
                ends.append({**info, "truncated": truncated})
    return ends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorization", ["native", "sync"])
@pytest.mark.parametrize("env_id", list(KWARGS))
def test_steps_as_sb3s_own_do(env_id: str, vectorization: str, mode: AutoresetMode) -> None:
    ours = adapted(env_id, vectorization, mode, reward=reward())
    ends = assert_follows(ours, dummy(env_id, reward=reward()), env_id)
    assert len(ends) >= 2
    for info in ends:
        assert not info["truncated"]
        assert {"transcript", "reward_terms", "is_success", "example"} <= set(info)
        assert set(info["reward_terms"]) == {"task", "length_penalty"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorization", ["native", "sync"])
@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_truncation_is_told_from_termination(
    env_id: str, vectorization: str, mode: AutoresetMode
) -> None:
    ours = adapted(env_id, vectorization, mode, max_episode_steps=5)
    ends = assert_follows(ours, dummy(env_id, max_episode_steps=5), env_id)
    truncated = [info["truncated"] for info in ends]
    assert any(truncated)
    if env_id == "TextGen-v0":
        assert not all(truncated)
    # The observation to bootstrap from is the episode's last, not the next one's first.
    for info in ends:
        assert info["terminal_observation"]["response_length"][0] > 0 or env_id == "Dialogue-v0"


class Plain(gym.Env[Any, Any]):
    """One that has a tokenizer, and nothing else of ours."""

    observation_space = action_space = gym.spaces.Discrete(2)
    tokenizer = "some"


def test_workers_are_not_asked_for_what_they_lack() -> None:
    env = GymnasiumVecEnv(gym.vector.AsyncVectorEnv([Plain, Plain]))
    assert env.has_attr("tokenizer") and not env.has_attr("codec")
    assert env.get_attr("tokenizer") == ["some", "some"]
    env.close()


@pytest.mark.parametrize("mode", MODES)
def test_async_steps_as_sb3s_own_do(mode: AutoresetMode) -> None:
    ours = adapted("TextGen-v0", "async", mode)
    try:
        assert len(assert_follows(ours, dummy("TextGen-v0"), "TextGen-v0", 20)) > 2
        assert ours.get_attr("render_mode") == [None] * NUM_ENVS
    finally:
        ours.close()


@pytest.mark.parametrize("mode", MODES)
def test_other_environments(mode: AutoresetMode) -> None:
    ours = adapted("CartPole-v1", "sync", mode)
    assert len(assert_follows(ours, dummy("CartPole-v1"), "CartPole-v1", 100)) > 5


def test_environment_that_cannot_reset_some_slots() -> None:
    # CartPole's own vector environment would reset all of them.
    with pytest.raises(ValueError, match="vectorization_mode='sync'"):
        GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, "vector_entry_point"))


@pytest.mark.parametrize("mode", MODES)
def test_monitor_sees_the_same_episodes(mode: AutoresetMode) -> None:
    ours = VecMonitor(adapted("Dialogue-v0", mode=mode))
    ends = assert_follows(ours, VecMonitor(dummy("Dialogue-v0")), "Dialogue-v0", 150)
    assert ends and all(info["episode"]["l"] > 1 for info in ends)


def test_normalised_rewards() -> None:
    ours, theirs = (
        VecNormalize(env, norm_obs=False) for env in (adapted("TextGen-v0"), dummy("TextGen-v0"))
    )
    assert assert_follows(ours, theirs, "TextGen-v0")
    assert ours.ret_rms.var == theirs.ret_rms.var != 1


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_gymnasiums_wrappers_are_the_same_in_every_mode(
    vectorization: str, mode: AutoresetMode
) -> None:
    """Resetting the finished slots alone leaves the others' returns what they were."""

    def wrapped(mode: AutoresetMode) -> Any:
        env = adapted("Dialogue-v0", vectorization, mode).env
        normalized = vector_wrappers.NormalizeReward(env, gamma=1.0)
        return GymnasiumVecEnv(vector_wrappers.RecordEpisodeStatistics(normalized))

    ours, theirs = wrapped(mode), wrapped(AutoresetMode.SAME_STEP)
    for env in (ours, theirs):
        env.seed(7)
        env.reset()
    lengths = set()
    for actions in actions_of("Dialogue-v0", 200):
        mine, other = ours.step(actions), theirs.step(actions)
        assert np.array_equal(mine[1], other[1]) and np.array_equal(mine[2], other[2])
        for info, same in zip(mine[3], other[3], strict=True):
            assert ("episode" in info) == ("episode" in same)
            if "episode" in info:
                assert (info["episode"]["r"], info["episode"]["l"]) == (
                    same["episode"]["r"],
                    same["episode"]["l"],
                )
                lengths.add(int(info["episode"]["l"]))
    assert len(lengths) > 3


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_observations_are_not_changed_by_the_next_step(vectorization: str) -> None:
    kwargs: dict[str, Any] = {"copy": False}
    if vectorization == "sync":
        kwargs = {"vectorization_mode": "sync", "vector_kwargs": {"copy": False}}
    env = GymnasiumVecEnv(gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=2, **kwargs))
    first: Any = env.reset()
    second: Any
    second, rewards, _, _ = env.step(np.array([5, 6]))
    kept, earned = {k: v.copy() for k, v in second.items()}, rewards.copy()
    assert first["response_length"].tolist() == [[0], [0]]
    _, later, dones, infos = env.step(np.array([5, 6]))
    assert dones.all() and infos[0]["terminal_observation"]["response"].tolist() == [5, 5]
    assert_same(second, kept)
    later += 1
    env.step(np.array([5, 6]))
    assert np.array_equal(rewards, earned)


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_seeds_and_options_are_used_once(vectorization: str) -> None:
    env = adapted("TextGen-v0", vectorization)
    env.seed(3)
    first: Any = env.reset()
    second: Any = env.reset()
    env.seed(3)
    third: Any = env.reset()
    assert_same(first, third)
    assert not np.array_equal(first["prompt"], second["prompt"])
    env.set_options({"example": 5})
    chosen: Any = env.reset()
    assert (chosen["prompt"] == chosen["prompt"][0]).all()
    free: Any = env.reset()
    assert not (free["prompt"] == free["prompt"][0]).all()
    env.set_options([{"example": i} for i in range(NUM_ENVS)])
    with pytest.raises(ValueError, match="same options for all"):
        env.reset()


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_attributes(vectorization: str) -> None:
    env, theirs = adapted("TextGen-v0", vectorization), dummy("TextGen-v0")
    for name in ("observation_space", "action_space", "render_mode"):
        assert env.get_attr(name) == theirs.get_attr(name)
    assert env.has_attr("tokenizer") and not env.has_attr("nonsense")
    assert len(env.get_attr("tokenizer", indices=[0, 2])) == 2
    with pytest.raises(AttributeError):
        env.get_attr("nonsense")
    env.set_attr("mood", "good")
    assert env.get_attr("mood") == ["good"] * NUM_ENVS
    with pytest.raises(ValueError, match="all slots"):
        env.set_attr("mood", "bad", indices=0)
    assert env.get_attr("mood", indices=1) == ["good"]


def test_wrappers_are_found() -> None:
    inner = gym.make_vec("TextGen-v0", num_envs=2)
    env = GymnasiumVecEnv(gym.wrappers.vector.RecordEpisodeStatistics(inner))
    assert env.env_is_wrapped(gym.wrappers.vector.RecordEpisodeStatistics) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.vector.ClipReward) == [False, False]
    assert vec_env(num_envs=2).env_is_wrapped(gym.Wrapper, indices=0) == [False]


class Greeting(gym.Wrapper[Any, Any, Any, Any]):
    """Counts its resets in their info."""

    resets = 0

    def reset(self, **kwargs: Any) -> Any:
        self.resets += 1
        return super().reset(**kwargs)[0], {"resets": self.resets}


@pytest.mark.parametrize("mode", MODES)
def test_info_of_resets(mode: AutoresetMode) -> None:
    def make() -> gym.Env[Any, Any]:
        return Greeting(gym.make("TextGen-v0", max_new_tokens=9))

    ours = GymnasiumVecEnv(gym.vector.SyncVectorEnv([make] * NUM_ENVS, autoreset_mode=mode))
    theirs = DummyVecEnv([make] * NUM_ENVS)
    assert_follows(ours, theirs, "TextGen-v0", 40)
    assert [info["resets"] for info in theirs.reset_infos] == [
        info["resets"] for info in ours.reset_infos
    ]
    assert max(info["resets"] for info in ours.reset_infos) > 3


def twins(env_id: str, mode: AutoresetMode, **kwargs: Any) -> tuple[GymnasiumVecEnv, ...]:
    """The same environment as it is, and inside a wrapper that does nothing."""
    kwargs = {**KWARGS[env_id], "autoreset_mode": mode, "reward": reward(), **kwargs}
    env, inner = (gym.make_vec(env_id, num_envs=NUM_ENVS, **kwargs) for _ in range(2))
    both = (GymnasiumVecEnv(env), GymnasiumVecEnv(gym.vector.VectorWrapper(inner)))
    for each in both:
        each.seed(7)
    assert_same(*(each.reset() for each in both))
    return both


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", list(KWARGS))
def test_native_steps_are_those_through_a_wrapper(
    env_id: str, mode: AutoresetMode, copied: bool
) -> None:
    ours, theirs = twins(env_id, mode, max_episode_steps=14, copy=copied)
    kept = []
    ended = 0
    for actions in actions_of(env_id, 120):
        mine, other = ours.step(actions), theirs.step(actions)
        for part in range(3):
            assert_same(mine[part], other[part])
        for info, expected in zip(mine[3], other[3], strict=True):
            assert_same(info, expected)
        assert ours.reset_infos == theirs.reset_infos == [{}] * NUM_ENVS
        ended += int(mine[2].sum())
        observations: Any = mine[0]
        kept.append((observations, {key: value.copy() for key, value in observations.items()}))
    assert ended > 5
    for observations, values in kept:
        assert_same(observations, values)
    states = [each.env.unwrapped.get_state() for each in (ours, theirs)]  # type: ignore[attr-defined]
    assert states[0]["generators"] == states[1]["generators"]


def test_native_observations_know_the_versions_of_their_prompts() -> None:
    env = VecMonitor(adapted("Dialogue-v0"))
    before: Any = env.reset()
    changes = 0
    for actions in actions_of("Dialogue-v0", 60):
        after: Any
        after, _, _, infos = env.step(actions)
        same = before.prompt_versions == after.prompt_versions
        changes += int((~same).sum())
        assert same.tolist() == ["transcript" not in info for info in infos]
        assert (before["prompt"][same] == after["prompt"][same]).all()
        before = after
    assert changes > 5


class Counted(TextVectorEnv):
    """A step of its own."""

    steps = 0

    def step(self, actions: Any) -> Any:
        self.steps += 1
        return super().step(actions)


def test_a_step_of_a_subclass_is_not_passed_by() -> None:
    counted = Counted("TextGen-v0", 2)
    env = GymnasiumVecEnv(counted)
    env.reset()
    env.step(np.array([5, 6]))
    assert counted.steps == 1
    with pytest.raises(ValueError, match="Only a TextVectorEnv without"):
        env.active = np.array([True, False])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_inactive_slots_stay_where_they_are(env_id: str, mode: AutoresetMode) -> None:
    env, every = adapted(env_id, mode=mode), adapted(env_id, mode=mode)
    for each in (env, every):
        each.seed(7)
    before: Any = env.reset()
    every.reset()
    assert env.active is None
    rng = np.random.default_rng(0)
    # Slot by slot, what is stepped is what it would be if all slots stepped.
    paths: list[list[Any]] = [[] for _ in range(NUM_ENVS)]
    own: list[list[Any]] = [[] for _ in range(NUM_ENVS)]
    tokens = actions_of(env_id, 200)
    counts = np.zeros(NUM_ENVS, dtype=np.int64)
    for _ in range(90):
        mask = rng.random(NUM_ENVS) < 0.5
        env.active = mask
        assert env.active is not None and env.active.tolist() == mask.tolist()
        generators = env.env.unwrapped.get_state()["generators"]  # type: ignore[attr-defined]
        actions = np.array([tokens[count, slot] for slot, count in enumerate(counts)])
        after: Any
        after, rewards, dones, infos = env.step(np.where(mask, actions, -1))
        for slot in range(NUM_ENVS):
            row = {key: after[key][slot] for key in after}
            if mask[slot]:
                own[slot].append((row, rewards[slot], dones[slot], infos[slot]))
                continue
            assert (rewards[slot], dones[slot], infos[slot]) == (0, False, {})
            assert_same(row, {key: before[key][slot] for key in before})
            state = env.env.unwrapped.get_state()["generators"][slot]  # type: ignore[attr-defined]
            assert state == generators[slot]
        counts += mask
        before = after
    for actions in tokens[: counts.max()]:
        after, rewards, dones, infos = every.step(actions)
        for slot in range(NUM_ENVS):
            row = {key: after[key][slot] for key in after}
            paths[slot].append((row, rewards[slot], dones[slot], infos[slot]))
    for slot, count in enumerate(counts):
        assert count > 20 and any(done for _, _, done, _ in own[slot])
        for mine, theirs in zip(own[slot], paths[slot][:count], strict=True):
            for part in range(4):
                assert_same(mine[part], theirs[part])
    env.active = None
    _, _, _, infos = env.step(np.full(NUM_ENVS, 0))
    assert all("transcript" in info for info in infos)


def test_only_native_environments_have_inactive_slots() -> None:
    mask = np.array([True] * NUM_ENVS)
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("TextGen-v0", NUM_ENVS))
    for env in (GymnasiumVecEnv(wrapped), adapted("TextGen-v0", "sync")):
        env.active = None
        with pytest.raises(ValueError, match="Only a TextVectorEnv without Gymnasium's wrappers"):
            env.active = mask
    native = adapted("TextGen-v0")
    for bad in (mask[:2], mask.astype(int)):
        with pytest.raises(ValueError, match=r"None or a boolean array of shape \(3,\), but"):
            native.active = bad
    mask[:] = False
    native.active = mask
    native.reset()
    mask[:] = True
    _, rewards, dones, infos = native.step(np.full(NUM_ENVS, 0))
    assert not rewards.any() and not dones.any() and infos == [{}] * NUM_ENVS
