from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from agents import SFT, evaluate_split
from tests.agents.agents import PLAIN_STEPS, collect, same, train, weights
from tests.agents.helpers import llama
from tests.agents.training.test_imitation import Chat, Spell


def make(task: Any = Spell, **kwargs: Any) -> Any:
    env = gym.make_vec("TextGen-v0", num_envs=4, task=task, **kwargs.pop("env", {}))
    policy = {"model": llama(), **kwargs.pop("policy", {})}
    settings = {"seed": 0, "device": "cpu", "batch_size": 16, **kwargs}
    return SFT("TransformerPolicy", env, policy_kwargs=policy, **settings)


@pytest.mark.parametrize("task", [Spell, Chat])
def test_what_is_learned_is_what_the_task_demonstrates(task: Any) -> None:
    sampling = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}  # of which nothing is to be seen
    policy = {**PLAIN_STEPS, **sampling}
    model = make(task, policy=policy, batch_size=None, learning_rate=0.0, max_grad_norm=1e9)
    collect(model)
    buffer, engine = model.rollout_buffer, model.env.unwrapped.native.engine
    batch = buffer.batch(buffer.sequences)
    loss: Any = 0.0
    for sequence in buffer.sequences:
        example = engine.examples[buffer.examples[sequence.env, sequence.segments[0].start]]
        read: list[int] = []
        for number, turn in enumerate(sequence.segments):
            said = buffer.actions[turn.start : turn.stop, sequence.env].tolist()
            text = example.references[0] + (f" {1 + 2 * number}" if task is Chat else "")
            assert engine.codec.decode_response(np.array(said)) == text
            assert said[-1] == engine.eos_token_id
            read += [*turn.context.tolist(), *said]
            logits = model.policy.backbone.model(th.tensor([read[:-1]])).logits[0, -len(said) :]
            chosen = logits.log_softmax(-1)[range(len(said)), said]
            loss = loss - chosen.sum()
            stored = buffer.log_probs[turn.start : turn.stop, sequence.env]
            assert np.abs(stored - chosen.detach().numpy()).max() < 1e-4
    loss = loss / len(batch.actions)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.policy.named_parameters() if p.grad is not None}
    update = train(model)
    assert update.log["train/nll_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert update.log["train/first_ratio_error"] < 1e-5
    (gradients,) = update.gradients
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max()
        assert error < 1e-3 * gradient.abs().max().clamp(min=1e-2), name


def test_rollouts_demonstrate_other_examples() -> None:
    model = make()
    first = collect(model).rollout_buffer.actions.copy()
    assert not np.array_equal(first, collect(model, fresh=False).rollout_buffer.actions)


def test_held_out_reward_rises() -> None:
    model = make(learning_rate=1e-2)
    before = evaluate_split(model, model.env).mean
    model.learn(2000)
    assert evaluate_split(model, model.env).mean > before + 0.5


def test_saved_and_loaded_it_goes_on_exactly(tmp_path: Any) -> None:
    model = make(Chat)
    model.learn(60).save(tmp_path / "agent")
    model.learn(60, reset_num_timesteps=False)
    loaded = SFT.load(tmp_path / "agent", env=make(Chat).env, device="cpu")
    loaded.learn(60, reset_num_timesteps=False)
    assert same(weights(model.policy), weights(loaded.policy))


def test_who_waits_demonstrates_nothing() -> None:
    answered: list[str] = []

    class Counted(Chat):
        max_turns = 1

        def demonstrate(self, example: Any, turns: Any, rng: Any) -> str:
            answered.append(example.prompt)
            return "a" if len(answered) % 2 else "a b c d e"

    collect(make(Counted))
    assert len(answered) == 4


def test_what_may_not_be_said_is_told() -> None:
    model = make(policy={"allowed_tokens": [0, 1, 2]})
    with pytest.raises(ValueError, match="A demonstration has tokens that the policy may not say"):
        model.learn(40)


def test_what_it_has_no_use_for_is_refused() -> None:
    with pytest.raises(ValueError, match="SFT has no kl_coef and whiten_rewards"):
        make(kl_coef=0.1, whiten_rewards=True)
    with pytest.raises(TypeError, match="'gamma' of SFT is unknown"):
        make(gamma=0.9)
    with pytest.raises(ValueError, match="needs an environment made by"):
        SFT("TransformerPolicy", gym.make("TextGen-v0"), device="cpu")
