from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.vec_env import VecEnvWrapper

from agents import PPO
from agents.learning.rewards import whiten_rewards
from tests.agents.agents import (
    NUM_ENVS,
    PLAIN_STEPS,
    STILL,
    Calls,
    collect,
    make_agent,
    same,
    train,
    weights,
)
from tests.agents.oracle import Critic, Diary

CUT: dict[str, Any] = {"max_new_tokens": 8, "max_episode_steps": 5}


def test_whitening_keeps_the_mean_and_gives_a_deviation_of_one() -> None:
    plain = collect(make_agent("several turns"))
    whitened = collect(make_agent("several turns", whiten_rewards=True))
    before, after = plain.rollout_buffer.rewards, whitened.rollout_buffer.rewards
    assert np.array_equal(plain.rollout_buffer.actions, whitened.rollout_buffer.actions)
    assert abs(before.mean()) > 0.05 and before.std() < 0.7
    assert after.mean() == pytest.approx(before.mean(), abs=1e-5)
    assert after.std() == pytest.approx(1.0, abs=1e-4) and after.dtype == np.float32
    # All that has happened is a shift and a scale.
    assert np.corrcoef(before.flatten(), after.flatten())[0, 1] > 1 - 1e-6
    # Rewards that are all the same stay what they are.
    plain.rollout_buffer.rewards[:] = 3.0
    whiten_rewards(plain.rollout_buffer)
    assert (plain.rollout_buffer.rewards == 3.0).all()


def test_whitening_comes_after_the_kl_and_before_the_values() -> None:
    model = make_agent(env=CUT, kl_coef=0.5, whiten_rewards=True, gamma=0.9)
    model.set_reference()
    with th.no_grad():
        for parameter in model.policy.backbone.parameters():
            parameter *= 1.1
    diary = Diary()
    collect(model, diary)
    buffer = model.rollout_buffer
    cut = np.array([token.after is not None for token in diary.tokens]).reshape(-1, NUM_ENVS)
    actor = Critic(model.policy.backbone.model, [0], 1.0, model.policy.value_head)
    with th.no_grad():
        values = [0.0 if t.after is None else float(actor.value(t.after)) for t in diary.tokens]
    rewards = buffer.rewards - 0.9 * np.array(values).reshape(-1, NUM_ENVS)
    raw = np.array([token.reward for token in diary.tokens]).reshape(-1, NUM_ENVS)
    raw -= 0.5 * (buffer.log_probs - buffer.ref_log_probs)
    assert cut.sum() > 3 and np.ptp(np.array(values)) > 0.1
    assert rewards.std() == pytest.approx(1.0, abs=1e-3)
    assert rewards.mean() == pytest.approx(raw.mean(), abs=1e-4)


def test_values_of_what_was_cut_off_are_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for bootstraps in (True, False):
        if not bootstraps:
            monkeypatch.setattr("agents.algorithms.base.bootstrap_truncations", lambda *_: None)
        model = make_agent(env=CUT)
        calls = Calls(model.policy.backbone.model.get_input_embeddings())
        diary = Diary()
        collect(model, diary)
        runs.append((list(calls.shapes), diary, model.rollout_buffer.rewards.copy()))
    (shapes, diary, rewards), (without, _, raw) = runs
    cut = np.array([token.after is not None for token in diary.tokens]).reshape(-1, NUM_ENVS)
    ended = np.array([token.ends for token in diary.tokens]).reshape(-1, NUM_ENVS)
    assert cut.sum() > 3 and (ended & ~cut).any()
    assert shapes[:-1] == without and shapes[-1][0] == cut.sum()
    assert ((rewards != raw) == cut).all()


def test_the_same_rewards_as_sb3s_own_loop() -> None:
    ours = collect(make_agent(env=CUT, gamma=0.9))
    theirs = make_agent(env=CUT, gamma=0.9)
    _, callbacks = theirs._setup_learn(1000, None)
    callbacks.on_training_start({}, {})
    theirs._update_info_buffer = lambda *_: None  # SB3 computes the values by itself.
    stable_baselines3.PPO.collect_rollouts(
        theirs, theirs.env, callbacks, theirs.rollout_buffer, theirs.n_steps
    )
    for name in ("actions", "rewards", "advantages", "returns", "episode_starts"):
        first, second = (getattr(model.rollout_buffer, name) for model in (ours, theirs))
        assert np.abs(first.astype(float) - second).max() < 1e-5, name


def test_callbacks_see_the_last_observation_and_whether_it_was_cut_off() -> None:
    seen: list[bool] = []

    def keep(rollout: dict[str, Any]) -> None:
        seen.extend("terminal_observation" in i for i in rollout["infos"] if "transcript" in i)
        seen.extend("terminal_observation" in i for i in rollout["infos"] if len(i) > 1)

    collect(make_agent(env=CUT), keep)
    assert seen and all(seen)


class Silent(VecEnvWrapper):
    """An environment that cuts episodes off and does not say where."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            info.pop("terminal_observation", None)
        return obs, rewards, dones, infos


def test_without_a_last_observation_there_is_nothing_to_add() -> None:
    model = make_agent(env=CUT)
    model.set_env(Silent(model.env))
    diary: list[Any] = []
    collect(model, lambda rollout: diary.append(rollout["rewards"].copy()))
    assert np.array_equal(model.rollout_buffer.rewards, np.array(diary, dtype=np.float32))


def test_a_rollout_that_a_callback_ends_is_not_settled() -> None:
    model = make_agent(env=CUT, kl_coef=0.1, whiten_rewards=True)
    model.learn(1000, lambda local, _: local["n_steps"] < 7)
    assert model.num_timesteps == 8 * NUM_ENVS and model.rollout_buffer.truncations
    # What was cut off then is not credited to the next one.
    collect(model)
    assert all(episode.step < model.n_steps for episode in model.rollout_buffer.truncations)
    assert np.isfinite(train(model).log["train/loss"])


def test_no_reference_yet() -> None:
    model = collect(make_agent())
    model.kl_coef = 0.1
    with pytest.raises(RuntimeError, match="call set_reference first"):
        model.complete_rollout(model.rollout_buffer)


def test_reference_is_a_copy_that_stays() -> None:
    model = make_agent(kl_coef=0.1)
    before = weights(model.policy.backbone)
    model.set_reference()
    collect(model)
    train(model)
    assert same(before, weights(model.reference))
    assert not same(before, weights(model.policy.backbone))
    assert not {id(p) for p in model.reference.parameters()} & {
        id(group) for group in model.policy.optimizer.param_groups[0]["params"]
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kl_coef": -1.0}, "kl_coef must be at least 0, but it is -1.0"),
    ({"kl_coef": 0.1, "kl_in": "both"}, "kl_in must be 'reward', 'loss' or 'advantage', .*'both'"),
    ({"ref_model": "gpt2"}, "give kl_coef, too"),
    ({"kl_coef": 0.1, "ref_model": "/no/such/folder"}, "No language model"),
    ({"n_epochs": 0}, "n_epochs must be at least 1, but it is 0"),
    ({"batch_size": 1}, "batch_size must be at least 2, but it is 1"),
    ({"rollout_buffer_class": DictRolloutBuffer}, "needs a SequenceRolloutBuffer, but .* Dict"),
    ({"kl_coef": 0.1, "kl_estimator": "k2"}, "kl_estimator must be 'k1' or 'k3', .* 'k2'"),
    ({"kl_target": 6.0}, "both must be positive; kl_coef is 0.0"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_arguments_that_make_no_sense(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(**kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"whiten_rewards": True}, {"micro_batch_size": 8}, {"whole_episodes": True}]
)
def test_arguments_for_text_only(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need the policy 'TransformerPolicy'"):
        PPO("MlpPolicy", "CartPole-v1", **kwargs)


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_whole_episodes_leave_out_what_the_rollout_cuts(kind: str) -> None:
    both, whole = (collect(make_agent(kind, whole_episodes=whole)) for whole in (False, True))
    buffer = both.rollout_buffer
    ends = np.vstack([buffer.episode_starts[1:], buffer.last_dones])
    # A token counts if an end comes at or after it.
    finished = np.flip(np.maximum.accumulate(np.flip(ends, 0), 0), 0)
    assert 0 < finished.sum() < finished.size
    counted = np.zeros_like(finished)
    counted[whole.rollout_buffer.index(whole.rollout_buffer.sequences)] = True
    assert np.array_equal(counted, finished)
    assert np.array_equal(whole.rollout_buffer.advantages, buffer.advantages)


def test_whitening_has_a_floor() -> None:
    buffer = collect(make_agent("several turns")).rollout_buffer
    buffer.rewards[:] = 1.0
    buffer.rewards[0, 0] = 0.99
    whiten_rewards(buffer, floor=0.1)
    assert buffer.rewards[0, 0] == pytest.approx(1 - 0.1, abs=1e-2)
    assert np.ptp(buffer.rewards[1:]) == 0
    floored = [
        collect(make_agent(whiten_rewards=True, whiten_floor=floor)).rollout_buffer.rewards.std()
        for floor in (0.0, 100.0)
    ]
    assert floored[0] == pytest.approx(1.0, abs=1e-4) and floored[1] < 0.02
    kwargs: dict[str, Any] = {**STILL, "vf_coef": 0.0, "policy": PLAIN_STEPS}
    norms = []
    for floor in (0.0, 1e3, 2e3):
        update = train(collect(make_agent(whiten_floor=floor, **kwargs)))
        norms.append(update.log["train/grad_norm"])
    assert norms[0] > 100 * norms[1] and norms[1] == pytest.approx(2 * norms[2], rel=1e-3)
