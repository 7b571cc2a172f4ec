"""What happens to a rollout before its advantages: KL, late values, bootstrap, whitening."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch as th

from agents import parallel
from agents.learning.kl import KLEstimator, estimate_kl
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import Observation, SequenceRolloutBuffer
from agents.rollouts.collector import rows_of


@th.no_grad()
def fill_values(policy: TransformerPolicy, buffer: SequenceRolloutBuffer, size: int | None) -> None:
    """Enter the values of a critic that was not asked step by step: one forward a sequence.

    Args:
        policy: Whose critic it is.
        buffer: The complete rollout.
        size: How many actions at a time, about.

    Raises:
        ValueError: If they are not finite.
    """
    for sequences in buffer.parts(size):
        values = policy.values(buffer.collate(sequences))
        buffer.values[buffer.index(sequences)] = values.cpu().numpy()
    buffer.check_finite()


@th.no_grad()
def fill_last_values(
    policy: TransformerPolicy, buffer: SequenceRolloutBuffer, observation: Observation
) -> None:
    """Enter the values of what the episodes go on with that the end of the rollout has cut.

    Args:
        policy: Whose critic has changed since the rollout.
        buffer: The complete rollout.
        observation: Of all slots, behind their last steps.
    """
    cut = np.flatnonzero(~buffer.last_dones)
    if len(cut):
        values = policy.observation_values(rows_of(observation, cut))
        buffer.last_values[cut] = values.cpu().numpy()


@th.no_grad()
def bootstrap_truncations(
    policy: TransformerPolicy, buffer: SequenceRolloutBuffer, gamma: float
) -> None:
    """Add the discounted value of their last observation to episodes that were truncated."""
    if not buffer.truncations or not policy.critic:
        return
    last = [truncation.observation for truncation in buffer.truncations]
    batch = {key: np.stack([observation[key] for observation in last]) for key in last[0]}
    values = policy.observation_values(batch).cpu().numpy()
    steps = [truncation.step for truncation in buffer.truncations]
    slots = [truncation.slot for truncation in buffer.truncations]
    buffer.rewards[steps, slots] += gamma * values


def penalize_kl(
    buffer: SequenceRolloutBuffer, kl_coef: float, estimator: KLEstimator
) -> npt.NDArray[np.float32]:
    """Take each token's KL to the reference off its reward.

    Args:
        buffer: The complete rollout, scored by the reference.
        kl_coef: What a nat costs.
        estimator: See `estimate_kl`.

    Returns:
        The KL of each token, as the buffer's arrays are.
    """
    log_probs, reference = map(th.from_numpy, (buffer.log_probs, buffer.ref_log_probs))
    kl: npt.NDArray[np.float32] = estimate_kl(log_probs, reference, estimator).numpy()
    if kl_coef:
        buffer.rewards -= kl_coef * kl
    return kl


def penalize_overlong(buffer: SequenceRolloutBuffer, budget: int, margin: int) -> None:
    """Take off the rewards of responses that come near to their budget, or use it up.

    Nothing up to a margin before the budget, 1 at the budget, and a straight line between them (Yu
    et al., "DAPO", 2025).

    Args:
        buffer: The complete rollout.
        budget: The tokens that a response may have.
        margin: How many tokens before its end the penalty begins.
    """
    for sequence in buffer.sequences:
        for turn in sequence.segments:
            length = turn.begun + turn.stop - turn.start
            over = min(1.0, max(0.0, (length - (budget - margin)) / margin))
            buffer.rewards[turn.stop - 1, sequence.env] -= over


def whiten_rewards(buffer: SequenceRolloutBuffer, floor: float = 0.0) -> None:
    """Give the rewards a standard deviation of 1, and leave them their mean.

    Args:
        buffer: The complete rollout; changed in place.
        floor: The least standard deviation that they are divided by.
    """
    real = buffer.real
    rewards = np.concatenate(parallel.all_gather([buffer.rewards[real]]))
    mean, std = rewards.mean(dtype=np.float64), rewards.std(dtype=np.float64)
    whitened = (buffer.rewards - mean) / max(floor, std + 1e-8) + mean
    buffer.rewards = np.where(real, whitened, 0).astype(np.float32)
