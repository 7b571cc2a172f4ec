"""The vector environment: autoreset, masks, seeds, final observations, aliasing, errors."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from tests.textenvs.toys import EXAMPLES, Chat, Echo, random_actions, same
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv

EOS = 0
MODES = list(AutoresetMode)
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(mode.value))


def started(mode: AutoresetMode = AutoresetMode.NEXT_STEP, **kwargs: Any) -> TextVectorEnv:
    env = TextVectorEnv(Echo, 3, autoreset_mode=mode, **kwargs)
    env.reset(seed=0)
    return env


def act(*tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(tokens, dtype=np.int64)


def lengths(observation: dict[str, Any]) -> list[int]:
    return observation["response_length"][:, 0].tolist()  # type: ignore[no-any-return]


def test_next_step_mode_shows_the_end_and_then_resets_without_the_action() -> None:
    env = started()
    observation, rewards, terminated, _, info = env.step(act(EOS, 5, EOS))
    assert lengths(observation) == [1, 1, 1] and terminated.tolist() == [True, False, True]
    assert info["_transcript"].tolist() == [True, False, True]
    # The action of a slot that is reset is not looked at, as long as it is a number.
    observation, rewards, terminated, _, info = env.step(act(10**6, 6, 7))
    assert lengths(observation) == [0, 2, 0]
    assert not terminated.any() and rewards.tolist() == [0, 0, 0] and info == {}
    assert lengths(env.step(act(5, 6, 7))[0]) == [1, 3, 1]


def test_same_step_mode_resets_at_once_and_keeps_the_end_in_info() -> None:
    env = started(AutoresetMode.SAME_STEP)
    env.step(act(9, 5, 5))
    observation, rewards, terminated, _, info = env.step(act(EOS, 5, 5))
    assert lengths(observation) == [0, 2, 2] and terminated.tolist() == [True, False, False]
    assert info["final_obs"][0]["response"][:2].tolist() == [9, EOS]
    assert info["final_obs"][1] is None and info["final_obs"][2] is None
    final = info["final_info"]
    assert final["transcript"][0].response_tokens == 2
    assert final["reward_terms"]["task"].tolist() == rewards.tolist()
    assert "transcript" not in info
    kept = copy.deepcopy(info["final_obs"][0])
    env.step(act(EOS, EOS, EOS))
    assert same(info["final_obs"][0], kept)


def test_same_step_mode_reports_turns_in_the_middle_of_an_episode_as_usual() -> None:
    env = TextVectorEnv(Chat, 2, autoreset_mode="SameStep")
    env.reset(seed=0)
    *_, info = env.step(act(EOS, 5))
    assert info["_transcript"].tolist() == [True, False] and "final_info" not in info
    env.step(act(EOS, 5))
    *_, info = env.step(act(EOS, EOS))
    assert info["_transcript"].tolist() == [False, True]
    assert info["final_info"]["_transcript"].tolist() == [True, False]


def test_disabled_mode_waits_for_the_reset() -> None:
    env = started(AutoresetMode.DISABLED)
    env.step(act(EOS, 5, 5))
    with pytest.raises(ResetNeeded, match=r"slots \[0\].*reset_mask"):
        env.step(act(5, 5, 5))
    observation, info = env.reset(options={"reset_mask": np.array([True, False, False])})
    assert lengths(observation) == [0, 1, 1] and info == {}
    assert lengths(env.step(act(5, 5, 5))[0]) == [1, 2, 2]


@every_mode
def test_stepping_before_reset_is_an_error(mode: AutoresetMode) -> None:
    with pytest.raises(ResetNeeded, match="have not started"):
        TextVectorEnv(Echo, 2, autoreset_mode=mode).step(act(5, 5))


@every_mode
def test_a_masked_reset_leaves_the_other_slots_alone(mode: AutoresetMode) -> None:
    env = started(mode, max_episode_steps=4)
    env.step(act(5, 6, 7))
    mask = np.array([False, True, False])
    options = {"reset_mask": mask, "example": 2}
    observation, _ = env.reset(seed=[1, 2, 3], options=options)
    assert options == {"reset_mask": mask, "example": 2} and mask.tolist() == [False, True, False]
    assert lengths(observation) == [1, 0, 1]
    assert env.engine.example(1) == EXAMPLES[2]
    assert env.np_random_seed == (0, 2, 2)
    env.step(act(5, 6, 7))
    env.step(act(5, 6, 7))
    truncated = env.step(act(5, 6, 7))[3]
    assert truncated.tolist() == [True, False, True]


@every_mode
def test_masked_resets_are_what_sync_does(mode: AutoresetMode) -> None:
    native = TextVectorEnv(Chat, 3, autoreset_mode=mode)
    sync = SyncVectorEnv([lambda: TextEnv(Chat)] * 3, autoreset_mode=mode)
    rng, space = np.random.default_rng(0), native.single_action_space
    assert same(native.reset(seed=[5, 6, 7]), sync.reset(seed=[5, 6, 7]))
    for _ in range(200):
        actions = random_actions(rng, space, 3)
        ours, theirs = native.step(actions), sync.step(actions)
        assert same(ours, theirs)
        done = ours[2] | ours[3]
        chosen = rng.random(3) < 0.2
        mask = done | chosen if mode == AutoresetMode.DISABLED else chosen
        if mask.any():
            seed = None if rng.random() < 0.5 else int(rng.integers(100))
            assert same(
                native.reset(seed=seed, options={"reset_mask": mask}),
                sync.reset(seed=seed, options={"reset_mask": mask.copy()}),
            )


def test_seeds_are_counted_up_or_given_one_by_one() -> None:
    env = TextVectorEnv(Chat, 3)
    first, _ = env.reset(seed=5)
    assert env.np_random_seed == (5, 6, 7)
    second, _ = env.reset(seed=[5, 6, 7])
    third, _ = env.reset(seed=(5, 6, 7))
    assert same(first, second) and same(second, third)
    states = [rng.bit_generator.state for rng in env.np_random]
    env.reset(seed=[None, 3, None])
    assert env.np_random_seed == (5, 3, 7)
    assert env.np_random[1].bit_generator.state != states[1]
    with pytest.raises(ValueError, match="Expected 3 seeds, one for each slot, got 2"):
        env.reset(seed=[1, 2])


def test_examples_are_picked_for_all_slots_or_one_by_one() -> None:
    env = started()
    env.reset(options={"example": 1})
    assert [env.engine.example(slot) for slot in range(3)] == [EXAMPLES[1]] * 3
    env.reset(options={"example": [2, 0, 1]})
    assert [env.engine.example(slot) for slot in range(3)] == [EXAMPLES[i] for i in (2, 0, 1)]
    env.reset(options={"example": np.array([0, 0, 1])})
    assert env.engine.example(2) == EXAMPLES[1]
    with pytest.raises(ValueError, match=r"one for each of the 3 slots, but it has 2"):
        env.reset(options={"example": [0, 1]})
    with pytest.raises(ValueError, match=r"\[0, 3\).*but it is 9"):
        env.reset(options={"example": 9})


@pytest.mark.parametrize(
    "mask",
    [np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3, dtype=int), [[True]]],
    ids=["none", "short", "integers", "nested"],
)
def test_a_reset_mask_is_boolean_of_the_right_length(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"reset_mask.*boolean array of shape \(3,\)"):
        started().reset(options={"reset_mask": mask})


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (act(5, 5), r"3 integers, but they have shape \(2,\)"),
        (np.ones(3), "3 integers, .* dtype float64"),
        (act(5, 5, -1), r"\[0, \d+\).*-1"),
        (act(5, 5, 10**6), r"\[0, \d+\).*1000000"),
    ],
)
def test_bad_actions_change_nothing(actions: Any, message: str) -> None:
    env = started(max_episode_steps=2)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    observation, _, _, truncated, _ = env.step(act(5, 5, 5))
    assert lengths(observation) == [1, 1, 1] and not truncated.any()


@every_mode
def test_observations_are_copies_unless_live_ones_are_asked_for(mode: AutoresetMode) -> None:
    env = started(mode)
    first = env.step(act(5, 6, 7))[0]
    kept = copy.deepcopy(first)
    env.step(act(8, 9, 10))
    assert same(first, kept)
    first["response"][:] = 3
    assert env.step(act(5, 5, 5))[0]["response"][0, :3].tolist() == [5, 8, 5]

    live = TextVectorEnv(Echo, 3, autoreset_mode=mode, copy=False)
    first, _ = live.reset(seed=0)
    assert live.step(act(5, 6, 7))[0]["response"] is first["response"]
    assert first["response"][:, 0].tolist() == [5, 6, 7]


@every_mode
def test_results_of_a_step_stay_what_they_were(mode: AutoresetMode) -> None:
    env = started(mode, max_episode_steps=5)
    rng, space = np.random.default_rng(0), env.single_action_space
    results, kept = [], []
    for _ in range(20):
        results.append(env.step(random_actions(rng, space, 3)))
        kept.append(copy.deepcopy(results[-1]))
        done = results[-1][2] | results[-1][3]
        if mode == AutoresetMode.DISABLED and done.any():
            env.reset(options={"reset_mask": done})
    assert same(results, kept)


def test_a_time_limit_may_coincide_with_the_end() -> None:
    env = started(AutoresetMode.SAME_STEP, max_episode_steps=2)
    env.step(act(5, 5, 5))
    _, _, terminated, truncated, info = env.step(act(5, EOS, 5))
    assert terminated.tolist() == [False, True, False] and truncated.tolist() == [True] * 3
    assert info["_final_obs"].tolist() == [True] * 3
    assert info["final_info"]["_transcript"].tolist() == [False, True, False]


def test_interleaved_envs_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(0)
    actions = [random_actions(rng, started().single_action_space, 3) for _ in range(50)]
    alone = started()
    expected = [alone.step(action) for action in actions]
    first, second = started(), started(AutoresetMode.SAME_STEP)
    got = []
    for action in actions:
        second.step(np.flip(action))
        got.append(first.step(action))
    assert same(expected, got)


def test_a_deep_copy_in_the_middle_of_an_episode_goes_on_alike() -> None:
    env = TextVectorEnv(Chat, 3)
    env.reset(seed=0)
    env.step(act(5, 6, EOS))
    twin = copy.deepcopy(env)
    rng, space = np.random.default_rng(0), env.single_action_space
    for _ in range(50):
        actions = random_actions(rng, space, 3)
        assert same(env.step(actions), twin.step(actions))


@every_mode
def test_record_episode_statistics(mode: AutoresetMode) -> None:
    env = RecordEpisodeStatistics(TextVectorEnv(Chat, 2, autoreset_mode=mode))
    env.reset(seed=0)
    env.step(act(EOS, 5))
    env.step(act(EOS, 5))
    *_, info = env.step(act(EOS, 5))
    info = info.get("final_info", info) if "episode" not in info else info
    assert info["episode"]["r"].tolist() == [3.0, 0.0]
    assert info["episode"]["l"].tolist() == [3, 0]


def test_constructor_errors() -> None:
    with pytest.raises(ValueError, match="num_envs must be at least 1, but it is 0"):
        TextVectorEnv(Echo, 0)
    with pytest.raises(ValueError, match="None or 'ansi', but it is 'human'"):
        TextVectorEnv(Echo, 2, render_mode="human")
    with pytest.raises(ValueError, match="AutoresetMode"):
        TextVectorEnv(Echo, 2, autoreset_mode="sometimes")


def test_render_returns_a_text_for_each_slot() -> None:
    assert started().render() is None
    env = started(render_mode="ansi")
    env.step(act(EOS, 5, 5))
    texts = env.render()
    assert texts is not None and len(texts) == 3
    assert "reward" in texts[0] and "reward" not in texts[1]
    env.step(act(5, 5, 5))
    again = env.render()
    assert again is not None and "reward" not in again[0]


def test_make_vec_passes_time_limits_on() -> None:
    env = gym.make_vec("TextGen-v0", num_envs=2, max_episode_steps=3)
    env.reset(seed=0)
    assert [bool(env.step(act(5, 5))[3].all()) for _ in range(3)] == [False, False, True]


@every_mode
def test_advance_and_restart_are_steps_and_resets_without_autoreset(mode: AutoresetMode) -> None:
    stepped = TextVectorEnv(Chat, 3, autoreset_mode="Disabled", max_episode_steps=11)
    advanced = TextVectorEnv(Chat, 3, autoreset_mode=mode, max_episode_steps=11)
    assert same(stepped.reset(seed=3), advanced.reset(seed=3))
    rng, space = np.random.default_rng(0), stepped.single_action_space
    ended = 0
    for _ in range(100):
        actions = random_actions(rng, space, 3)
        theirs, ours = stepped.step(actions), advanced.advance(actions)
        assert same(ours[:4], theirs[:4])
        batched, infos = theirs[4], ours[4]
        assert sorted(infos) == np.flatnonzero(batched.get("_transcript", [])).tolist()
        for slot, info in infos.items():
            assert info["transcript"] == batched["transcript"][slot]
            assert info["reward_terms"] == {"task": batched["reward_terms"]["task"][slot]}
        done = ours[2] | ours[3]
        if done.any():
            ended += 1
            restarted = advanced.restart(np.flatnonzero(done), ours[0])
            assert restarted is ours[0]
            assert same(stepped.reset(options={"reset_mask": done})[0], restarted)
            assert restarted.prompt_versions.tolist() == (
                advanced.engine.observe().prompt_versions.tolist()
            )
    assert ended > 5
    assert same(stepped.get_state(), advanced.get_state())


def test_advance_leaves_other_slots_where_they_are() -> None:
    env = started(max_episode_steps=2)
    before = env.get_state()
    observation, rewards, terminated, truncated, infos = env.advance(act(-1, EOS, 6), act(1, 2))
    assert lengths(observation) == [0, 1, 1] and list(infos) == [1]
    assert terminated.tolist() == [False, True, False] and rewards[0] == 0
    *_, truncated, infos = env.advance(act(5, 5, 6), act(0, 2))
    assert truncated.tolist() == [False, False, True] and infos == {}
    with pytest.raises(ResetNeeded, match=r"slots \[1, 2\] are over"):
        env.advance(act(5, 5, 5))
    with pytest.raises(ResetNeeded, match=r"slots \[2\] are over"):
        env.advance(act(5, 5, 5), act(0, 2))
    observation = env.restart(act(2))
    assert lengths(observation) == [1, 1, 0]
    assert lengths(env.advance(act(5, 5, 5), act(0, 2))[0]) == [2, 1, 1]
    after = env.get_state()
    assert after["generators"][:2] == before["generators"][:2] != after["generators"][2]


def test_advance_and_restart_hold_to_indices_and_to_a_first_reset() -> None:
    with pytest.raises(ValueError, match=r"slots must be indices, .* dtype bool.*flatnonzero"):
        started().advance(act(5, 5, 5), np.array([True, False, True]))
    with pytest.raises(ResetNeeded, match="No episode has started yet"):
        TextVectorEnv(Echo, 2).restart(act(0))
    with pytest.raises(ResetNeeded, match="have not started"):
        TextVectorEnv(Echo, 2).advance(act(5, 5))


def test_what_is_done_to_an_info_does_not_reach_the_environment() -> None:
    env = started(render_mode="ansi")
    shown = env.advance(act(EOS, 5, 5))[4]
    rendered, state = env.render(), copy.deepcopy(env.get_state())
    shown[0]["reward_terms"].clear()
    shown[0]["episode"] = 1
    assert env.render() == rendered and same(env.get_state(), state)


def test_live_observations_stay_live_when_slots_are_restarted() -> None:
    env = TextVectorEnv(Echo, 2, copy=False)
    first, _ = env.reset(seed=0)
    observation = env.advance(act(EOS, 5))[0]
    again = env.restart(act(0), observation)
    assert again["response"] is first["response"] and lengths(first) == [0, 1]
