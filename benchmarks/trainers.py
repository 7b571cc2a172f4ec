"""Trainers of one model on one task, set alike: our PPO, SB3's own, TRL's `PPOTrainer`."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal, cast

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecMonitor

from agents import PPO, GymnasiumVecEnv, SequenceRolloutBuffer, TransformerPolicy
from agents.learning.advantages import GAE
from agents.learning.kl import estimate_kl
from agents.rollouts.sequences import split_evenly
from agents.rollouts.vec_env import engine_of
from textenvs.envs.engine import TextEngine
from textenvs.task import Transcript, Turn

ENV_ID = "Translation-v0"
GAMMA, LAMBDA = 1.0, 0.95


@dataclass(frozen=True)
class Settings:
    """What all the trainers share."""

    tokens: int = 65_536
    """Response tokens to train on."""
    warm_start: int = 2
    """How often the demonstrations are imitated first."""
    num_envs: int = 64
    """Episodes side by side; TRL generates as many at a time."""
    n_steps: int = 128
    """Tokens from each of them between updates."""
    epochs: int = 4
    """Passes over each update's tokens."""
    minibatches: int = 8
    """Gradient steps in each pass."""
    learning_rate: float = 3e-4
    """At the start; it falls to 0 linearly."""
    kl_coef: float = 0.01
    """What a nat of KL to the warm-started model costs."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How the KL is estimated."""
    clip_range: float = 0.2
    """Of the ratio."""
    vf_coef: float = 0.5
    """Weight of the squared error of the value."""
    critic: Literal["own", "shared"] = "own"
    """Whether the critic of ours and SB3's has a model of its own, as TRL's, or the actor's."""
    temperature: float = 1.0
    """Of the sampling, in training and in evaluation."""
    eval_examples: int | None = None
    """How many held-out examples to play. Default: all 500."""
    eval_samples: int = 16
    """How many responses to sample for each of them."""

    @property
    def update_tokens(self) -> int:
        """Response tokens to an update."""
        return self.num_envs * self.n_steps

    @property
    def updates(self) -> int:
        """How many updates there are."""
        return math.ceil(self.tokens / self.update_tokens)


@dataclass(frozen=True)
class Trained:
    """What came out of a training.

    Args:
        policy: The trained policy.
        tokens: How many response tokens it saw.
        seconds: How long it took, without making models and environments.
    """

    policy: TransformerPolicy
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Start:
    """What every trainer of a seed starts from.

    Args:
        folder: The warm-started model, as a Hugging Face folder.
        settings: See `Settings`.
        seed: See `Options`.
        response_tokens: The mean length of its responses, EOS included.
    """

    folder: Path
    settings: Settings
    seed: int
    response_tokens: float

    def policy_kwargs(self) -> dict[str, Any]:
        """Return the arguments of a `TransformerPolicy`."""
        return {
            "model": str(self.folder),
            "value_model": "copy" if self.settings.critic == "own" else None,
            "temperature": self.settings.temperature,
        }

    def sb3_kwargs(self) -> dict[str, Any]:
        """Return the arguments that our PPO and SB3's have in common."""
        settings = self.settings
        return {
            "n_steps": settings.n_steps,
            "batch_size": settings.update_tokens // settings.minibatches,
            "n_epochs": settings.epochs,
            "gamma": GAMMA,
            "gae_lambda": LAMBDA,
            "clip_range": settings.clip_range,
            "vf_coef": settings.vf_coef,
            "max_grad_norm": 1.0,
            "policy_kwargs": self.policy_kwargs(),
            "seed": self.seed,
            "device": "cpu",
        }


def train_ours(start: Start) -> Trained:
    """Train with `agents.PPO`, a number of tokens at a time."""
    return _train_ours(start, gym.make_vec(ENV_ID, start.settings.num_envs), whole_episodes=True)


def train_whole(start: Start) -> Trained:
    """Train with `agents.PPO` as TRL does: whole episodes, each prompt once before any again."""
    settings = start.settings
    return _train_ours(
        start,
        gym.make_vec(ENV_ID, settings.num_envs, sampling="epoch"),
        episodes_per_slot=round(settings.n_steps / start.response_tokens),
    )


def _train_ours(start: Start, env: gym.vector.VectorEnv[Any, Any, Any], **kwargs: Any) -> Trained:
    settings = start.settings
    model = PPO(
        "TransformerPolicy",
        env,
        learning_rate=LinearSchedule(settings.learning_rate, 0.0, 1.0),
        kl_coef=settings.kl_coef,
        kl_estimator=settings.kl_estimator,
        # As SB3 and TRL have it.
        fit_critic=False,
        whiten_floor=0.0,
        target_kl=float("inf"),
        warmup_steps=0,
        **{**start.sb3_kwargs(), **kwargs},
    )
    return learn(model, settings)


def train_sb3(start: Start) -> Trained:
    """Train with SB3's own PPO."""
    settings = start.settings

    def learning_rate(remaining: float) -> float:
        # SB3 reckons from where a rollout ended.
        return settings.learning_rate * (remaining + 1 / settings.updates)

    model = stable_baselines3.PPO(
        TransformerPolicy,
        VecMonitor(GymnasiumVecEnv(gym.make_vec(ENV_ID, settings.num_envs))),
        learning_rate=learning_rate,
        rollout_buffer_class=SequenceRolloutBuffer,
        **start.sb3_kwargs(),
    )
    return learn(model, settings, KLPenalty(settings))


def learn(model: Any, settings: Settings, callback: BaseCallback | None = None) -> Trained:
    """Train a model of SB3's kind."""
    started = time.perf_counter()
    model.learn(settings.updates * settings.update_tokens, callback=callback)
    return Trained(model.policy, model.num_timesteps, time.perf_counter() - started)


class KLPenalty(BaseCallback):
    """Takes the KL to the policy as it was at the start off a rollout's rewards."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._settings = settings

    def _on_training_start(self) -> None:
        backbone: Any = self.model.policy.backbone
        backbone.clear_cache()
        self._reference = copy.deepcopy(backbone).requires_grad_(False)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        buffer = model.rollout_buffer
        reference = np.zeros_like(buffer.log_probs)
        for sequences in split_evenly(buffer.sequences, model.batch_size):
            samples = buffer.samples(sequences)
            with th.no_grad():
                log_probs = model.policy.log_probs(
                    self._reference, samples.observations, samples.actions
                )
            reference[buffer.index(sequences)] = log_probs.numpy()
        kl = estimate_kl(
            th.from_numpy(buffer.log_probs),
            th.from_numpy(reference),
            self._settings.kl_estimator,
        )
        buffer.rewards -= self._settings.kl_coef * kl.numpy()
        buffer.advantages, buffer.returns = GAE(buffer.gamma, buffer.gae_lambda)(buffer)


# TRL in float32 on the CPU, without side shows.
TRL_PLAIN: dict[str, Any] = {
    "gradient_accumulation_steps": 1,  # only then are its minibatches gradient steps
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_sample_generations": 0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def import_trl() -> Any:
    """Return TRL's module with `PPOTrainer`."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl.experimental.ppo
    except ImportError as error:
        raise ImportError(
            "The trainer 'trl' needs TRL 1.12, the last one with a PPOTrainer: "
            "pip install 'textenvs[bench]', or leave it out of --trainers."
        ) from error
    return trl.experimental.ppo


class TaskReward(th.nn.Module):
    """A task's own reward, in the shape of TRL's reward models.

    TRL calls the module that `base_model_prefix` names, and then `score` with its last hidden
    state, for a number at each position; it reads the one at the response's last token.

    Args:
        engine: Whose examples the prompts are of, and whose task scores.
    """

    base_model_prefix = "forward"

    def __init__(self, engine: TextEngine) -> None:
        super().__init__()
        self._engine = engine
        prompts = prompt_tokens(engine)
        self._examples = dict(zip(map(tuple, prompts), engine.examples, strict=True))
        if len(self._examples) < len(prompts):
            raise ValueError("Two examples have the same prompt: a response has no one reference.")
        self._lengths = sorted({len(prompt) for prompt in prompts})
        self.tokens = 0

    def forward(
        self, input_ids: th.Tensor, attention_mask: th.Tensor, **kwargs: Any
    ) -> SimpleNamespace:
        """Return as hidden states, at each position of a row, its reward."""
        transcripts = [
            self.transcript(row[mask].tolist())
            for row, mask in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        self.tokens += sum(transcript.response_tokens for transcript in transcripts)
        rewards = th.tensor(self._engine.task.score(transcripts), dtype=th.float32)
        rewards = rewards.to(input_ids.device)[:, None, None]
        return SimpleNamespace(hidden_states=[rewards.expand(*input_ids.shape, 1)])

    @staticmethod
    def score(hidden: th.Tensor) -> th.Tensor:
        """Return the rewards as they are."""
        return hidden

    def transcript(self, tokens: list[int]) -> Transcript:
        """Return the transcript of a prompt and its response, without padding."""
        length = next(n for n in self._lengths if tuple(tokens[:n]) in self._examples)
        example, response = self._examples[tuple(tokens[:length])], tokens[length:]
        stopped = bool(response) and response[-1] == self._engine.eos_token_id
        text = self._engine.codec.decode_response(response)
        turns = (Turn("user", example.prompt), Turn("agent", text))
        return Transcript(example, turns, len(response), stopped)


def prompt_tokens(engine: TextEngine) -> list[list[int]]:
    """Return the prompts of a task's examples as token ids."""
    texts = (str(engine.task.prompt(example)) for example in engine.examples)
    return [ids.tolist() for ids in engine.codec.encode_prompts(texts)]


def train_trl(start: Start) -> Trained:
    """Train with TRL's `PPOTrainer`."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
    )

    ppo, settings = import_trl(), start.settings
    engine = engine_of(gym.make(ENV_ID))
    episodes = settings.minibatches * max(
        1, round(settings.update_tokens / start.response_tokens / settings.minibatches)
    )
    policy_model: Any = AutoModelForCausalLM.from_pretrained(start.folder, dtype=th.float32)
    policy_model.generation_config.pad_token_id = engine.pad_token_id
    value_model: Any = AutoModelForSequenceClassification.from_pretrained(
        start.folder, num_labels=1, dtype=th.float32
    )
    th.nn.init.zeros_(value_model.score.weight)
    reward_model = TaskReward(engine)
    set_random_seed(start.seed)
    with TemporaryDirectory() as folder:
        trainer = ppo.PPOTrainer(
            args=ppo.PPOConfig(
                output_dir=folder,
                total_episodes=settings.updates * episodes,
                per_device_train_batch_size=episodes,
                num_mini_batches=settings.minibatches,
                num_ppo_epochs=settings.epochs,
                local_rollout_forward_batch_size=settings.num_envs,
                response_length=engine.max_new_tokens,
                stop_token="eos",
                temperature=settings.temperature,
                kl_coef=settings.kl_coef,
                kl_estimator=settings.kl_estimator,
                cliprange=settings.clip_range,
                cliprange_value=1e9,  # off
                vf_coef=2 * settings.vf_coef,  # TRL halves the squared error
                gamma=GAMMA,
                lam=LAMBDA,
                whiten_rewards=False,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0,
                adam_epsilon=1e-5,
                weight_decay=0.0,
                seed=start.seed,
                **TRL_PLAIN,
            ),
            processing_class=AutoTokenizer.from_pretrained(start.folder, padding_side="left"),
            model=policy_model,
            ref_model=None,  # a copy of the model
            reward_model=reward_model,
            value_model=value_model,
            train_dataset=Dataset.from_dict({"input_ids": prompt_tokens(engine)}),
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    policy = TransformerPolicy(
        engine.observation_space, engine.action_space, lambda _: 0.0, **start.policy_kwargs()
    )
    cast("Any", policy.backbone).model.load_state_dict(policy_model.state_dict())
    return Trained(policy, reward_model.tokens, seconds)


TRAINERS: dict[str, Callable[[Start], Trained]] = {
    "ours": train_ours,
    "whole": train_whole,
    "sb3": train_sb3,
    "trl": train_trl,
}
