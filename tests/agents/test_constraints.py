"""A constraint, defined here alone, holds wherever a policy is asked: it is one pure function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch as th

from agents import PPO
from agents.models.layout import SequenceBatch
from tests.agents.agents import collect, same, train, weights
from tests.agents.helpers import EOS, FEW, VOCAB, gpt2, policy_for, roll_out, vec_env

ENVS = ("TextGen-v0", "Dialogue-v0")
State = frozenset[int]


class NoRepeats:
    """No token of a response comes twice, and one that the prompt decides on not at all."""

    def start(self, prompt: npt.NDArray[np.int64]) -> State:
        assert prompt.dtype == np.int64
        return frozenset({forbidden(prompt)})

    def advance(self, state: State, token: int) -> State:
        return state | {token}

    def allowed(self, state: State) -> list[int] | None:
        return [token for token in range(VOCAB) if token not in state]


class Counting(NoRepeats):
    """Counts the tokens that it has been advanced by."""

    def __init__(self) -> None:
        self.advanced = 0

    def advance(self, state: State, token: int) -> State:
        self.advanced += 1
        return super().advance(state, token)


class Returning(NoRepeats):
    """Allows a given thing at the start, and everything later."""

    def __init__(self, allowed: Any) -> None:
        self.at_first = allowed

    def allowed(self, state: State) -> Any:
        return self.at_first if len(state) == 1 else None


class DeadEnd(NoRepeats):
    """Nothing may follow the first token."""

    def allowed(self, state: State) -> list[int]:
        return [301] if len(state) == 1 else []


def forbidden(prompt: npt.NDArray[np.int64]) -> int:
    index = int(len(prompt) + prompt[-1]) % (len(FEW) - 1)
    return int(FEW[1 + index])


def broken(observations: list[dict[str, Any]], actions: npt.NDArray[np.int64]) -> int:
    """How many actions the constraint forbids; both are one entry a step."""
    count = 0
    for obs, said in zip(observations, actions, strict=True):
        for row, action in enumerate(said):
            response = obs["response"][row, : int(obs["response_length"][row, 0])]
            prompt = obs["prompt"][row, : int(obs["prompt_length"][row, 0])]
            count += int(action) in {*response.tolist(), forbidden(prompt)}
    return count


Ways: dict[str, Callable[[Any, Any], Any]] = {
    "act": lambda policy, obs: policy.act(obs)[0],
    "predict": lambda policy, obs: policy.predict(obs)[0],
    "predict the most likely": lambda policy, obs: policy.predict(obs, deterministic=True)[0],
    "forward": lambda policy, obs: policy(policy.obs_to_tensor(obs)[0])[0].numpy(),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("env_id", ENVS)
@pytest.mark.parametrize("way", list(Ways))
def test_no_response_repeats_a_token(way: str, env_id: str, use_cache: bool) -> None:
    env = vec_env(env_id, max_new_tokens=8)
    counts = []
    for constraint in (NoRepeats(), None):
        policy = policy_for(env, allowed_tokens=FEW, constraint=constraint, use_cache=use_cache)
        env.seed(0)
        obs, observations, actions = env.reset(), [], []
        with th.random.fork_rng(), th.no_grad():
            th.manual_seed(0)
            for _ in range(30):
                observations.append(obs)
                actions.append(Ways[way](policy, obs))
                obs, _, _, _ = env.step(actions[-1])
        assert set(np.concatenate(actions)) <= set(FEW)
        counts.append(broken(observations, np.array(actions)))
    assert counts[0] == 0 and counts[1] > 10


def agent(env_id: str = "TextGen-v0", constraint: Any = "default", **kwargs: Any) -> PPO:
    if constraint == "default":
        constraint = NoRepeats()
    policy = {"constraint": constraint, "allowed_tokens": FEW, "head_chunk": 7}
    return PPO(
        "TransformerPolicy",
        gym.make_vec(env_id, num_envs=4, max_new_tokens=8),
        policy_kwargs={"model": gpt2(n_layer=1), **policy},
        **{"n_steps": 13, "batch_size": 24, "n_epochs": 2, "learning_rate": 1e-3, **kwargs},
        seed=0,
        device="cpu",
    )


@pytest.mark.parametrize("micro_batch_size", [None, 10])
@pytest.mark.parametrize("env_id", ENVS)
def test_updates_and_reference_mask_as_the_rollout_did(
    env_id: str, micro_batch_size: int | None
) -> None:
    model = agent(env_id, micro_batch_size=micro_batch_size, kl_coef=0.1, ent_coef=0.01)
    free: Any = agent(env_id, None)
    middles = 0
    for rollout in range(3):
        if rollout:
            middles += int((model._last_obs["response_length"] > 0).sum())  # type: ignore[index]
        collect(model, fresh=rollout == 0)
        buffer: Any = model.rollout_buffer
        assert model.policy.masks.constraint is not None  # type: ignore[union-attr]
        free.policy.load_state_dict(model.policy.state_dict())
        for part in buffer.parts(micro_batch_size):
            samples = buffer.samples(part)
            scored: list[th.Tensor] = []
            for policy in (model.policy, free.policy):
                with th.no_grad():
                    evaluated = policy.evaluate_actions(samples.observations, samples.actions)
                scored.append((evaluated[1] - samples.old_log_prob).abs())
            assert scored[0].max() < 1e-5
            assert scored[1].max() > 0.05  # so that what is forbidden matters
        if rollout == 0:
            assert abs(model.logger.name_to_value["kl/per_token"]) < 1e-6
        log = train(model).log
        assert log["train/first_ratio_error"] < 1e-5
    assert middles > 3


@pytest.mark.parametrize("constraint", ["object", "path"])
def test_agents_learn_and_are_saved_with_it(constraint: str, tmp_path: Any) -> None:
    given = NoRepeats() if constraint == "object" else f"{__name__}:NoRepeats"
    model = agent(constraint=given)
    before = weights(model.policy)
    model.learn(2 * 4 * 13)
    after = weights(model.policy)
    assert not same(before, after) and all(value.isfinite().all() for value in after.values())
    model.save(tmp_path / "agent")
    loaded: Any = PPO.load(tmp_path / "agent", device="cpu")
    assert type(loaded.policy.masks.constraint) is NoRepeats
    env = vec_env(max_new_tokens=8)
    ours, theirs = (roll_out(policy, env, 20) for policy in (model.policy, loaded.policy))
    assert np.array_equal(ours.actions, theirs.actions)
    assert broken(theirs.observations, theirs.actions) == 0
    model.policy.save(str(tmp_path / "policy"))
    alone = type(model.policy).load(str(tmp_path / "policy"))
    assert np.array_equal(ours.actions, roll_out(alone, env, 20).actions)


def test_distributions_of_observations_and_of_sequences() -> None:
    env = vec_env("Dialogue-v0", max_new_tokens=8)
    policy = policy_for(env, allowed_tokens=FEW, constraint=NoRepeats(), temperature=0.7)
    rollout = roll_out(policy, env, 20)
    for step in (0, 5, 19):
        obs, _ = policy.obs_to_tensor(rollout.observations[step])
        actions = th.tensor(rollout.actions[step])
        with th.no_grad():
            distribution = policy.get_distribution(obs)
        for row, log_probs in enumerate(distribution.log_probs):
            possible = set(log_probs.isfinite().nonzero().flatten().tolist())
            response = rollout.observations[step]["response"][row]
            said = set(response[: int(obs["response_length"][row])].tolist())
            prompt = rollout.observations[step]["prompt"][row, : int(obs["prompt_length"][row])]
            assert possible == set(FEW) - said - {forbidden(prompt)}
        _, log_probs, entropies = policy.evaluate_actions(obs, actions)
        expected = th.tensor(rollout.log_probs[step])
        th.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)
        th.testing.assert_close(distribution.log_prob(actions), expected, atol=1e-5, rtol=0)
        th.testing.assert_close(entropies, distribution.entropy(), atol=1e-5, rtol=0)
    model = collect(agent("Dialogue-v0"))
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    log_probs = model.policy.get_distribution(samples.observations).log_prob(samples.actions)
    assert (log_probs - samples.old_log_prob).abs().max() < 1e-5


def test_a_token_advances_the_state_once() -> None:
    env = vec_env("Dialogue-v0", max_new_tokens=8)
    counting = Counting()
    policy = policy_for(env, allowed_tokens=FEW, constraint=counting)
    plain = policy_for(env, allowed_tokens=FEW, constraint=NoRepeats())
    rollout = roll_out(policy, env, 40)
    inside = sum(int((obs["response_length"] > 0).sum()) for obs in rollout.observations)
    assert 0 < counting.advanced <= inside
    # What is remembered decides nothing: rows in another order, fewer of them, going back.
    for step in (30, 12, 13, 39):
        rows = np.random.default_rng(step).permutation(4)[: 1 + step % 4]
        obs = {key: value[rows] for key, value in rollout.observations[step].items()}
        answers = [p.get_distribution(p.obs_to_tensor(obs)[0]).log_probs for p in (policy, plain)]
        assert th.equal(*answers)


def test_compiled_draws_take_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, drawn = th.compile, []

    def compile_draws(function: Any, dynamic: Any = None, options: Any = None) -> Any:
        if "draw" not in inspect.getclosurevars(function).nonlocals["function"].__name__:
            return function  # The model has tests of its own.
        drawn.append(function)
        return compiler(function, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(th, "compile", compile_draws)
    env = vec_env(num_envs=3, max_new_tokens=8)
    kwargs = {"allowed_tokens": FEW, "constraint": NoRepeats()}
    rollouts = [
        roll_out(policy_for(env, gpt2(n_layer=1), compile=compile, **kwargs), env, 20)
        for compile in (True, False)
    ]
    assert np.array_equal(rollouts[0].actions, rollouts[1].actions)
    assert np.abs(rollouts[0].log_probs - rollouts[1].log_probs).max() < 1e-5
    assert drawn and broken(rollouts[0].observations, rollouts[0].actions) == 0


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_where_nothing_may_be_said_is_shown(with_tokenizer: bool) -> None:
    env = vec_env(num_envs=1)
    policy = policy_for(env, constraint=DeadEnd())
    tokenizer = env.env.unwrapped.tokenizer
    policy.tokenizer = tokenizer if with_tokenizer else None
    env.seed(0)  # of some prompts the first token is the one that is forbidden anyway
    obs = env.reset()
    action = policy.predict(obs)[0]
    assert action == [301]
    prompt = obs["prompt"][0, : int(obs["prompt_length"][0, 0])].tolist()
    obs = env.step(action)[0]
    with pytest.raises(ValueError, match="DeadEnd allows none after the response") as caught:
        policy.predict(obs)
    shown = [[301], prompt]
    texts = [repr(tokenizer.decode(ids)) for ids in shown] if with_tokenizer else map(str, shown)
    assert all(text in str(caught.value) for text in texts)


def test_what_is_allowed_lies_within_the_action_space() -> None:
    env = vec_env(num_envs=2)
    obs = env.reset()
    for allowed in ({EOS, 305, 309}, (EOS, 305, 309), np.array([EOS, 305, 309], dtype=np.int32)):
        policy = policy_for(env, allowed_tokens=[305, 309, 17], constraint=Returning(allowed))
        possible = policy.get_distribution(policy.obs_to_tensor(obs)[0]).log_probs.isfinite()
        assert possible.nonzero()[:, 1].tolist() == [305, 309] * 2
    policy = policy_for(env, allowed_tokens=[305, 309, 17], constraint=Returning(None))
    possible = policy.get_distribution(policy.obs_to_tensor(obs)[0]).log_probs.isfinite()
    assert possible.nonzero()[:, 1].tolist() == [17, 305, 309] * 2
    for wrong in ([VOCAB], [-1, 5]):
        with pytest.raises(ValueError, match="Returning allowed"):
            policy_for(env, constraint=Returning(wrong)).predict(obs)
    with pytest.raises(ValueError, match="Of the tokens that the action space allows"):
        policy_for(env, allowed_tokens=[17], constraint=Returning([5])).predict(obs)


def test_sequences_must_say_where_responses_begin() -> None:
    model = collect(agent())
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    obs = {name: value for name, value in samples.observations.items() if name != "turn_starts"}
    with pytest.raises(ValueError, match="turn_starts"):
        model.policy.evaluate_actions(obs, samples.actions)
    batch = SequenceBatch(
        obs["tokens"], obs["action_positions"], th.zeros_like(obs["action_positions"])
    )
    with pytest.raises(ValueError, match="where a response begins"):
        model.policy.score(batch, samples.actions)
    # Without a constraint they need not.
    free: Any = agent(constraint=None)
    assert free.policy.evaluate_actions(obs, samples.actions)[1].isfinite().all()


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        ("nowhere.at_all:Name", ValueError, "nowhere"),
        (f"{__name__}:Missing", ValueError, "Missing"),
        ("tests.agents.helpers:FEW", TypeError, "start, advance, allowed"),
        (7, TypeError, "start, advance, allowed"),
        (Returning(lambda: None), ValueError, "pickled"),
    ],
)
def test_what_is_no_constraint(constraint: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policy_for(vec_env(), constraint=constraint)


def test_a_constraint_that_allows_everything_changes_nothing() -> None:
    env = vec_env(max_new_tokens=8)
    free, loose = (
        roll_out(policy_for(env, allowed_tokens=FEW, constraint=constraint), env, 20)
        for constraint in (None, Returning(None))
    )
    assert np.array_equal(free.actions, loose.actions)
    assert np.array_equal(free.log_probs, loose.log_probs)
