"""One sweep over the registered environments: whoever registers a task has it tested here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3

import textenvs
from tests.textenvs.toys import random_actions, same
from textenvs.checks import check_text_env
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.registration import BUILTIN_TASKS, load_task

MODES = list(AutoresetMode)
# Short enough for episodes to end by EOS and by their budgets in a few steps.
BUDGET = 9
SLOTS = 2
# Within a turn for single-turn tasks, across turns for a dialogue.
STEP_LIMIT = {"Dialogue-v0": 15}

every_id = pytest.mark.parametrize("env_id", BUILTIN_TASKS)
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(mode.value))


@pytest.fixture(params=["embedded", "hf"])
def tokenizer(request: pytest.FixtureRequest) -> str | None:
    """The embedded tokenizer, and a Hugging Face one by its path."""
    return (
        None if request.param == "embedded" else str(request.getfixturevalue("hf_tokenizer_path"))
    )


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def step_limit(env_id: str) -> int:
    return STEP_LIMIT.get(env_id, BUDGET - 2)


def space_of(env: VectorEnv[Any, Any, Any]) -> Any:
    return env.single_action_space


def step_all(env: VectorEnv[Any, Any, Any], actions: Any) -> tuple[Any, ...]:
    """Step; without autoreset, reset the finished slots and return what that returned, too."""
    result = env.step(actions)
    done = np.logical_or(result[2], result[3])
    if env.metadata["autoreset_mode"] == AutoresetMode.DISABLED and done.any():
        return (*result, env.reset(options={"reset_mask": done}))
    return result


def test_the_ids_are_registered() -> None:
    assert set(BUILTIN_TASKS) <= set(textenvs.task_ids())
    assert set(BUILTIN_TASKS) == {
        "TextGen-v0",
        "Dialogue-v0",
        "Translation-v0",
        "TextClassification-v0",
    }


@every_id
def test_gymnasium_check_env(env_id: str, tokenizer: str | None, no_warnings: None) -> None:
    check_env(gym.make(env_id, tokenizer=tokenizer).unwrapped)


@every_id
def test_sb3_check_env(env_id: str, tokenizer: str | None, no_warnings: None) -> None:
    check_env_for_sb3(gym.make(env_id, tokenizer=tokenizer))


@every_id
def test_check_text_env(env_id: str, tokenizer: str | None) -> None:
    check_text_env(gym.make(env_id, tokenizer=tokenizer), episodes=5)


@every_id
@every_mode
@pytest.mark.parametrize("vectorization", ["native", "sync", "async"])
def test_vector_env_api(
    env_id: str, mode: AutoresetMode, vectorization: str, no_warnings: None
) -> None:
    kwargs: dict[str, Any] = {"max_new_tokens": BUDGET}
    if vectorization == "native":
        kwargs["autoreset_mode"] = mode
    else:
        kwargs["vectorization_mode"] = vectorization
        kwargs["vector_kwargs"] = {"autoreset_mode": mode}
    env = gym.make_vec(env_id, num_envs=2, **kwargs)
    assert env.metadata["autoreset_mode"] is mode
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    assert info == {}
    assert env.observation_space.contains(observation)
    dones = 0
    for _ in range(100):
        actions = random_actions(rng, space_of(env), 2)
        assert env.action_space.contains(actions)
        observation, rewards, terminated, truncated, info = step_all(env, actions)[:5]
        assert env.observation_space.contains(observation)
        assert rewards.shape == (2,) and rewards.dtype == np.float64
        assert np.isfinite(rewards).all()
        assert terminated.shape == truncated.shape == (2,)
        assert terminated.dtype == truncated.dtype == np.bool_
        assert not truncated.any()
        ended = info.get("final_info", {}) if mode == AutoresetMode.SAME_STEP else info
        assert ("example" in ended) == terminated.any()
        dones += int(terminated.sum())
    assert dones > 0
    env.close()


@every_id
@every_mode
@pytest.mark.parametrize("limited", [False, True], ids=["budget", "time limit"])
def test_native_equals_gymnasium_sync(
    env_id: str,
    mode: AutoresetMode,
    limited: bool,
    tokenizer: str | None,
) -> None:
    """400 random steps, 200 with the second tokenizer: results, infos, and how episodes end."""
    limit = step_limit(env_id) if limited else None
    task = BUILTIN_TASKS[env_id]
    kwargs: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": BUDGET}
    kwargs["dataset"] = load_task(task).examples("test")
    kwargs["reply_tokens"] = 100  # so that no conversation is too long for its budget

    def single() -> gym.Env[Any, Any]:
        env = TextEnv(task, **kwargs)
        return env if limit is None else TimeLimit(env, limit)

    native = TextVectorEnv(task, SLOTS, max_episode_steps=limit, autoreset_mode=mode, **kwargs)
    sync = SyncVectorEnv([single] * SLOTS, autoreset_mode=mode)
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert native.single_action_space == sync.single_action_space
    assert same(native.reset(seed=7), sync.reset(seed=7))
    rng = np.random.default_rng(1)
    seen = {"eos": 0, "budget": 0, "truncated": 0}
    for _ in range(400 if tokenizer is None else 200):
        actions = random_actions(rng, space_of(native), SLOTS)
        ours, theirs = step_all(native, actions), step_all(sync, actions)
        assert same(ours, theirs)
        info = ours[4]["final_info"] if "final_info" in ours[4] else ours[4]
        for transcript in info.get("transcript", ()):
            if transcript is not None:
                seen["eos" if transcript.stopped else "budget"] += 1
        seen["truncated"] += int((ours[3] & ~ours[2]).sum())
    assert seen["eos"] > 10
    assert (seen["truncated"] > 0) == limited
    # A single turn cut off in time never gets to the end of its budget.
    assert (seen["budget"] > 0) == (not limited or env_id in STEP_LIMIT)


@every_id
def test_native_equals_single_envs(env_id: str, tokenizer: str | None) -> None:
    """The same without Gymnasium's vector envs in between."""
    kwargs: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": BUDGET}
    kwargs["reply_tokens"] = 100
    native = gym.make_vec(env_id, num_envs=SLOTS, autoreset_mode="Disabled", **kwargs)
    singles = [gym.make(env_id, **kwargs) for _ in range(SLOTS)]
    batch, _ = native.reset(seed=11)
    rows = [env.reset(seed=11 + i)[0] for i, env in enumerate(singles)]
    rng = np.random.default_rng(2)
    for _ in range(300):
        for i, row in enumerate(rows):
            assert all(np.array_equal(batch[key][i], row[key]) for key in row)
        actions = random_actions(rng, space_of(native), SLOTS)
        batch, rewards, terminated, truncated, infos = native.step(actions)
        for i, env in enumerate(singles):
            row, reward, *flags, info = env.step(actions[i])
            assert all(np.array_equal(batch[key][i], row[key]) for key in row)
            assert [reward, *flags] == [rewards[i], terminated[i], truncated[i]]
            assert ("transcript" in info) == bool(infos.get("_transcript", np.zeros(SLOTS))[i])
            if info:
                assert infos["transcript"][i] == info["transcript"]
            rows[i] = env.reset()[0] if flags[0] else row
        if terminated.any():
            batch, _ = native.reset(options={"reset_mask": terminated})


def run(env: gym.Env[Any, Any], seed: int | None, steps: int = 60) -> list[Any]:
    """Play on with random tokens and return everything that came."""
    rng, space = np.random.default_rng(0), cast("Any", env.unwrapped.action_space)
    record: list[Any] = [] if seed is None else [env.reset(seed=seed)]
    for action in random_actions(rng, space, steps):
        record.append(env.step(action))
        if record[-1][2]:
            record.append(env.reset())
    return record


@every_id
def test_same_seed_same_run_and_another_seed_another(env_id: str) -> None:
    first, second = gym.make(env_id), gym.make(env_id)
    run(second, seed=5)  # what was played before does not matter
    assert same(run(first, seed=3), run(second, seed=3))
    assert not same(run(first, seed=3), run(second, seed=4))


@every_id
def test_interleaved_envs_and_global_generators_do_not_matter(env_id: str) -> None:
    alone = run(gym.make(env_id), seed=3)
    np.random.seed(5)
    state = repr(np.random.get_state())
    first, second = gym.make(env_id), gym.make(env_id)
    first.reset(seed=3)
    run(second, seed=9)
    assert same(run(first, seed=3), alone)
    assert repr(np.random.get_state()) == state


@every_id
@pytest.mark.parametrize("module_name", ["pickle", "cloudpickle"])
def test_pickling_in_the_middle_of_an_episode(env_id: str, module_name: str) -> None:
    module = importlib.import_module(module_name)
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    if env_id != "TextClassification-v0":
        env.step(5)
    twin = module.loads(module.dumps(env))
    assert same(run(env, seed=None), run(twin, seed=None))


@every_id
def test_spec_round_trip(env_id: str) -> None:
    env = gym.make(env_id, max_new_tokens=BUDGET, split="test", max_episode_steps=5)
    assert env.spec is not None
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        twin = gym.make(spec)
        assert isinstance(twin.unwrapped, TextEnv)
        assert twin.observation_space == env.observation_space
        assert twin.unwrapped.engine.split == "test"
        assert twin.spec is not None and twin.spec.max_episode_steps == 5
        assert same(twin.reset(seed=1), env.reset(seed=1))
    vector = gym.make_vec(env_id, num_envs=2, max_new_tokens=BUDGET)
    assert vector.spec is not None
    again = gym.make_vec(vector.spec)
    assert again.num_envs == 2 and again.observation_space == vector.observation_space


@every_id
def test_make_through_the_module_name(env_id: str) -> None:
    assert isinstance(gym.make(f"textenvs:{env_id}").unwrapped, TextEnv)
    assert isinstance(gym.make_vec(f"textenvs:{env_id}", num_envs=2).unwrapped, TextVectorEnv)


@every_id
def test_splits_differ_and_render_modes_work(env_id: str) -> None:
    prompts = []
    for split in ("train", "validation", "test"):
        env = gym.make(env_id, split=split, render_mode="ansi")
        env.reset(seed=0)
        assert str(env.render())
        assert isinstance(env.unwrapped, TextEnv)
        prompts.append(
            {(e.prompt, repr(e.data), e.references) for e in env.unwrapped.engine.examples}
        )
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
