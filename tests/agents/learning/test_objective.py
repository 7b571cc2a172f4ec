"""What a mean is over: by the definitions, in any number of parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch as th

from agents.learning.losses import ClippedPolicyLoss, EntropyLoss, LossTerm, ValueLoss
from agents.learning.objective import Objective
from agents.policies.base import Scores
from agents.rollouts.sequences import TokenBatch, split_by_size
from tests.agents.agents import NUM_ENVS, PLAIN_STEPS, collect, make_agent, shake
from tests.agents.helpers import FEW
from tests.agents.oracle import Critic, Diary

LENGTH = 8
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant", "constant_length": LENGTH},
}


@pytest.fixture(scope="module", params=["one turn", "several turns"])
def learner(request: pytest.FixtureRequest) -> tuple[Any, Critic, list[tuple[int, Any]]]:
    """An agent with a rollout; its actor in float64; each sequence's tokens and summed losses."""
    model = make_agent(request.param, policy={**PLAIN_STEPS, "temperature": 0.7}, gamma=0.97)
    diary = Diary()
    collect(model, diary)
    shake(model.policy)
    buffer = model.rollout_buffer
    actor = Critic(model.policy.backbone.model, FEW, 0.7, model.policy.value_head)
    losses = []
    for sequence in buffer.sequences:
        one: Any = 0.0
        for step in sequence.steps:
            at = int(step), sequence.env
            token = diary.tokens[at[0] * NUM_ENVS + at[1]]
            log_probs = actor.log_probs(token.context)
            ratio = (log_probs[FEW.index(token.token)] - float(buffer.log_probs[at])).exp()
            advantage = float(buffer.advantages[at])
            one -= min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            one += 0.1 * (log_probs.exp() * log_probs).sum()
            one += 0.3 * (float(buffer.returns[at]) - actor.value(token.context)) ** 2
        losses.append((sequence.num_actions, one))
    return model, actor, losses


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
def test_gradients_are_those_of_the_definition(
    learner: tuple[Any, Critic, list[tuple[int, Any]]], aggregation: str
) -> None:
    model, actor, losses = learner
    tokens = sum(number for number, _ in losses)
    total: Any = 0.0
    for number, loss in losses:
        divisors = {
            "token": tokens,
            "sequence": number * len(losses),
            "constant": LENGTH * len(losses),
        }
        total += loss / divisors[aggregation]
    names, parameters = zip(*actor.model.named_parameters(), strict=True)
    expected = th.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)

    policy, buffer = model.policy, model.rollout_buffer
    terms: list[LossTerm] = [ClippedPolicyLoss(0.2), EntropyLoss(0.1), ValueLoss(0.3)]
    objective = Objective(terms, normalize_advantage=False, **AGGREGATIONS[aggregation])
    for size in (None, 1, 30):
        policy.zero_grad()
        metrics = objective.backward(policy, buffer, split_by_size(buffer.sequences, size))
        assert metrics["loss"] == pytest.approx(total.item(), 1e-4)
        scale = max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None)
        assert scale > 1e-3
        for name, gradient in zip(names, expected, strict=True):
            ours = policy.get_parameter(f"backbone.model.{name}").grad
            if gradient is None:
                assert ours is None or not ours.any()
                continue
            assert (ours - gradient.float()).abs().max() < 1e-4 * scale, name


def test_the_aggregations_differ() -> None:
    model = collect(make_agent("several turns"))
    shake(model.policy)
    losses = []
    for kwargs in AGGREGATIONS.values():
        objective = Objective([ValueLoss(1.0)], normalize_advantage=False, **kwargs)
        buffer = model.rollout_buffer
        losses.append(objective.backward(model.policy, buffer, [buffer.sequences])["loss"])
    assert len({round(loss, 4) for loss in losses}) == 3


def test_ids_say_what_belongs_together() -> None:
    model = collect(make_agent("several turns"))
    buffer = model.rollout_buffer
    buffer.policy_version = 7
    batch = buffer.batch(buffer.sequences)
    counts = th.bincount(batch.sequence_ids)
    assert counts.tolist() == [sequence.num_actions for sequence in buffer.sequences]
    assert int(batch.turn_ids.max()) > 0
    for row, sequence in enumerate(buffer.sequences):
        own = batch.sequence_ids == row
        assert set(batch.episode_ids[own].tolist()) == {sequence.episode}
        turns = [s.stop - s.start for s in sequence.segments]
        assert th.bincount(batch.turn_ids[own]).tolist() == turns
    # An episode has one number, and no two have the same.
    starts = {(s.env, s.segments[0].start): s.episode for s in buffer.sequences}
    assert len(set(starts.values())) == len(starts)
    assert set(batch.policy_versions.tolist()) == {0}


def test_groups_are_the_kth_episodes_of_neighbouring_slots() -> None:
    model = make_agent(env={"group_size": 2}, episodes_per_slot=3)
    buffer = collect(model).rollout_buffer
    members: dict[int, set[int]] = {}
    for sequence in buffer.sequences:
        members.setdefault(sequence.group, set()).add(sequence.env)
    assert len(members) == 3 * NUM_ENVS // 2
    assert sorted(map(sorted, members.values())) == [[0, 1]] * 3 + [[2, 3]] * 3


@dataclass(frozen=True)
class Confidence:
    """A term of somebody else's: the entropy once more."""

    weight: float
    name: str = "confidence"

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        return -new.entropies


def test_a_term_of_ones_own() -> None:
    gradients = []
    for term in (EntropyLoss(0.5), Confidence(0.5), replace(EntropyLoss(0.0))):
        model = collect(make_agent())
        objective = Objective([ClippedPolicyLoss(0.2), term])
        metrics = objective.backward(
            model.policy, model.rollout_buffer, [model.rollout_buffer.sequences]
        )
        assert np.isfinite(metrics[term.name])
        gradients.append([p.grad for p in model.policy.backbone.parameters()])
    assert all(th.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))
    assert not all(th.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


@pytest.mark.parametrize("size", [None, 8])
def test_how_many_tokens_are_off(size: int | None) -> None:
    """Of what rollout and update disagree on, as in 16 bits; in any number of parts."""
    model = collect(make_agent())
    buffer = model.rollout_buffer
    places = np.argwhere(buffer.real)
    for (step, env), by in zip(places, (0.25, -0.25, 0.15, -0.3), strict=False):
        buffer.log_probs[step, env] += by  # ratios of 0.78, 1.28, 0.86 and 1.35
    parts = split_by_size(buffer.sequences, size)
    metrics = Objective([EntropyLoss(1.0)]).backward(model.policy, buffer, parts)
    assert metrics["ratio_off"] == pytest.approx(3 / len(places))
    assert metrics["ratio_error"] == pytest.approx(np.exp(0.3) - 1, 1e-4)


def test_terms_need_names_and_a_weight() -> None:
    with pytest.raises(ValueError, match=r"a name of its own, .* entropy_loss, entropy_loss"):
        Objective([EntropyLoss(1.0), EntropyLoss(-1.0)])
    with pytest.raises(ValueError, match="other than loss, approx_kl"):
        Objective([Confidence(1.0, "approx_kl")])
    with pytest.raises(ValueError, match="nothing to minimise"):
        Objective([EntropyLoss(0.0)])


def test_what_makes_no_mean() -> None:
    terms = [EntropyLoss(1.0)]
    with pytest.raises(ValueError, match="aggregation must be one of token, sequence, constant"):
        Objective(terms, "turn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give both or neither, not None with 'constant'"):
        Objective(terms, "constant")
    with pytest.raises(ValueError, match="not 8 with 'token'"):
        Objective(terms, constant_length=8)
