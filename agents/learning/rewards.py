"""What happens to a rollout before its advantages: late values, bootstrap, whitening."""

from __future__ import annotations

import numpy as np
import torch as th

from agents import parallel
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer


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


def whiten_rewards(buffer: SequenceRolloutBuffer) -> None:
    """Give the rewards a standard deviation of 1, and leave them their mean."""
    real = buffer.real
    rewards = np.concatenate(parallel.all_gather([buffer.rewards[real]]))
    mean, std = rewards.mean(dtype=np.float64), rewards.std(dtype=np.float64)
    whitened = (buffer.rewards - mean) / (std + 1e-8) + mean
    buffer.rewards = np.where(real, whitened, 0).astype(np.float32)
