"""Supervised fine-tuning, as an algorithm among others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import stable_baselines3
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents import parallel
from agents.algorithms.critic_free import OfWholeEpisodes
from agents.learning.advantages import AdvantageEstimator
from agents.learning.groups import ConstantAdvantage
from agents.learning.losses import LossTerm, PolicyGradientLoss
from agents.learning.reference import score_reference
from agents.models.loading import ModelKind
from agents.policies.sampling import Sampling
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.demonstrations import DemonstrationSource
from agents.rollouts.sources import RolloutSource
from agents.rollouts.vec_env import engine_of


class SFT(OfWholeEpisodes, stable_baselines3.PPO):
    """Supervised fine-tuning on the task's demonstrations: what RL is to be compared with.

    `Task.demonstrate` plays the environments, and what it says is imitated. Time steps are its
    tokens. `agents.warm_start` fits the same data before an algorithm begins; this one has the
    callbacks, logs, checkpoints and budgets of the others. Rewards of the demonstrations are
    logged, and not learned from. The model is fitted at temperature 1, whatever the sampling is.

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers, whose task has demonstrations.
        learning_rate: A number or a function of the remaining progress. 1e-3, linear to 0; 5e-5 for
            a pretrained model.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. 256.
        n_epochs: Passes over each rollout of demonstrations. 1.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        **kwargs: `max_grad_norm`, `micro_batch_size`, `policy_kwargs`, `seed`, `device`, ...

    Raises:
        ValueError: For environments whose slots cannot wait; in training, for demonstrations that
            the policy may not say.
    """

    unused = (
        *("n_steps", "gamma", "gae_lambda", "vf_coef", "clip_range", "clip_range_vf", "ent_coef"),
        *("normalize_advantage", "use_sde", "sde_sample_freq"),
        *("kl_coef", "kl_target", "kl_estimator", "kl_in", "ref_model"),
        *("whiten_rewards", "whiten_floor", "whole_episodes"),
    )
    text_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
        "n_steps": 64,
        "batch_size": 256,
        "n_epochs": 1,
        "gamma": 1.0,
        "max_grad_norm": 1.0,
        "normalize_advantage": False,
    }
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 5e-5, "adapter": 3e-4}

    def rollout_source(self, env: VecEnv, n_steps: int) -> RolloutSource:
        """Return what lets the demonstrations be said."""
        steps = super().rollout_source(env, n_steps)
        seed = (self.seed or 0, self.num_timesteps, parallel.rank())
        return DemonstrationSource(steps, engine_of(env), seed)

    def settle(self, buffer: SequenceRolloutBuffer) -> None:
        """Enter what the policy makes of the demonstrations, for the figures of the update."""
        policy = self._text_policy()
        with self._whole_distribution():
            size = self.micro_batch_size or self.batch_size
            score_reference(policy, policy.backbone, buffer, size)
        buffer.log_probs[:] = buffer.ref_log_probs
        for sequence in buffer.sequences:
            index = buffer.index([sequence])
            if not np.isfinite(buffer.log_probs[index]).all():
                raise ValueError(
                    "A demonstration has tokens that the policy may not say, "
                    f"{buffer.actions[index].tolist()}: let allowed tokens, choices and the "
                    "constraint allow what the task demonstrates."
                )

    def train(self) -> None:
        """Update the policy from the demonstrations, and log how it went."""
        with self._whole_distribution():
            super().train()

    @contextmanager
    def _whole_distribution(self) -> Iterator[None]:
        """Fit what the model says at temperature 1, as a warm start does: nothing is cut off."""
        policy = self._text_policy()
        own, policy.sampling = policy.sampling, Sampling()
        try:
            yield
        finally:
            policy.sampling = own

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what finds all of them as good."""
        return ConstantAdvantage()

    def losses(self) -> list[LossTerm]:
        """Return the likelihood of the demonstrations."""
        return [PolicyGradientLoss("nll_loss")]
