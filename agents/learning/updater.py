"""The update of PPO for sequences of tokens: minibatches of whole sequences, in parts if wanted.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017). With the arguments that SB3 has,
the losses are those of SB3's `PPO.train`, but for the clipped value loss, which is the larger one
of clipped and unclipped, as in the authors' code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch as th
from stable_baselines3.common.utils import explained_variance

from agents import parallel
from agents.learning.kl import KLEstimator, estimate_kl
from agents.models.layout import SequenceBatch
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import Sequence, SequenceRolloutBuffer

if TYPE_CHECKING:
    from agents.algorithms.ppo import PPO


# What a minibatch comes to, in means over its tokens.
FIGURES = (
    "policy_gradient_loss",
    "entropy_loss",
    "value_loss",
    "kl_loss",
    "approx_kl",
    "clip_fraction",
    "loss",
)


@dataclass(frozen=True)
class Objective:
    """What an update minimises.

    Args:
        clip_range: The clipping of the ratio.
        clip_range_vf: The clipping of the value around the old one, or None.
        ent_coef: The weight of the entropy.
        vf_coef: The weight of the squared error of the values.
        normalize_advantage: Whether to whiten the advantages of a minibatch.
        kl_coef: The weight of the KL to the reference. 0: it is in the reward, or nowhere.
        kl_estimator: How that KL is estimated.
    """

    clip_range: float
    clip_range_vf: float | None
    ent_coef: float
    vf_coef: float
    normalize_advantage: bool
    kl_coef: float
    kl_estimator: KLEstimator

    def backward(
        self,
        policy: TransformerPolicy,
        buffer: SequenceRolloutBuffer,
        parts: Sized[list[Sequence]],
    ) -> dict[str, float]:
        """Make a minibatch's gradients the policy's, which had none, and return its figures.

        Every mean is over the tokens of the whole minibatch, so that it makes no difference in how
        many parts it comes, nor on which ranks.
        """
        own = [buffer.advantages[buffer.index(part)] for part in parts]
        advantages = np.concatenate(parallel.all_gather(own))
        mean, std = 0.0, 1.0
        if self.normalize_advantage and len(advantages) > 1:
            whole = th.from_numpy(advantages)
            mean, std = float(whole.mean()), float(whole.std()) + 1e-8
        total = {name: th.zeros((), device=policy.device) for name in FIGURES}
        ratio_errors = [th.zeros((), device=policy.device)]
        for part in parts:
            terms, ratio_error = self._terms(policy, buffer, part, mean, std)
            ratio_errors.append(ratio_error.max())
            terms = {name: term.sum() / len(advantages) for name, term in terms.items()}
            loss = (
                terms["policy_gradient_loss"]
                + self.ent_coef * terms["entropy_loss"]
                + self.vf_coef * terms["value_loss"]
                + self.kl_coef * terms["kl_loss"]
            )
            loss.backward()
            for name, value in {**terms, "loss": loss}.items():
                total[name] += value.detach()
        sums = th.stack(list(total.values()))
        parallel.sum_gradients(policy, sums)
        # One transfer from the device for all of them.
        figures = th.cat([sums, th.stack(ratio_errors).max()[None]]).tolist()
        return dict(zip((*total, "ratio_error"), figures, strict=True))

    def _terms(
        self,
        policy: TransformerPolicy,
        buffer: SequenceRolloutBuffer,
        sequences: list[Sequence],
        mean: float,
        std: float,
    ) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """Return, for each token of some sequences, the losses' terms and how far off 1 it is."""
        samples = buffer.samples(sequences)
        observations = cast("dict[str, th.Tensor]", samples.observations)
        batch = SequenceBatch(
            *(observations[name] for name in ("tokens", "action_positions", "turn_starts"))
        )
        log_prob, entropy, values = policy.score(batch, samples.actions, self.ent_coef != 0)
        assert values is not None
        advantages = (samples.advantages - mean) / std
        log_ratio = log_prob - samples.old_log_prob
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        value_loss = (samples.returns - values) ** 2
        if self.clip_range_vf is not None:
            near = samples.old_values + (values - samples.old_values).clamp(
                -self.clip_range_vf, self.clip_range_vf
            )
            value_loss = th.max(value_loss, (samples.returns - near) ** 2)
        kl_loss = th.zeros_like(log_prob)
        if self.kl_coef:
            reference = buffer.ref_log_probs[buffer.index(sequences)]
            # With the ratio, the mean over tokens of the old policy is that of the new one, and
            # its gradient that of KL(policy || reference); the estimator alone has another.
            kl_loss = ratio * estimate_kl(
                log_prob, th.as_tensor(reference, device=log_prob.device), self.kl_estimator
            )
        ratio_error = (ratio.detach() - 1).abs()
        terms = {
            "policy_gradient_loss": -th.min(advantages * ratio, advantages * clipped_ratio),
            "entropy_loss": -entropy,
            "value_loss": value_loss,
            "kl_loss": kl_loss,
            "approx_kl": (ratio - 1 - log_ratio).detach(),
            "clip_fraction": (ratio_error > self.clip_range).float(),
        }
        return terms, ratio_error


def update(agent: PPO) -> None:
    """Update an agent's policy from its rollout, and log how it went."""
    policy = cast("TransformerPolicy", agent.policy)
    buffer = cast("SequenceRolloutBuffer", agent.rollout_buffer)
    policy.set_training_mode(True)
    agent._update_learning_rate(policy.optimizer)
    objective = _objective(agent)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    log: dict[str, list[float]] = defaultdict(list)
    ratio_errors: list[float] = []
    epoch_kls: list[float] = []
    stopped = False
    for _ in range(agent.n_epochs):
        epoch_kls = []
        for sequences in _minibatches(buffer, agent.batch_size):
            policy.optimizer.zero_grad()
            parts = buffer.micro_batches(sequences, agent.micro_batch_size)
            figures = objective.backward(policy, buffer, parts)
            ratio_errors.append(figures.pop("ratio_error"))
            epoch_kls.append(figures.pop("approx_kl"))
            for name, value in figures.items():
                log[name].append(value)
            stopped = agent.target_kl is not None and epoch_kls[-1] > 1.5 * agent.target_kl
            if stopped:
                break
            norm = th.nn.utils.clip_grad_norm_(trained, agent.max_grad_norm)
            log["grad_norm"].append(float(norm))
            policy.optimizer.step()
        agent._n_updates += 1
        if stopped:
            break
    policy.optimizer.zero_grad()
    for name in ("entropy_loss", "policy_gradient_loss", "value_loss", "clip_fraction"):
        agent.logger.record(f"train/{name}", np.mean(log[name]))
    if objective.kl_coef:
        agent.logger.record("train/kl_loss", np.mean(log["kl_loss"]))
    if log["grad_norm"]:
        agent.logger.record("train/grad_norm", np.mean(log["grad_norm"]))
    agent.logger.record("train/approx_kl", np.mean(epoch_kls))
    agent.logger.record("train/first_ratio_error", max(parallel.all_gather(ratio_errors[:1])))
    agent.logger.record("train/loss", log["loss"][-1])
    every = zip(
        *parallel.all_gather([(buffer.values.flatten(), buffer.returns.flatten())]), strict=True
    )
    explained = explained_variance(*map(np.concatenate, every))
    agent.logger.record("train/explained_variance", explained)
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    agent.logger.record("train/clip_range", objective.clip_range)
    if objective.clip_range_vf is not None:
        agent.logger.record("train/clip_range_vf", objective.clip_range_vf)


def _minibatches(buffer: SequenceRolloutBuffer, batch_size: int) -> list[list[Sequence]]:
    """Return minibatches, as many on each rank, since the ranks make their steps together.

    A rank that has too few sequences for that has nothing in the last ones.
    """
    actions = np.mean(parallel.all_gather([buffer.num_actions()]))
    groups = max(1, round(float(actions) / batch_size))
    minibatches = buffer.minibatches(batch_size, groups)
    most = max(parallel.all_gather([len(minibatches)]))
    return minibatches + [[] for _ in range(most - len(minibatches))]


def _objective(agent: PPO) -> Objective:
    """Return the agent's objective at its present progress."""
    progress = agent._current_progress_remaining
    clip_range_vf = agent.clip_range_vf
    return Objective(
        clip_range=agent.clip_range(progress),  # type: ignore[operator]
        clip_range_vf=None if clip_range_vf is None else clip_range_vf(progress),  # type: ignore[operator]
        ent_coef=agent.ent_coef,
        vf_coef=agent.vf_coef,
        normalize_advantage=agent.normalize_advantage,
        kl_coef=agent.kl_coef if agent.kl_in == "loss" else 0.0,
        kl_estimator=agent.kl_estimator,
    )
