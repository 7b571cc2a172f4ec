"""Whole episodes, slots that leave the batch, and sources that respond by whole turns."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from agents import PPO, SequenceRolloutBuffer, TransformerPolicy
from tests.agents.agents import (
    ITERATION,
    N_STEPS,
    NUM_ENVS,
    Calls,
    collect,
    make_agent,
    same,
    train,
    weights,
)
from tests.agents.helpers import FEW, gpt2

KINDS = ["one turn", "several turns"]
FLOATS = ("rewards", "advantages", "returns", "values", "log_probs")


def whole(kind: str, **kwargs: Any) -> Any:
    return make_agent(kind, **{"episodes_per_slot": 2, **kwargs})


@pytest.mark.parametrize("kind", KINDS)
def test_each_slot_has_its_episodes_and_all_are_whole(kind: str) -> None:
    model = collect(whole(kind))
    buffer = model.rollout_buffer
    assert buffer.full and buffer.last_dones.all() and not buffer.last_values.any()
    for env in range(NUM_ENVS):
        starts = buffer.episode_starts[: buffer.lengths[env], env]
        assert starts[0] and starts.sum() == 2
    assert len(set(buffer.lengths.tolist())) > 1
    assert model.num_timesteps == buffer.lengths.sum() == buffer.num_actions()
    assert len(model.ep_info_buffer) == 2 * NUM_ENVS
    lengths = [int(info["l"]) for info in model.ep_info_buffer]
    assert sum(lengths) == buffer.lengths.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_slot_plays_does_not_depend_on_the_others(kind: str) -> None:
    """The examples are those that a rollout by steps has, slot by slot."""
    seen: list[list[list[int]]] = []
    cases: list[dict[str, Any]] = [{"episodes_per_slot": 2}, {"n_steps": 64}]
    for kwargs in cases:
        model = make_agent(kind, **kwargs)
        collect(model)
        rows: list[list[int]] = [[] for _ in range(NUM_ENVS)]
        for sequence in model.rollout_buffer.sequences:
            if sequence.segments[0].begun == 0:
                rows[sequence.env].append(sequence.segments[0].context.tolist())
        seen.append(rows)
    for ours, theirs in zip(*seen, strict=True):
        assert ours == theirs[: len(ours)] and len(ours) == 2 < len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rollouts_are_scored_as_any_other(kind: str) -> None:
    """Ratio 1, the advantages of each episode by itself, an update that works."""
    model = collect(whole(kind, kl_coef=0.1, gamma=0.9))
    buffer = model.rollout_buffer
    scores = []
    for sequences in buffer.parts(None):
        batch = buffer.batch(sequences)
        with th.no_grad():
            scores.append(model.policy.score(batch.sequences, batch.actions).log_probs)
        assert (scores[-1] - batch.old_log_probs).abs().max() < 1e-5
    for env in range(NUM_ENVS):
        advantage, following, alive = 0.0, 0.0, 0.0
        for step in reversed(range(buffer.lengths[env])):
            reward, value = float(buffer.rewards[step, env]), float(buffer.values[step, env])
            delta = reward + 0.9 * following * alive - value
            advantage = delta + 0.9 * 0.95 * alive * advantage
            assert buffer.advantages[step, env] == pytest.approx(advantage, abs=1e-5)
            following, alive = value, 1.0 - float(buffer.episode_starts[step, env])
        behind = slice(buffer.lengths[env], None)
        assert not any(getattr(buffer, name)[behind, env].any() for name in FLOATS)
    before = weights(model.policy)
    assert np.isfinite(train(model).log["train/loss"]) and not same(before, weights(model.policy))


def test_slots_that_have_had_their_episodes_leave_the_batch() -> None:
    model = whole("one turn", episodes_per_slot=3)
    rows: list[int] = []
    act = model.policy.act

    def counting(observation: Any) -> Any:
        rows.append(len(observation["prompt"]))
        return act(observation)

    model.policy.act = counting
    read = Calls(model.policy.backbone.model.get_input_embeddings())
    collect(model)
    assert rows[0] == NUM_ENVS and rows[-1] < NUM_ENVS
    assert rows == sorted(rows, reverse=True) and sum(rows) == model.num_timesteps
    # What stays in the batch is not read again.
    contexts = sum(
        int(sequence.row.action_positions.nonzero()[0].sum())
        for sequence in model.rollout_buffer.sequences
    )
    assert read.tokens(1) < contexts


def test_a_rollout_by_steps_may_come_before() -> None:
    """Episodes that have begun are left, and new ones start."""
    model = make_agent(n_steps=5)
    collect(model)
    assert not all(model._last_episode_starts)
    model.episodes_per_slot = 1
    collect(model, fresh=False)
    buffer = model.rollout_buffer
    assert buffer.episode_starts[0].all() and buffer.last_dones.all()


@pytest.mark.parametrize("slow", [False, True])
def test_whole_episodes_with_slow_rewards(slow: bool) -> None:
    from tests.agents.rollouts.test_deferred import Judge, agent

    runs = []
    for late in (False, slow):
        judge = Judge()
        model = agent("several turns", judge, late, episodes_per_slot=2)
        model.learn(60)
        runs.append((weights(model.policy), [(i["r"], i["l"]) for i in model.ep_info_buffer]))
        assert judge.waited_for is not late
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def test_a_callback_may_end_it() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 9

    model = whole("several turns")
    model.learn(1000, Stop())
    assert model.env.venv.active is None
    model.learn(1000 - model.num_timesteps, reset_num_timesteps=False)
    assert model.rollout_buffer.last_dones.all()


def test_wrapped_environments_cannot_wait() -> None:
    with pytest.raises(ValueError, match=r"needs an environment made by gym\.make_vec"):
        whole("one turn").set_env(VecNormalize(make_agent().env, norm_obs=False))
    with pytest.raises(ValueError, match=r"needs an environment made by gym\.make_vec"):
        PPO("TransformerPolicy", gym.make("TextGen-v0"), episodes_per_slot=1)
    with pytest.raises(ValueError, match="episodes_per_slot must be at least 1"):
        whole("one turn", episodes_per_slot=0)


def test_waiting_slots_wait_for_the_rollout_alone() -> None:
    """A callback that plays in the same environment steps all of it."""
    shapes: set[int] = set()

    class Play(BaseCallback):
        def _on_step(self) -> bool:
            names = ("actions", "log_probs", "values", "rewards", "dones", "infos")
            shapes.update(len(self.locals[name]) for name in names)
            shapes.update(len(array) for array in self.locals["obs_tensor"].values())
            if self.n_calls == 9:
                assert len(self.locals["slots"]) < NUM_ENVS
                evaluate_policy(self.model, self.training_env, n_eval_episodes=NUM_ENVS)
            return self.n_calls < 9

    model = whole("one turn", episodes_per_slot=3)
    model.learn(1000, Play())
    assert shapes == {NUM_ENVS}


@pytest.mark.parametrize("slow", [False, True])
def test_returns_of_whole_episodes_after_a_reset(slow: bool) -> None:
    from tests.textenvs.toys import Chat
    from textenvs import CallableReward

    term = CallableReward(lambda ts: [1.0] * len(ts), "one", every_turn=True, slow=slow)
    model = make_agent("several turns", env={"reward": term, "task": Chat}, n_steps=7)
    collect(model)
    model.ep_info_buffer.clear()
    model.episodes_per_slot = 1
    collect(model, fresh=False)
    returns = sorted(float(info["r"]) for info in model.ep_info_buffer)
    turns = [len(sequence.segments) for sequence in model.rollout_buffer.sequences]
    assert returns == sorted(map(float, turns)) and max(turns) > 1


class Edited(VecEnvWrapper):
    """Changes prompts in place and says nothing of it."""

    def reset(self) -> Any:
        return self._edit(self.venv.reset())

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return self._edit(obs), rewards, dones, infos

    def _edit(self, obs: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        obs["prompt"][:, 0] = 5 + self.calls % 3
        return obs


def test_prompts_that_a_wrapper_changes_are_read_again() -> None:
    model = make_agent()
    model.set_env(Edited(model.env))
    buffer = collect(model).rollout_buffer
    assert len({s.row.tokens[0] for s in buffer.sequences}) > 1
    other = make_agent(policy={"use_cache": False})
    other.set_env(Edited(other.env))
    collect(other)
    assert np.array_equal(buffer.actions, other.rollout_buffer.actions)
    assert np.abs(buffer.log_probs - other.rollout_buffer.log_probs).max() < 1e-5


def test_versions_of_prompts_reach_the_cache() -> None:
    """A prompt that is said to be the same is not read again: that is what versions promise."""
    model = make_agent()
    obs = model.env.reset()
    policy = model.policy
    policy.start_rollout(N_STEPS)
    policy.act(obs)
    for version in (True, False):
        changed = model.env.venv.env.engine.observe()
        changed["response"][:, 0], changed["response_length"][:] = 5, 1
        changed["prompt"][:, 0] += 1
        if not version:
            changed = dict(changed)
        read = Calls(policy.backbone.model.get_input_embeddings())
        policy.act(changed)
        tokens = read.tokens(1)
        assert (tokens == NUM_ENVS) == version
        policy.start_rollout(N_STEPS)
        policy.act(obs)


class Noted(TransformerPolicy):
    """Does what its parent does, and says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = [*getattr(self, "asked", []), "forward"]
        return super().forward(*args, **kwargs)

    def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = [*getattr(self, "asked", []), "evaluate"]
        return super().evaluate_actions(*args, **kwargs)

    def predict_values(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = [*getattr(self, "asked", []), "values"]
        return super().predict_values(*args, **kwargs)


def test_what_a_subclass_overrides_is_what_runs() -> None:
    models = []
    for policy in ("TransformerPolicy", Noted):
        model: Any = PPO(
            policy,
            gym.make_vec("TextGen-v0", num_envs=NUM_ENVS, max_new_tokens=8),
            n_steps=N_STEPS,
            batch_size=32,
            n_epochs=1,
            seed=0,
            device="cpu",
            policy_kwargs={"model": gpt2(n_layer=1), "allowed_tokens": FEW},
        )
        models.append(model.learn(NUM_ENVS * N_STEPS))
    ours, theirs = (weights(model.policy) for model in models)
    assert all(th.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    asked = models[1].policy.asked
    assert asked.count("forward") == N_STEPS and {"evaluate", "values"} <= set(asked)


@pytest.mark.parametrize("value_model", [None, "copy"])
def test_a_critic_that_is_not_finite_ends_the_training(value_model: Any) -> None:
    model = make_agent(policy={"value_model": value_model})
    th.nn.init.constant_(model.policy.value_head.weight, float("nan"))
    with pytest.raises(ValueError, match="no longer finite: training has diverged"):
        collect(model)


def test_slots_without_a_step() -> None:
    buffer = make_agent().rollout_buffer
    row = {"prompt": np.array([[5, 6]]), "prompt_length": np.array([[2]])}
    row |= {"response": np.zeros((1, 8), dtype=int), "response_length": np.array([[0]])}
    buffer.add_turn(1, row, np.array([7, 8]), 1.0, True, np.zeros(2))
    buffer.finish(np.zeros(NUM_ENVS), np.ones(NUM_ENVS, dtype=bool))
    assert buffer.episode_ends.sum() == 1 and len(buffer.sequences) == 1
    buffer.group_size = 3
    with pytest.raises(ValueError, match="4 environments make no whole groups of 3"):
        buffer.reset()


class Replay:
    """Plays given responses through `respond`, whole turns at a time; each slot's in order."""

    def __init__(self, agent: Any, responses: list[list[list[int]]]) -> None:
        self.agent, self.responses = agent, responses

    def fill(self, policy: Any, buffer: SequenceRolloutBuffer, callback: BaseCallback) -> bool:
        buffer.reset()
        callback.on_rollout_start()
        env = self.agent.env.venv.env  # inside of the monitor and SB3's view
        engine, waiting = env.engine, [list(turns) for turns in self.responses]
        starts = np.ones(len(waiting), dtype=bool)
        while any(waiting):
            slots = [slot for slot, turns in enumerate(waiting) if turns]
            said = [waiting[slot].pop(0) for slot in slots]
            seen = {key: array.copy() for key, array in engine.observations.items()}
            rewards, terminated, _ = engine.respond(
                np.array(slots), [np.array(tokens) for tokens in said], env.np_random
            )
            for slot, tokens in zip(slots, said, strict=True):
                row = {key: array[slot : slot + 1] for key, array in seen.items()}
                unknown = np.zeros(len(tokens), dtype=np.float32)
                buffer.add_turn(
                    slot, row, np.array(tokens), rewards[slot], bool(starts[slot]), unknown
                )
                starts[slot] = terminated[slot]
            over = np.flatnonzero(terminated & np.isin(np.arange(len(starts)), slots))
            if len(over):
                env.restart(over)
        buffer.finish(np.zeros(len(starts)), np.ones(len(starts), dtype=bool))
        with th.no_grad():
            for sequences in buffer.parts(None):
                batch, at = buffer.batch(sequences), buffer.index(sequences)
                scores = policy.score(batch.sequences, batch.actions)
                buffer.log_probs[at], buffer.values[at] = scores.log_probs, scores.values
        return True


class Replayed(PPO):
    """Learns from given responses."""

    responses: Any = None

    def rollout_source(self, env: Any, n_steps: int) -> Any:
        return Replay(self, self.responses) if self.responses else super().rollout_source(env, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_responds_leaves_the_buffer_of_one_that_steps(kind: str) -> None:
    one_minibatch: dict[str, Any] = {"batch_size": ITERATION, "n_epochs": 1}
    stepped = collect(whole(kind, **one_minibatch))
    buffer = stepped.rollout_buffer
    responses: list[list[list[int]]] = [[] for _ in range(NUM_ENVS)]
    for sequence in sorted(buffer.sequences, key=lambda s: s.segments[0].start):
        for segment in sequence.segments:
            tokens = buffer.actions[segment.start : segment.stop, sequence.env]
            responses[sequence.env].append(tokens.tolist())
    replayed = make_agent(kind, cls=Replayed, **one_minibatch)
    replayed.responses = responses
    collect(replayed)
    other = replayed.rollout_buffer
    assert np.array_equal(buffer.lengths, other.lengths)
    steps = int(buffer.lengths.max())
    for name in ("actions", "episode_starts", "rewards"):
        assert np.array_equal(getattr(buffer, name)[:steps], getattr(other, name)[:steps]), name
    for name in FLOATS:
        first, second = (getattr(b, name)[:steps] for b in (buffer, other))
        assert np.abs(first - second).max() < 1e-5, name
    key = lambda s: (s.env, s.segments[0].start)  # noqa: E731
    for ours, theirs in zip(
        sorted(buffer.sequences, key=key), sorted(other.sequences, key=key), strict=True
    ):
        assert all(np.array_equal(a, b) for a, b in zip(ours.row, theirs.row, strict=True))
        assert (ours.episode, ours.group) == (theirs.episode, theirs.group)
    assert (len(responses[0]) > 2) == (kind == "several turns")
    # And what learns from it cannot tell.
    updates = [train(model) for model in (stepped, replayed)]
    assert updates[0].difference(updates[1]) < 1e-4
