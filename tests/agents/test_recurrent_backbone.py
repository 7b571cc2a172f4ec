"""A recurrent model, defined here alone, is a backbone like any other: agents train it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from torch import nn

from agents import PPO, TransformerPolicy, evaluate_split
from agents.models.backbone import Backbone, Observation
from agents.models.layout import CausalLayout, SequenceBatch
from tests.agents.agents import STILL, Update, collect, same, train, weights
from tests.agents.helpers import EOS, FEW, roll_out, vec_env
from tests.textenvs.toys import Chat, encode
from textenvs.task import Example, Task, Transcript


class GRUBackbone(Backbone):
    """A language model of one GRU layer."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.layout = CausalLayout()
        self.num_logits, self.hidden_size = vocab_size, hidden_size
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, vocab_size)

    @property
    def config(self) -> dict[str, int]:
        return {"hidden_size": self.hidden_size}

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        return self._read(batch.tokens)[batch.action_positions]

    def last_hidden(self, observation: Observation) -> th.Tensor:
        rows = []
        for prompt, k, response, n in zip(*(observation[key] for key in KEYS), strict=True):
            rows.append(th.as_tensor(np.concatenate([prompt[: k[0]], response[: n[0]]])))
        hidden = self._read(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return hidden[th.arange(len(rows)), th.tensor([len(row) - 1 for row in rows])]

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        return self.head(hidden)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: Path) -> None:
        th.save(self.state_dict(), folder / "gru.pt")

    def _read(self, tokens: th.Tensor) -> th.Tensor:
        return self.gru(self.embedding(tokens))[0]  # type: ignore[no-any-return]


KEYS = ("prompt", "prompt_length", "response", "response_length")


class GRUPolicy(TransformerPolicy):
    """The policy on such a model; everything else is inherited."""

    def make_backbone(self, model: Any, peft_config: Any = None) -> Backbone:
        return GRUBackbone(self.vocab_size, **model)


LETTERS = "kqvz"


class Recall(Task):
    """The right answer is the letter that the prompt began with, some tokens ago."""

    max_new_tokens = 1

    def examples(self, split: str) -> Sequence[Example]:
        return [Example(f"{letter}: {rest} =") for letter in LETTERS for rest in LETTERS]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response == t.example.prompt[0]) for t in transcripts]


SLOTS, STEPS = 4, 12


def agent(cls: Any = PPO, policy: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    kwargs = {"n_steps": STEPS, "batch_size": 24, "n_epochs": 2, "learning_rate": 1e-2, **kwargs}
    model = cls(
        GRUPolicy,
        gym.make_vec("TextGen-v0", num_envs=SLOTS, task=Chat),
        policy_kwargs={"model": {"hidden_size": 16}, "allowed_tokens": FEW, **(policy or {})},
        **{"seed": 0, "device": "cpu", **kwargs},
    )
    nn.init.normal_(model.policy.value_head.weight, generator=th.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "policy", [{}, {"value_model": "copy"}, {"value_model": {"hidden_size": 9}}]
)
def test_the_first_ratio_is_1(policy: dict[str, Any], use_cache: bool) -> None:
    model = agent(policy={**policy, "use_cache": use_cache}, kl_coef=0.1)
    assert isinstance(model.policy.backbone, GRUBackbone)
    for rollout in range(3):  # the later ones begin in the middle of responses
        collect(model, fresh=rollout == 0)
        if rollout == 0:
            assert abs(model.logger.name_to_value["kl/per_token"]) < 1e-6
        samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
        values = model.policy.predict_values(samples.observations).flatten()
        th.testing.assert_close(values, samples.old_values, rtol=1e-5, atol=1e-5)
        log = train(model).log
        assert log["train/first_ratio_error"] < 1e-5
    assert abs(log["kl/per_token"]) > 1e-4


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_gradients_are_those_of_one_sequence_at_a_time(micro_batch_size: int | None) -> None:
    model = agent(**STILL, batch_size=SLOTS * STEPS, micro_batch_size=micro_batch_size)
    buffer, policy = collect(model).rollout_buffer, model.policy
    assert len({sequence.length for sequence in buffer.sequences}) > 1
    update = train(model)
    policy.optimizer.zero_grad()
    mask = th.full((policy.vocab_size,), -th.inf)
    mask[FEW] = 0
    mean, std = buffer.advantages.mean(), buffer.advantages.std(ddof=1) + 1e-8
    for sequence in buffer.sequences:
        samples = buffer.samples([sequence])
        state, hidden = None, []
        for token in samples.observations["tokens"][0]:
            output, state = policy.backbone.gru(policy.backbone.embedding(token[None]), state)
            hidden.append(output)
        states = th.cat(hidden)[samples.observations["action_positions"][0]]
        log_probs = (policy.backbone.head(states) + mask).log_softmax(-1)
        log_prob = log_probs.gather(-1, samples.actions[:, None])[:, 0]
        ratio = (log_prob - log_prob.detach()).exp()
        loss = -(samples.advantages - mean) / std * ratio
        loss = loss + 0.5 * (samples.returns - policy.value_head(states)[:, 0]) ** 2
        (loss.sum() / (SLOTS * STEPS)).backward()
    truth = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert update.difference(Update([truth])) < 1e-4


def test_it_learns_what_it_has_to_remember() -> None:
    letters = [encode(letter)[0] for letter in LETTERS]
    env: Any = gym.make_vec("TextGen-v0", num_envs=32, task=Recall)
    model = PPO(
        GRUPolicy,
        env,
        learning_rate=1e-2,
        n_steps=8,
        batch_size=64,
        seed=0,
        device="cpu",
        policy_kwargs={"model": {"hidden_size": 32}, "allowed_tokens": [EOS, *letters]},
    )
    rewards = []
    for _ in range(20):
        model.learn(32 * 8, reset_num_timesteps=False)
        rewards.append(float(model.rollout_buffer.rewards.mean()))
    assert rewards[0] < 0.35 and rewards[-1] > 0.9
    assert evaluate_split(model, gym.make("TextGen-v0", task=Recall)).mean > 0.9


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_saved_agents_predict_and_go_on_alike(kl_coef: float, tmp_path: Path) -> None:
    model = agent(kl_coef=kl_coef)
    model.learn(2 * SLOTS * STEPS)
    model.save(tmp_path / "agent")
    half = weights(model.policy)
    played = roll_out(model.policy, vec_env(), 20)
    model.learn(2 * SLOTS * STEPS, reset_num_timesteps=False)
    loaded = PPO.load(tmp_path / "agent", env=agent().env, device="cpu")
    assert isinstance(loaded.policy, GRUPolicy) and same(weights(loaded.policy), half)
    again = roll_out(loaded.policy, vec_env(), 20)
    assert np.array_equal(played.actions, again.actions)
    assert np.array_equal(played.log_probs, again.log_probs)
    loaded.learn(2 * SLOTS * STEPS, reset_num_timesteps=False)
    assert np.array_equal(model.rollout_buffer.actions, loaded.rollout_buffer.actions)
    assert same(weights(model.policy), weights(loaded.policy))
    assert not same(weights(model.policy), half)


def test_folders_hold_what_the_backbone_writes(tmp_path: Path) -> None:
    policy = agent().policy
    policy.save_pretrained(tmp_path / "folder")
    saved = th.load(tmp_path / "folder" / "gru.pt", weights_only=True)
    assert same(saved, weights(policy.backbone))
    other = agent(seed=1).policy
    nn.init.zeros_(other.value_head.weight)
    other.load_value_head(tmp_path / "folder")
    assert th.equal(other.value_head.weight, policy.value_head.weight)


@pytest.mark.parametrize("algorithm", [stable_baselines3.PPO, stable_baselines3.A2C])
def test_algorithms_of_sb3_train_it(algorithm: Any) -> None:
    kwargs = {"batch_size": 12} if algorithm is stable_baselines3.PPO else {}
    model = algorithm(
        GRUPolicy,
        vec_env(num_envs=SLOTS),
        n_steps=STEPS,
        policy_kwargs={"model": {"hidden_size": 16}, "allowed_tokens": FEW},
        device="cpu",
        seed=0,
        **kwargs,
    )
    before = weights(model.policy)
    model.learn(SLOTS * STEPS)
    assert not same(before, weights(model.policy))
