"""A critic knows the first rollout before it teaches, and moves no more than it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from agents import A2C, PPO
from agents.learning import critic as fitting
from agents.learning.critic import Moments, fit_critic
from agents.policies.heads import ValueHead
from tests.agents.agents import (
    NUM_ENVS,
    PLAIN_STEPS,
    STILL,
    collect,
    make_agent,
    same,
    train,
    weights,
)
from tests.agents.helpers import llama


def new_agent(kind: str = "one turn", **kwargs: Any) -> Any:
    """An agent whose critic knows nothing."""
    model = make_agent(kind, **kwargs)
    th.nn.init.zeros_(model.policy.value_head.weight)
    return model


def unfitted(kind: str = "one turn", **kwargs: Any) -> Any:
    """A rollout whose values are still 0."""
    return collect(new_agent(kind, fit_critic=False, **kwargs))


def episode_of(buffer: Any) -> Any:
    """The number of each action's episode, as the buffer's arrays are."""
    numbers = np.full(buffer.values.shape, -1)
    for sequence in buffer.sequences:
        numbers[buffer.index([sequence])] = sequence.episode
    return numbers


def refit(model: Any) -> Any:
    """Fit anew; return the values."""
    model.rollout_buffer.values[:] = 0
    assert fit_critic(model.policy, model.rollout_buffer, model.gamma, 32)
    return model.rollout_buffer.values.copy()


@pytest.mark.parametrize("ridge", [1e-3, 1.0, float("inf")])
def test_moments_give_the_ridge_regression_of_the_examples_themselves(ridge: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, [1, 10, 0.1, 2], (50, 4)).astype(np.float32)
    y = rng.normal(size=50)
    first, second = (Moments.of(x[part], y[part]) for part in (slice(20), slice(20, None)))
    weight, bias = first.plus(second).fit(ridge)
    if np.isinf(ridge):
        assert not weight.any() and bias == pytest.approx(y.mean())
        return
    # As least squares with one further example for each weight that says that it is 0.
    scaled = (x - x.mean(0)).astype(np.float64)
    prior = np.diag(np.sqrt(ridge * len(x)) * scaled.std(0))
    expected = np.linalg.lstsq(
        np.vstack([scaled, prior]), np.concatenate([y - y.mean(), np.zeros(4)])
    )[0]
    assert weight == pytest.approx(expected, rel=1e-4)
    assert bias == pytest.approx(y.mean() - x.mean(0) @ expected, rel=1e-4)
    back, _ = first.plus(second).plus(second, -1).fit(ridge)
    assert back == pytest.approx(first.fit(ridge)[0], rel=1e-4)


@pytest.mark.parametrize("policy", [{}, {"value_model": "copy"}, {"value_model": llama()}])
@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_the_first_rollout_is_known_before_it_teaches(kind: str, policy: dict[str, Any]) -> None:
    model = new_agent(kind, policy=policy, n_steps=96)
    trunk = weights(model.policy.critic_backbone)
    collect(model)
    buffer = model.rollout_buffer
    assert same(trunk, weights(model.policy.critic_backbone))
    assert model.policy.value_head.weight.any() and buffer.values.any()
    assert np.allclose(buffer.returns, buffer.advantages + buffer.values)
    whole = np.isin(
        episode_of(buffer), [s.episode for s in buffer.sequences if buffer.is_complete(s)]
    )
    to_go = fitting.ReturnToGo(1.0)(buffer)[1][whole]
    # Better than to know nothing, and not by much worse than the mean even if there is nothing to
    # know: the values come from other episodes.
    assert np.mean((to_go - buffer.values[whole]) ** 2) < 1.1 * to_go.var() < np.mean(to_go**2)
    cut = ~buffer.last_dones
    assert cut.any() and buffer.last_values[cut].all() and not buffer.last_values[~cut].any()
    with th.no_grad():
        expected = model.policy.predict_values(
            {key: th.from_numpy(value) for key, value in model._last_obs.items()}
        )
    assert buffer.last_values[cut] == pytest.approx(expected[cut, 0].numpy(), abs=1e-5)


def test_no_value_knows_how_its_own_episode_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RIDGES", (0.1,))
    model = unfitted("several turns", n_steps=96)
    buffer, episodes = model.rollout_buffer, episode_of(model.rollout_buffer)
    before = refit(model)
    chosen = next(s for s in buffer.sequences if buffer.is_complete(s))
    own = episodes == chosen.episode
    buffer.rewards[chosen.steps[-1], chosen.env] += 100.0
    after = refit(model)
    assert np.array_equal(before[own], after[own])
    assert not np.isclose(before[~own & buffer.real], after[~own & buffer.real]).all()
    # What an episode that the rollout's end has cut would have earned is not known.
    cut = next(s for s in buffer.sequences if not buffer.is_complete(s))
    buffer.rewards[cut.steps[-1], cut.env] += 100.0
    assert np.array_equal(refit(model), after)


def test_truncated_episodes_are_no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RIDGES", (0.1,))
    model = unfitted(env={"max_episode_steps": 5, "max_new_tokens": 8}, n_steps=96)
    before = refit(model)
    for truncation in model.rollout_buffer.truncations:
        model.rollout_buffer.rewards[truncation.step, truncation.slot] += 100.0
    assert len(model.rollout_buffer.truncations) > 5
    assert np.array_equal(refit(model), before)


def test_where_all_earn_the_same_there_is_no_advantage() -> None:
    model = unfitted(n_steps=96)
    buffer = model.rollout_buffer
    buffer.rewards[:] = np.where(buffer.episode_ends, 1.0, 0.0)
    assert refit(model)[buffer.real] == pytest.approx(1.0, abs=1e-5)


def test_too_few_episodes_are_nothing_to_go_by() -> None:
    model = collect(new_agent(env={"max_new_tokens": 64, "num_envs": 2}, n_steps=6, batch_size=6))
    assert not model.rollout_buffer.values.any() and model.policy.critic_is_new


def test_it_is_fitted_once(tmp_path: Path) -> None:
    model = collect(new_agent(n_steps=96, policy=PLAIN_STEPS, **STILL))
    head = weights(model.policy.value_head)
    train(model)
    collect(model, fresh=False)
    assert same(head, weights(model.policy.value_head))
    model.save(tmp_path / "agent")
    loaded = collect(PPO.load(tmp_path / "agent", env=model.get_env()), fresh=False)
    assert same(head, weights(loaded.policy.value_head))


@pytest.mark.parametrize("value_model", [None, "copy"])
def test_a_warmup_trains_the_critic_alone(value_model: Any) -> None:
    model = new_agent(critic_warmup=1, n_steps=48, policy={"value_model": value_model})
    actor, critic = weights(model.policy.backbone), weights(model.policy.critic_backbone)
    head = weights(model.policy.value_head)
    log = train(collect(model)).log
    assert same(actor, weights(model.policy.backbone))
    assert not same(head, weights(model.policy.value_head))
    assert same(critic, weights(model.policy.critic_backbone)) == (value_model is None)
    assert log["train/approx_kl"] < 1e-8 and "train/policy_gradient_loss" not in log
    train(collect(model, fresh=False))
    assert not same(actor, weights(model.policy.backbone))


def test_a_detached_value_loss_leaves_the_trunk_to_the_policy() -> None:
    cases: list[dict[str, Any]] = [{"vf_detach": True, "vf_coef": 5.0}, {"vf_coef": 0.0}]
    cases.append({"vf_coef": 5.0})
    updates = [
        train(collect(make_agent(policy=PLAIN_STEPS, **STILL, **kwargs))) for kwargs in cases
    ]
    detached, without, plain = (update.gradients[0] for update in updates)
    trunk = [name for name in detached if not name.startswith("value_head")]
    assert len(trunk) > 5
    assert all(th.allclose(detached[name], without[name], atol=1e-7) for name in trunk)
    assert not all(th.allclose(plain[name], without[name], atol=1e-3) for name in trunk)
    assert th.allclose(detached["value_head.weight"], plain["value_head.weight"], rtol=1e-5)


@pytest.mark.parametrize("cls", [PPO, A2C])
@pytest.mark.parametrize("value_model", [None, "copy"])
def test_the_critics_own_rate_is_that_of_its_own_parameters(cls: Any, value_model: Any) -> None:
    policy = {**PLAIN_STEPS, "value_model": value_model}
    schedule = lambda progress: 0.1 * progress  # noqa: E731
    kwargs: dict[str, Any] = {"learning_rate": 0.0, "vf_learning_rate": schedule}
    model = make_agent(policy=policy, cls=cls, **kwargs)
    actor, head = weights(model.policy.backbone), weights(model.policy.value_head)
    update = train(collect(model))
    assert same(actor, weights(model.policy.backbone))
    assert not same(head, weights(model.policy.value_head))
    assert update.log["train/vf_learning_rate"] == pytest.approx(0.1)
    rates = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
    assert rates == {"actor": 0.0, "critic": pytest.approx(0.1)}


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_lambdas_of_actor_and_critic_are_their_own(alpha: float | None) -> None:
    kwargs: dict[str, Any] = {"gae_lambda": 0.8, "gae_lambda_vf": 1.0, "gae_length_alpha": alpha}
    buffer = collect(make_agent("several turns", gamma=0.9, **kwargs)).rollout_buffer
    steps, ends = len(buffer.values), buffer.episode_ends
    for slot in range(NUM_ENVS):
        start = 0
        for stop in [*(np.flatnonzero(ends[:, slot]) + 1), steps]:
            if start == stop:
                continue
            own = 0.8 if alpha is None else max(0.0, 1 - 1 / (alpha * (stop - start)))
            over = bool(ends[stop - 1, slot])
            after = [
                *buffer.values[start + 1 : stop, slot],
                0.0 if over else buffer.last_values[slot],
            ]
            deltas = buffer.rewards[start:stop, slot] + 0.9 * np.array(after)
            deltas -= buffer.values[start:stop, slot]
            for step in range(stop - start):
                powers = np.arange(stop - start - step)
                advantage = float(((0.9 * own) ** powers * deltas[step:]).sum())
                to_go = float((0.9**powers * deltas[step:]).sum())
                at = (start + step, slot)
                assert buffer.advantages[at] == pytest.approx(advantage, abs=1e-4)
                assert buffer.returns[at] == pytest.approx(to_go + buffer.values[at], abs=1e-4)
            start = stop


def test_a_new_head_is_zero() -> None:
    assert not any(parameter.any() for parameter in ValueHead(8).parameters())
