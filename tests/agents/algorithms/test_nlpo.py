from __future__ import annotations

from typing import Any

import pytest
import torch as th

from agents import NLPO, PPO, TransformerPolicy, warm_start
from agents.policies.masked import MaskedTransformerPolicy
from tests.agents.agents import PLAIN_STEPS, collect, make_agent, same, shake, train, weights
from tests.agents.helpers import EOS, FEW
from tests.agents.oracle import Critic, Diary, Token

TOP = 0.6


def make(kind: str = "one turn", policy: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    settings = {"temperature": 0.7, **PLAIN_STEPS, **(policy or {})}
    return make_agent(kind, policy=settings, cls=NLPO, **{"top_mask": TOP, **kwargs})


def masked(token: Token, actor: Critic, copy: Critic) -> Any:
    """By definition, the log-probabilities of the allowed tokens: the copy's top-p set and EOS."""
    ranked = sorted(enumerate(copy.log_probs(token.context).tolist()), key=lambda pair: -pair[1])
    inside, mass = [], 0.0
    for place, log_prob in ranked:
        if mass >= TOP:
            break
        inside.append(place)
        mass += float(th.tensor(log_prob).exp())
    inside = sorted({*inside, FEW.index(EOS)})
    chosen = th.full((len(FEW),), -th.inf, dtype=th.float64)
    chosen[inside] = actor.log_probs(token.context)[inside].log_softmax(-1)
    return chosen


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_tokens_are_of_the_copys_likely_ones_and_scored_so(kind: str) -> None:
    model = make(kind, kl_coef=0.1, n_epochs=1, batch_size=None, learning_rate=0.0)
    model.set_reference()
    shake(model.reference, 0.1)
    model.rollouts_learned = 1  # so that the copy stays what it is now
    shake(model.policy.backbone, 0.1)
    diary = Diary()
    collect(model, diary)
    buffer, policy = model.rollout_buffer, model.policy
    actor, copy, reference = (
        Critic(backbone.model, FEW, 0.7)
        for backbone in (policy.backbone, policy.mask_backbone, model.reference)
    )
    outside = 0
    for token in diary.tokens:
        at, where = FEW.index(token.token), (token.step, token.slot)
        expected = masked(token, actor, copy)
        assert float(expected[at]) == pytest.approx(buffer.log_probs[where], abs=1e-5)
        theirs = float(reference.log_probs(token.context)[at])  # which has no mask
        assert theirs == pytest.approx(buffer.ref_log_probs[where], abs=1e-5)
        outside += int(th.isinf(expected).sum())
    assert outside > len(diary.tokens)
    assert train(model).log["train/first_ratio_error"] < 1e-5


def test_gradients_go_by_the_masked_distribution() -> None:
    model = make(n_epochs=1, batch_size=None, learning_rate=0.0, max_grad_norm=1e9, ent_coef=0.1)
    diary = Diary()
    model.rollouts_learned = 1
    shake(model.policy.backbone, 0.1)
    collect(model, diary)
    batch = model.rollout_buffer.batch(model.rollout_buffer.sequences)
    actor = Critic(model.policy.backbone.model, FEW, 0.7)
    copy = Critic(model.policy.mask_backbone.model, FEW, 0.7)
    rows = [masked(token, actor, copy) for token in diary.tokens]
    entropies = [-(r[r.isfinite()].exp() * r[r.isfinite()]).sum() for r in rows]
    (
        th.stack(entropies).sum()
        + sum(r[FEW.index(t.token)] for r, t in zip(rows, diary.tokens, strict=True))
    ).backward()
    scores = model.policy.score(batch.sequences, batch.actions)
    (scores.log_probs.sum() + scores.entropies.sum()).backward()
    scale = max(float(p.grad.abs().max()) for p in actor.model.parameters() if p.grad is not None)
    for name, parameter in actor.model.named_parameters():
        own = dict(model.policy.backbone.model.named_parameters())[name].grad
        assert (own - parameter.grad.float()).abs().max() < 1e-4 * scale, name
    assert all(p.grad is None for p in model.policy.mask_backbone.parameters())


def test_a_sampled_token_stays_possible_whatever_the_copy_has_become() -> None:
    model = collect(make())
    batch = model.rollout_buffer.batch(model.rollout_buffer.sequences)
    shake(model.policy.mask_backbone, 1.0)
    model.policy.clear_cache()
    assert model.policy.score(batch.sequences, batch.actions).log_probs.isfinite().all()


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_the_copy_is_renewed_now_and_then(adapter: Any) -> None:
    model = make(target_update_iterations=2, policy={"peft_config": adapter})
    copies = []

    def copy() -> dict[str, th.Tensor]:
        return weights(model.policy.mask_backbone)

    train_once = model.train

    def train() -> None:
        train_once()
        copies.append(copy())

    model.train = train
    first = copy()
    model.learn(4 * model.n_steps * model.n_envs)
    assert same(copies[0], first) and not same(copies[1], first)
    assert same(copies[2], copies[1]) and not same(copies[3], copies[2])
    assert model.logger.name_to_value["train/first_ratio_error"] < 1e-5


def test_the_copy_is_what_the_warm_start_made() -> None:
    model = make()
    warm_start(model, passes=1, progress=False, cache=False)
    own, copy = weights(model.policy.backbone), weights(model.policy.mask_backbone)
    assert same(own, copy)
    shake(model.policy.backbone)
    model.learn(0)
    assert same(weights(model.policy.backbone), weights(model.policy.mask_backbone))


def test_without_the_cache_it_is_the_same() -> None:
    rollouts = []
    for use_cache in (True, False):
        model = make("several turns", policy={"use_cache": use_cache})
        model.rollouts_learned = 1
        shake(model.policy.backbone, 0.1)
        rollouts.append(collect(model).rollout_buffer)
    assert (rollouts[0].actions == rollouts[1].actions).all()
    assert abs(rollouts[0].log_probs - rollouts[1].log_probs).max() < 1e-5


def test_saved_and_loaded_it_goes_on_exactly(tmp_path: Any) -> None:
    steps = make().n_steps * make().n_envs
    model = make(target_update_iterations=3)
    model.learn(steps).save(tmp_path / "agent")
    model.learn(steps, reset_num_timesteps=False)
    loaded = NLPO.load(tmp_path / "agent", env=make().env, device="cpu")
    assert loaded.policy.top_mask == TOP and isinstance(loaded.policy, MaskedTransformerPolicy)
    assert not same(weights(loaded.policy.backbone), weights(loaded.policy.mask_backbone))
    loaded.learn(steps, reset_num_timesteps=False)
    assert same(weights(model.policy), weights(loaded.policy))


def test_all_of_the_probability_is_ppo() -> None:
    learned = []
    for cls in (NLPO, PPO):
        policy = {"temperature": 0.7, **PLAIN_STEPS}
        model: Any = make_agent(policy=policy, cls=cls, top_mask=1.0)
        model.learn(2 * model.n_steps * model.n_envs)
        learned.append(weights(model.policy.backbone))
    first, second = learned
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)


def test_a_subclass_has_the_masked_policy_too() -> None:
    class Mine(NLPO):
        """Nothing new."""

    model = make_agent(cls=Mine)
    assert isinstance(model.policy, MaskedTransformerPolicy)
    with pytest.raises(ValueError, match="NLPO needs the text 'TransformerPolicy'"):
        NLPO(TransformerPolicy, model.env, device="cpu")


def test_an_adapters_copy_is_saved_and_another_probability_may_be_loaded(tmp_path: Any) -> None:
    model = make(policy={"peft_config": {"r": 2}}, learning_rate=0.1)
    model.learn(model.n_steps * model.n_envs).save(tmp_path / "agent")
    copy = weights(model.policy.mask_backbone)
    loaded: Any = NLPO.load(tmp_path / "agent", device="cpu", top_mask=0.9)
    assert loaded.policy.top_mask == 0.9 and same(weights(loaded.policy.mask_backbone), copy)
    own = model.policy.backbone.adapter.weights()
    assert any(not th.equal(v, copy[k.replace(".", "/")]) for k, v in own.items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"whole_episodes": True}, "give episodes_per_slot instead of whole_episodes"),
        ({"policy": {"top_mask": 0.5}}, "top_mask is an argument of NLPO: leave it out"),
        ({"top_mask": 0.0}, "top_mask must be more than 0 and at most 1, but it is 0"),
        ({"top_mask": 1.5}, "top_mask must be more than 0 and at most 1, but it is 1.5"),
        ({"target_update_iterations": 0}, "target_update_iterations must be at least 1"),
    ],
)
def test_mistakes(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
    with pytest.raises(ValueError, match="NLPO trains the policy 'TransformerPolicy', not"):
        NLPO("MlpPolicy", "CartPole-v1")
