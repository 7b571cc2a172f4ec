"""With `whole_episodes`, what the end of a rollout cuts is learned when it is complete."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import PPO, Reinforce
from tests.agents.agents import NUM_ENVS, collect, make_agent, same, shake, train, weights
from tests.agents.oracle import Diary

SHORT: dict[str, Any] = {"n_steps": 5, "batch_size": 16}
Episode = list[tuple[list[int], int, float, float]]


def learned(model: Any) -> list[tuple[int, Episode]]:
    """The slot of each sequence to learn from; and context, token, reward, log-probability."""
    buffer, found = model.rollout_buffer, []
    for sequence in buffer.sequences:
        row, at = [], buffer.index([sequence])
        batch = buffer.collate([sequence])
        positions = batch.action_positions[0].nonzero()[:, 0].tolist()
        for place, step in zip(positions, zip(*at, strict=True), strict=True):
            context = batch.tokens[0, : place + 1].tolist()
            numbers = float(buffer.rewards[step]), float(buffer.log_probs[step])
            row.append((context, int(buffer.actions[step]), *numbers))
        found.append((sequence.env, row))
    return found


@pytest.mark.parametrize("n_steps", [1, 5, 24])
@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_nothing_is_lost_and_nothing_is_learned_twice(kind: str, n_steps: int) -> None:
    model = make_agent(kind, whole_episodes=True, n_steps=n_steps, batch_size=None)
    diary, log_probs, found, versions = Diary(), [], [], []

    def note(local: dict[str, Any]) -> None:
        diary(local)
        log_probs.append(local["log_probs"].tolist())

    rollouts = 72 // n_steps
    for number in range(rollouts):
        model._n_updates = number
        collect(model, note, fresh=number == 0)
        found += learned(model)
        versions += [(s.env, s.policy_version) for s in model.rollout_buffer.sequences]
    expected, begun = [], []
    for slot in range(NUM_ENVS):
        tokens = [token for token in diary.tokens if token.slot == slot]
        episode: Episode = []
        for token in tokens:
            own = log_probs[token.step][slot]
            episode.append((token.context, token.token, token.reward, own))
            if token.ends:
                expected.append((slot, episode))
                begun.append((slot, token.step - len(episode) + 1))
                episode = []
    assert len(expected) > 10
    for k in range(NUM_ENVS):
        assert [row for slot, row in found if slot == k] == [r for s, r in expected if s == k]
    # And it is known which policy began them, however often they were cut.
    assert sorted(versions) == sorted((slot, step // n_steps) for slot, step in begun)


def test_advantages_are_those_of_the_whole_episode() -> None:
    whole = collect(make_agent("several turns", n_steps=40))
    cut = make_agent("several turns", whole_episodes=True, **SHORT)  # seeds anew
    expected = {
        tuple(whole.rollout_buffer.actions[at := whole.rollout_buffer.index([s])].tolist()): (
            whole.rollout_buffer.advantages[at]
        )
        for s in whole.rollout_buffer.sequences
        if whole.rollout_buffer.is_complete(s)
    }
    count = 0
    for number in range(8):
        buffer = collect(cut, fresh=number == 0).rollout_buffer
        for sequence in buffer.sequences:
            at = buffer.index([sequence])
            # Keys and values that are computed anew round otherwise.
            close = pytest.approx(expected[tuple(buffer.actions[at].tolist())], abs=1e-5)
            assert buffer.advantages[at] == close
            count += 1
    assert count == len(expected) > 5


@pytest.mark.parametrize("cls", [PPO, Reinforce])
def test_the_present_policys_ratios_are_1_and_only_they_are_asked(cls: Any) -> None:
    model = make_agent(cls=cls, whole_episodes=True, **SHORT)
    for number in range(3):
        collect(model, fresh=number == 0)
        shaken = number == 1
        log = train(model).log
        assert log["train/first_ratio_error"] < 1e-5
        if shaken:  # so that what was begun before would show
            shake(model.policy, 0.1)
    versions = {sequence.policy_version for sequence in model.rollout_buffer.sequences}
    assert len(versions) > 1


def test_a_rollout_without_an_end_changes_nothing() -> None:
    model = make_agent(whole_episodes=True, n_steps=1, batch_size=2)
    before = weights(model.policy)
    collect(model)
    model.rollout_buffer.sequences = []
    updates = model._n_updates
    assert train(model).gradients == []
    assert same(before, weights(model.policy)) and model._n_updates == updates


def test_a_reset_ends_what_was_kept() -> None:
    model = collect(make_agent(whole_episodes=True, **SHORT))
    assert model.unfinished
    collect(model, fresh=True)
    starts = [s.segments[0].start for s in model.rollout_buffer.sequences]
    assert model.rollout_buffer.lengths.tolist() == [5] * NUM_ENVS and min(starts) == 0


def test_what_is_kept_is_saved(tmp_path: Path) -> None:
    model = make_agent("several turns", whole_episodes=True, kl_coef=0.1, **SHORT)
    model.learn(3 * NUM_ENVS * 5)
    kept = copy.deepcopy(model.unfinished)
    model.save(tmp_path / "agent")
    model.learn(3 * NUM_ENVS * 5, reset_num_timesteps=False)
    loaded = PPO.load(tmp_path / "agent", env=make_agent("several turns").env)
    loaded.learn(3 * NUM_ENVS * 5, reset_num_timesteps=False)
    assert kept and same(weights(model.policy), weights(loaded.policy))
    assert np.array_equal(model.rollout_buffer.rewards, loaded.rollout_buffer.rewards)
