from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th

import agents
from agents import A2C, PPO, Reinforce
from agents.algorithms.arguments import sb3_class
from tests.agents.agents import (
    NUM_ENVS,
    PLAIN_STEPS,
    Calls,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import FEW, llama
from tests.agents.oracle import Critic, Diary, settle


def make(cls: Any, kind: str = "one turn", **kwargs: Any) -> Any:
    return make_agent(kind, cls=cls, **kwargs)


@pytest.mark.parametrize("cls", [A2C, PPO])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_sb3s_policies_are_trained_by_sb3_to_the_bit(cls: Any, env_id: str) -> None:
    models = [
        algorithm("MlpPolicy", env_id, seed=3, n_steps=16, device="cpu").learn(64)
        for algorithm in (cls, cast("Any", sb3_class(cls)))
    ]
    assert same(*(weights(model.policy) for model in models))


@pytest.mark.parametrize("cls", [A2C, PPO, Reinforce])
def test_the_arguments_are_sb3s_and_ours(cls: Any) -> None:
    own = list(inspect.signature(cls).parameters)
    theirs = [n for n in inspect.signature(sb3_class(cls)).parameters if n not in cls.unused]
    assert own[: len(theirs)] == theirs
    assert {"kl_coef", "ref_model", "micro_batch_size", "episodes_per_slot"} <= set(own)
    assert own[len(theirs) :] and "args" not in own and "kwargs" not in own


@pytest.mark.parametrize("cls", [A2C, PPO])
def test_every_argument_is_documented(cls: Any) -> None:
    documented = inspect.getdoc(cls) or ""
    for name in inspect.signature(cls).parameters:
        assert f"\n    {name}: " in documented, name


def test_arguments_by_position_and_by_name() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", 1e-3, 7)
    assert (model.learning_rate, model.n_steps) == (1e-3, 7)
    assert A2C("MlpPolicy", "CartPole-v1", n_steps=None).n_steps == 5  # SB3's
    with pytest.raises(TypeError, match="'n_steps' of A2C is got twice"):
        A2C("MlpPolicy", "CartPole-v1", 1e-3, 7, n_steps=8)
    with pytest.raises(TypeError, match="'n_epochs' of A2C is unknown; it has policy, env"):
        A2C("MlpPolicy", "CartPole-v1", n_epochs=8)


def test_reinforce_has_no_critic_and_trains_nothing_but_transformers() -> None:
    model = make(Reinforce)
    assert not model.policy.critic and not [k for k in weights(model.policy) if "value" in k]
    before = weights(model.policy)
    model.learn(NUM_ENVS * model.n_steps)
    assert not same(before, weights(model.policy))
    assert not model.rollout_buffer.values.any()
    assert "train/value_loss" not in model.logger.name_to_value
    assert "train/explained_variance" not in model.logger.name_to_value
    with pytest.raises(ValueError, match="Reinforce trains the policy 'TransformerPolicy'"):
        Reinforce("MlpPolicy", "CartPole-v1")


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
@pytest.mark.parametrize("cls", [A2C, Reinforce])
@pytest.mark.parametrize("micro_batch_size", [None, 9])
def test_gradients_are_those_of_the_definitions(
    cls: Any, kind: str, micro_batch_size: int | None
) -> None:
    model = make(
        cls,
        kind,
        policy={**PLAIN_STEPS, "temperature": 0.7},
        learning_rate=0.0,
        max_grad_norm=1e9,
        gamma=0.97,
        gae_lambda=0.9,
        ent_coef=0.1,
        vf_coef=0.3,
        micro_batch_size=micro_batch_size,
    )
    shake(model.policy)
    diary = Diary()
    collect(model, diary)
    buffer, head = model.rollout_buffer, model.policy.value_head
    actor = Critic(model.policy.backbone.model, FEW, 0.7, head)
    index = buffer.index(buffer.sequences)
    chosen = [int(step * NUM_ENVS + slot) for step, slot in zip(*index, strict=True)]
    if cls is A2C:
        expected = settle(
            diary,
            actor,
            None,
            gamma=0.97,
            lam=0.9,
            kl_coef=0.0,
            estimator="k1",
            kl_in_reward=False,
            whiten=False,
        )
        advantages, returns = expected.advantages, expected.returns
    else:
        advantages = returns = to_go(diary, 0.97)
        assert len(chosen) < len(diary.tokens)  # what the end of the rollout cuts is left out
    mean, std = (
        np.mean([advantages[i] for i in chosen]),
        np.std([advantages[i] for i in chosen], ddof=1),
    )
    loss: Any = 0.0
    for i in chosen:
        token = diary.tokens[i]
        log_probs = actor.log_probs(token.context)
        loss -= (advantages[i] - mean) / std * log_probs[FEW.index(token.token)]
        loss += 0.1 * (log_probs.exp() * log_probs).sum()
        if cls is A2C:
            loss += 0.3 * (returns[i] - actor.value(token.context)) ** 2
    (loss / len(chosen)).backward()
    update = train(model)
    (gradients,) = update.gradients
    named = {f"backbone.model.{k}": p.grad for k, p in actor.model.named_parameters()}
    if actor.head is not None:
        named |= {f"value_head.{k}": p.grad for k, p in actor.head.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        truth = named[name]
        assert truth is not None
        assert float((gradient - truth.float()).abs().max()) < 1e-4 * scale, name


def to_go(diary: Diary, gamma: float) -> list[float]:
    """The discounted sums of the rewards of an episode from each token on."""
    result = [0.0] * len(diary.tokens)
    for i, token in enumerate(diary.tokens):
        for number, later in enumerate(t for t in diary.tokens[i:] if t.slot == token.slot):
            result[i] += gamma**number * later.reward
            if later.ends:
                break
    return result


@pytest.mark.parametrize("cls", [A2C, Reinforce])
def test_saved_and_loaded_it_goes_on_exactly(cls: Any, tmp_path: Path) -> None:
    model = make(cls, kl_coef=0.1)
    steps = NUM_ENVS * model.n_steps
    model.learn(steps).save(tmp_path / "agent")
    model.learn(2 * steps, reset_num_timesteps=False)
    loaded = cls.load(tmp_path / "agent", env=make(cls).env, device="cpu")
    loaded.learn(2 * steps, reset_num_timesteps=False)
    assert same(weights(model.policy), weights(loaded.policy))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all learners take their warm start from."""
    return tmp_path_factory.mktemp("warm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A2C", "Reinforce"])
def test_it_learns_textgen(name: str, warm: Path) -> None:
    """Some words that sound good are soon found."""
    size = {"hidden_size": 64, "intermediate_size": 192, "initializer_range": 0.08}
    model = getattr(agents, name)(
        "TransformerPolicy",
        gym.make_vec("TextGen-v0", num_envs=16, max_new_tokens=8),
        learning_rate=3e-3,
        n_steps=16,
        seed=0,
        device="cpu",
        policy_kwargs={"model": llama(**size)},
    )
    agents.warm_start(model, passes=1, progress=False, cache=warm)
    held_out = gym.make("TextGen-v0", max_new_tokens=8, split="test")
    before = agents.evaluate_split(model, held_out, max_examples=64)
    model.learn(16 * 16 * 18)
    after = agents.evaluate_split(model, held_out, max_examples=64)
    error = float(np.hypot(before.standard_error, after.standard_error))
    assert after.mean > before.mean + 3 * error


def test_no_value_head_is_run() -> None:
    model = make(Reinforce)
    heads = [
        m for m in model.policy.modules() if isinstance(m, th.nn.Linear) and m.out_features == 1
    ]
    assert not heads
    with_critic = make(A2C)
    calls = Calls(with_critic.policy.value_head)
    collect(with_critic)
    assert calls.take() >= with_critic.n_steps


@pytest.mark.parametrize("cls", [A2C, PPO])
def test_a_critic_that_is_missing(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} needs a critic"):
        make(cls, policy={"critic": False})


@pytest.mark.parametrize("policy", [{"critic": True}, {"value_model": "copy"}])
def test_a_critic_that_has_no_use(policy: Any) -> None:
    with pytest.raises(ValueError, match="Reinforce has no critic"):
        make(Reinforce, policy=policy)


def test_sb3_classes_are_found() -> None:
    assert sb3_class(PPO) is stable_baselines3.PPO and sb3_class(A2C) is stable_baselines3.A2C
