from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from agents.learning.kl import estimate_kl
from agents.learning.updater import UpdateLog
from tests.agents.agents import (
    ITERATION,
    KINDS,
    NUM_ENVS,
    PLAIN_STEPS,
    STILL,
    Calls,
    LargestTensor,
    Update,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import FEW, llama
from tests.agents.oracle import Critic, Diary, losses, settle

KL_LOSS: dict[str, Any] = {"kl_coef": 0.5, "kl_estimator": "k3", "kl_in": "loss"}


def shaken(kind: str = "one turn", seed: int = 0, **kwargs: Any) -> Any:
    """An agent with a rollout, a reference other than what sampled it, and weights other still."""
    policy = {**PLAIN_STEPS, "temperature": 0.7, **kwargs.pop("policy", {})}
    model = make_agent(kind, policy=policy, seed=seed, **kwargs)
    if model.kl_coef:
        model.set_reference()
    shake(model.policy)
    collect(model)
    shake(model.policy)
    return model


# Three turns in which nobody stops are cut off.
SHORT = {"max_new_tokens": 4, "max_episode_steps": 11}
CASES: dict[str, dict[str, Any]] = {
    "k1 in the reward": {"kl_coef": 0.3},
    "k3 in the reward, whitened": {
        "kl_coef": 0.3,
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "clip_range_vf": 0.02,
    },
    "k1 in the loss": {**KL_LOSS, "kl_estimator": "k1"},
    "k3 in the loss": {**KL_LOSS, "clip_range_vf": 0.3, "micro_batch_size": 9},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_rollout_and_update_are_those_of_the_definitions(kind: str, case: str) -> None:
    given = {"kl_estimator": "k1", "kl_in": "reward", "clip_range_vf": None, **CASES[case]}
    model = make_agent(
        kind,
        env={"max_episode_steps": 6} if kind == "one turn" else SHORT,
        policy={**PLAIN_STEPS, "temperature": 0.7, "head_chunk": 10},
        **{**STILL, **given, "gamma": 0.97, "gae_lambda": 0.9, "ent_coef": 0.1, "vf_coef": 0.3},
    )
    model.set_reference()
    reference = Critic(model.policy.backbone.model, FEW, 0.7)
    shake(model.policy)
    diary = Diary()
    collect(model, diary)
    head = model.policy.value_head
    expected = settle(
        diary,
        Critic(model.policy.backbone.model, FEW, 0.7, head),
        reference,
        gamma=0.97,
        lam=0.9,
        kl_coef=given["kl_coef"],
        estimator=given["kl_estimator"],
        kl_in_reward=given["kl_in"] == "reward",
        whiten=given.get("whiten_rewards", False),
    )
    # The rollout has everything in it that could go wrong.
    assert {bool(t.after) for t in diary.tokens if t.ends} == {True, False}
    assert np.abs(expected.kl).max() > 0.05 and np.ptp(expected.values) > 0.1
    if kind == "several turns":
        follows = zip(diary.tokens, diary.tokens[NUM_ENVS:], strict=False)
        assert any(len(b.context) > len(a.context) + 1 and not a.ends for a, b in follows)
    buffer = model.rollout_buffer
    for name in ("log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns"):
        wanted = np.array(getattr(expected, name)).reshape(-1, NUM_ENVS)
        assert np.abs(getattr(buffer, name) - wanted).max() < 2e-5, name
    assert model.logger.name_to_value["kl/per_token"] == pytest.approx(np.mean(expected.kl), 1e-4)

    shake(model.policy)  # Ratios are not 1 from here on.
    np.random.seed(0)
    minibatches = [buffer.index(sequences) for sequences in buffer.minibatches(32)]
    update = train(model)
    assert len(update.gradients) == len(minibatches) == ITERATION // 32
    figures = []
    for (steps, slots), gradients in zip(minibatches, update.gradients, strict=True):
        chosen = (steps * NUM_ENVS + slots).tolist()
        old = [{name: of[i] for name, of in vars(expected).items()} for i in chosen]
        actor = Critic(model.policy.backbone.model, FEW, 0.7, head)
        parts = losses(
            [diary.tokens[i] for i in chosen],
            old,
            actor,
            clip=0.2,
            clip_value=given["clip_range_vf"],
            estimator=given["kl_estimator"],
        )
        loss = parts["policy"] - 0.1 * parts["entropy"] + 0.3 * parts["value"]
        loss += given["kl_coef"] * parts["kl"] * (given["kl_in"] == "loss")
        loss.backward()
        figures.append({name: th.as_tensor(value).item() for name, value in parts.items()})
        named = {f"backbone.model.{k}": p.grad for k, p in actor.model.named_parameters()}
        assert actor.head is not None
        named |= {f"value_head.{k}": p.grad for k, p in actor.head.named_parameters()}
        truth = {name: gradient.float() for name, gradient in named.items() if name in gradients}
        assert Update([gradients]).difference(Update([truth])) < 1e-4
    assert 0 < np.mean([figure["clipped"] for figure in figures]) < 1
    logged = {
        "train/policy_gradient_loss": ("policy", 1),
        "train/value_loss": ("value", 1),
        "train/entropy_loss": ("entropy", -1),
        "train/clip_fraction": ("clipped", 1),
    }
    if given["kl_in"] == "loss":
        logged["train/kl_loss"] = ("kl", 1)
    for name, (figure, sign) in logged.items():
        mean = sign * np.mean([of[figure] for of in figures])
        assert update.log[name] == pytest.approx(mean, rel=1e-4, abs=1e-5), name


SHARED = ["entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction"]
SHARED += ["loss", "explained_variance", "n_updates", "clip_range"]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("optimizer", [th.optim.SGD, th.optim.Adam])
def test_update_is_sb3s(kind: str, optimizer: Any) -> None:
    sgd = optimizer is th.optim.SGD
    settings: dict[str, Any] = {
        "learning_rate": 0.02 if sgd else 1e-3,
        "policy": {"optimizer_class": optimizer},
        "ent_coef": 0.02,
        "n_epochs": 3,
        "max_grad_norm": 0.5,
    }
    ours, theirs = (shaken(kind, **copy.deepcopy(settings)) for _ in range(2))
    before = weights(ours.policy)
    assert same(before, weights(theirs.policy))
    update = train(ours)
    np.random.seed(0)
    stable_baselines3.PPO.train(theirs)
    moved = max(float((before[k] - v).abs().max()) for k, v in weights(ours.policy).items())
    apart = {
        name: float((value - weights(theirs.policy)[name]).abs().max())
        for name, value in weights(ours.policy).items()
    }
    assert moved > 1e-3 and max(apart.values()) < 2e-3 * moved, apart
    log = theirs.logger.name_to_value
    for name in SHARED:
        assert update.log[f"train/{name}"] == pytest.approx(log[f"train/{name}"], 1e-3, 1e-5), name


def test_clipped_value_loss_is_the_larger_one_and_sb3s_is_not() -> None:
    logged = []
    for clip_range_vf in (0.01, None):
        models = [shaken(clip_range_vf=clip_range_vf, **STILL) for _ in range(2)]
        logged.append(train(models[0]).log["train/value_loss"])
        stable_baselines3.PPO.train(models[1])
        logged.append(models[1].logger.name_to_value["train/value_loss"])
    larger, clipped, unclipped, theirs = logged
    assert unclipped == pytest.approx(theirs, 1e-5)
    # Each of the two is larger for some tokens.
    assert larger > 1.001 * max(clipped, unclipped)


def test_target_kl_stops_before_the_step() -> None:
    settings: dict[str, Any] = {"learning_rate": 0.02, "n_epochs": 6, "target_kl": 0.01}
    models = [collect(make_agent(policy=PLAIN_STEPS, **settings)) for _ in range(2)]
    seen: list[dict[str, th.Tensor]] = []
    score = models[0].policy.score

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(weights(models[0].policy))
        return score(*args, **kwargs)

    models[0].policy.score = watched
    update = train(models[0])
    # There were some steps before, and all would have been many more.
    assert 2 <= len(update.gradients) == len(seen) - 1 < 6 * ITERATION // 32 - 1
    assert same(seen[-1], weights(models[0].policy)) and not same(seen[-1], seen[-2])
    assert all(parameter.grad is None for parameter in models[0].policy.parameters())
    np.random.seed(0)
    stable_baselines3.PPO.train(models[1])
    log = models[1].logger.name_to_value
    assert update.log["train/n_updates"] == log["train/n_updates"]


def test_the_approximate_kl_is_that_of_the_whole_rollout() -> None:
    """Also where the last pass over it was left: not of the minibatch alone that stopped it."""
    log = UpdateLog(minibatches=4)
    log.metrics["approx_kl"] += [0.0, 0.1, 0.2, 0.3, 0.4, 1.3]
    assert log.approx_kl == pytest.approx((0.2 + 0.3 + 0.4 + 1.3) / 4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_micro_batches_change_nothing(kind: str) -> None:
    updates: list[Update] = []
    sizes: dict[int | None, list[tuple[int, int]]] = {}
    for size in (None, 1, 20, 10**6):
        model = shaken(kind, micro_batch_size=size, ent_coef=0.1, **STILL, **KL_LOSS)
        score, counts = model.policy.score, sizes.setdefault(size, [])

        def counting(
            batch: Any, actions: Any, *args: Any, keep: Any = counts, call: Any = score
        ) -> Any:
            keep.append((len(batch.tokens), len(actions)))
            return call(batch, actions, *args)

        model.policy.score = counting
        updates.append(train(model))
    for update in updates[1:]:
        assert updates[0].difference(update) < 1e-5
        for name, value in updates[0].log.items():
            if name.startswith(("train/", "kl/")):
                assert update.log[name] == pytest.approx(value, 1e-4, 1e-6), name
    sequences = sum(rows for rows, _ in sizes[None])
    for size, counts in sizes.items():
        assert sum(rows for rows, _ in counts) == sequences
        assert sum(actions for _, actions in counts) == ITERATION
        limit = size or 10**6
        assert all(actions <= limit or rows == 1 for rows, actions in counts)
    assert all(rows == 1 for rows, _ in sizes[1]) and len(sizes[1]) == sequences
    assert len(sizes[None]) == len(sizes[10**6]) < len(sizes[20]) < len(sizes[1])


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_gradients_are_clipped_by_their_norm_over_all_parts(micro_batch_size: int | None) -> None:
    free = train(shaken(micro_batch_size=micro_batch_size, **STILL))
    norms = [norm_of(gradients) for gradients in free.gradients]
    limit = 0.5 * min(norms)
    clipped = train(shaken(micro_batch_size=micro_batch_size, **{**STILL, "max_grad_norm": limit}))
    for gradients, whole, norm in zip(clipped.gradients, free.gradients, norms, strict=True):
        assert norm_of(gradients) == pytest.approx(limit, 1e-4)
        expected = {name: gradient * limit / norm for name, gradient in whole.items()}
        assert Update([gradients]).difference(Update([expected])) < 1e-4
    # What is logged is the norm before.
    assert clipped.log["train/grad_norm"] == pytest.approx(np.mean(norms), 1e-4)


def norm_of(gradients: dict[str, th.Tensor]) -> float:
    return float(sum(gradient.double().pow(2).sum() for gradient in gradients.values()) ** 0.5)


def test_kl_in_the_reward_is_not_in_the_loss() -> None:
    model, without = (shaken(kl_coef=0.5, **STILL) for _ in range(2))
    without.kl_coef = 0.0  # The rewards have been settled.
    ours, theirs = train(model), train(without)
    assert ours.difference(theirs) == 0 and "train/kl_loss" not in ours.log
    # In the loss it would be seen.
    assert train(shaken(**STILL, **KL_LOSS)).difference(theirs) > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_loss_has_the_gradient_of_the_kl(estimator: Any) -> None:
    """Over all tokens instead of samples: the gradient is that of KL(policy || reference)."""
    generator = th.Generator().manual_seed(0)
    scores, old, reference = th.randn(3, 6, generator=generator, dtype=th.float64)
    scores.requires_grad_()
    log_probs, old, reference = (x.log_softmax(-1) for x in (scores, old, reference))
    terms = (log_probs - old).exp() * estimate_kl(log_probs, reference, estimator)
    (estimated,) = th.autograd.grad((old.exp() * terms).sum(), scores, retain_graph=True)
    kl = (log_probs.exp() * (log_probs - reference)).sum()
    (exact,) = th.autograd.grad(kl, scores)
    assert th.allclose(estimated, exact)


def test_reward_at_the_reference_is_what_it_was() -> None:
    # Nothing has been learned, so every token's KL is 0.
    plain, penalised = collect(make_agent()), collect(make_agent(kl_coef=10.0))
    assert np.abs(plain.rollout_buffer.rewards - penalised.rollout_buffer.rewards).max() < 1e-4


@pytest.mark.parametrize("config", [None, llama()])
def test_no_logits_of_all_tokens_at_once(config: Any) -> None:
    vocabulary, seen, updates = 2045, {}, {}
    for chunk in (7, 10**6):
        policy = {"head_chunk": chunk, "top_k": 5, **PLAIN_STEPS}
        policy.update({} if config is None else {"model": config})
        model = make_agent(policy=policy, ent_coef=0.1, batch_size=ITERATION, **STILL, kl_coef=0.3)
        collect(model)
        shake(model.policy)
        with LargestTensor() as largest:
            updates[chunk] = train(model)
        seen[chunk] = largest.elements
        with LargestTensor() as largest:
            collect(model)
        seen[-chunk] = largest.elements
    assert updates[7].difference(updates[10**6]) < 1e-5
    # The embeddings and their gradients are there, of 32 numbers to a token.
    assert seen[7] == seen[-7] == 32 * vocabulary < ITERATION * vocabulary
    assert seen[10**6] >= ITERATION * vocabulary and seen[-(10**6)] >= ITERATION * vocabulary


@pytest.mark.parametrize("size", [0, -5])
def test_sizes_that_make_no_sense(size: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch_size must be at least 1, but it is {size}"):
        make_agent(micro_batch_size=size)
    with pytest.raises(ValueError, match=f"head_chunk must be .* at least 1, but it is {size}"):
        make_agent(policy={"head_chunk": size})


def test_reference_reads_each_sequence_once_if_it_costs_something_at_all() -> None:
    counts = []
    for kl_coef in (0.0, 0.1):
        model = make_agent(kl_coef=kl_coef)
        if kl_coef:
            model.set_reference()
            reference = Calls(model.reference.model.get_input_embeddings())
        policy = Calls(model.policy.backbone.model.get_input_embeddings())
        collect(model)
        counts.append(policy.take())
    assert counts[0] == counts[1]
    # Each token once, but for the last one of a sequence, which nothing follows.
    lengths = [sequence.length - 1 for sequence in model.rollout_buffer.sequences]
    assert reference.tokens(1) == sum(lengths)
    assert reference.take() <= round(ITERATION / 32) + 1
    free = make_agent().learn(ITERATION)
    assert free.reference is None and not free.rollout_buffer.ref_log_probs.any()


def test_learning_rate_falls_from_its_first_to_its_last_update() -> None:
    model = make_agent(learning_rate=LinearSchedule(4e-3, 0.0, 1.0), n_epochs=1)
    rates: list[float] = []
    model.policy.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    model.learn(4 * ITERATION)
    # Reckoned from where a rollout began: no update is wasted on a rate of 0.
    steps = ITERATION // 32
    assert rates == pytest.approx([r for r in (4e-3, 3e-3, 2e-3, 1e-3) for _ in range(steps)])
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(1e-3)
