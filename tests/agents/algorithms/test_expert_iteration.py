from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch as th

from agents import ExpertIteration
from tests.agents.agents import collect, same, shake, train, weights
from tests.agents.algorithms.test_group_algorithms import (
    GROUP,
    Notes,
    joined,
    log_probs,
    make,
    said,
)
from tests.agents.helpers import FEW
from tests.agents.oracle import Critic


def expert(kind: str = "one turn", **kwargs: Any) -> Any:
    return make(ExpertIteration, kind, **kwargs)


@pytest.mark.parametrize(
    ("keep_best", "threshold", "kind"),
    [
        (1, None, "one turn"),
        (2, None, "several turns"),
        (0, -0.02, "one turn"),
        (3, -0.02, "one turn"),
    ],
)
def test_what_is_imitated_is_the_best_by_definition(
    keep_best: int, threshold: float | None, kind: str
) -> None:
    size = GROUP if keep_best else 1
    model = expert(kind, keep_best=keep_best, threshold=threshold, group_size=size)
    notes = Notes()
    collect(model, notes)
    groups = defaultdict(list)
    for (slot, number), turns in notes.episodes().items():
        earned = sum(token.reward for token in joined(turns))
        groups[slot // size, number].append((earned, (slot, number), joined(turns)))
    expected = {}
    for members in groups.values():
        mean = sum(earned for earned, *_ in members) / len(members)
        ranked = sorted(members, key=lambda member: -member[0])
        for place, (earned, key, tokens) in enumerate(ranked):
            best = not keep_best or (place < keep_best and earned > mean + 1e-6)
            if best and (threshold is None or earned >= threshold):
                expected[key] = tokens
    buffer = model.rollout_buffer
    assert 0 < len(expected) < len(notes.episodes())
    kept = [(s.env, s.segments[0].start) for s in buffer.sequences]
    assert sorted(kept) == sorted((tokens[0].slot, tokens[0].step) for tokens in expected.values())
    share = model.logger.name_to_value["rollout/kept"]
    assert share == pytest.approx(len(expected) / len(notes.episodes()))

    shake(model.policy)
    update = train(model)
    actor = Critic(model.policy.backbone.model, FEW, 0.7)
    every = th.cat([said(log_probs(actor, tokens), tokens) for tokens in expected.values()])
    loss = -every.mean()
    loss.backward()
    assert update.log["train/nll_loss"] == pytest.approx(loss.item(), rel=1e-4)
    (gradients,) = update.gradients
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in actor.model.named_parameters():
        ours = gradients[f"backbone.model.{name}"]
        assert (ours - parameter.grad.float()).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("kl", [{}, {"kl_coef": 0.5, "kl_in": "reward"}])
def test_where_all_earn_the_same_nothing_is_learned(kl: dict[str, Any]) -> None:
    alike = {"reward": [lambda transcripts: [1.0] * len(transcripts)]}
    model = expert(env=alike, learning_rate=0.1, **kl)
    if kl:  # which alone would make some of them better
        model.set_reference()
        shake(model.reference)
    before = weights(model.policy)
    model.learn(50)
    assert same(before, weights(model.policy))
    assert model.logger.name_to_value["rollout/kept"] == 0


def test_saved_and_loaded_it_goes_on_exactly(tmp_path: Any) -> None:
    def fresh() -> Any:
        return expert(learning_rate=1e-2, n_epochs=2)

    model = fresh()
    model.learn(100).save(tmp_path / "agent")
    model.learn(100, reset_num_timesteps=False)
    loaded = ExpertIteration.load(tmp_path / "agent", env=fresh().env, device="cpu")
    with pytest.raises(ValueError, match="give keep_best or a threshold"):
        ExpertIteration.load(tmp_path / "agent", env=fresh().env, device="cpu", keep_best=0)
    loaded.learn(100, reset_num_timesteps=False)
    assert same(weights(model.policy), weights(loaded.policy))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 1}, "ExpertIteration compares the responses to one prompt"),
        ({"keep_best": 0}, "give keep_best or a threshold"),
        ({"kl_in": "advantage", "kl_coef": 0.1}, "What is imitated has no advantage"),
        ({"keep_best": -1}, "keep_best must be at least 0"),
    ],
)
def test_mistakes(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert(**kwargs)
