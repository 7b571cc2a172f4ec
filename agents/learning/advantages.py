"""Advantage estimators: from a rollout's rewards and values to advantages and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agents.rollouts.buffer import SequenceRolloutBuffer

Floats = npt.NDArray[Any]


class AdvantageEstimator(Protocol):
    """Says how good actions were.

    Attributes:
        needs_values: Whether it reads a critic's values.
    """

    needs_values: bool

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return advantages and returns, (steps, environments) each, of a complete rollout."""
        ...


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation (Schulman et al. 2016), by the arithmetic of SB3.

    Args:
        gamma: The discount of a step.
        gae_lambda: How far advantages look before they trust the critic: 0 one step, 1 to the end.
    """

    gamma: float
    gae_lambda: float
    needs_values = True

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return advantages, and returns: advantages plus values."""
        values = rollout.values
        advantages = np.zeros_like(values)
        after_the_end = 1.0 - rollout.last_dones.astype(np.float32)
        next_values, goes_on = rollout.last_values, after_the_end
        advantage: Any = 0
        ragged = bool((rollout.lengths < len(values)).any())
        for step in reversed(range(len(values))):
            delta = rollout.rewards[step] + self.gamma * next_values * goes_on - values[step]
            advantage = delta + self.gamma * self.gae_lambda * goes_on * advantage
            next_values, goes_on = values[step], 1.0 - rollout.episode_starts[step]
            if ragged:  # where an environment has no such step yet, nothing follows
                idle = step >= rollout.lengths
                advantage = np.where(idle, 0, advantage)
                next_values = np.where(idle, rollout.last_values, next_values)
                goes_on = np.where(idle, after_the_end, goes_on)
            advantages[step] = advantage
        return advantages, advantages + values


@dataclass(frozen=True)
class ReturnToGo:
    """What was earned from a step on, without a critic (Williams 1992).

    What follows the end of a rollout is unknown and counts as nothing: collect whole episodes.

    Args:
        gamma: The discount of a step.
    """

    gamma: float
    needs_values = False

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return the discounted sum of the rewards to come, twice."""
        returns = np.zeros_like(rollout.rewards)
        to_come = np.zeros(rollout.n_envs)
        for step in reversed(range(len(returns))):
            to_come = rollout.rewards[step] + self.gamma * to_come
            returns[step] = to_come
            to_come = np.where(rollout.episode_starts[step], 0.0, to_come)
        return returns, returns.copy()
