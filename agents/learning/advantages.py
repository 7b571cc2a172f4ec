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
        gae_lambda_vf: The same for the returns that the critic learns. None: as the advantages.
        gae_length_alpha: Let the lambda of advantages grow with the length l of the episode, as
            far as the rollout has it: 1 - 1 / (alpha l), at least 0 (Yuan et al., "VAPO", 2025,
            with alpha 0.05). None: `gae_lambda` for all.
    """

    gamma: float
    gae_lambda: float
    gae_lambda_vf: float | None = None
    gae_length_alpha: float | None = None
    needs_values = True

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return advantages, and returns: the critic's advantages plus values."""
        own: Any = self.gae_lambda
        if self.gae_length_alpha is not None:
            lengths = episode_lengths(rollout)
            own = (1 - 1 / (self.gae_length_alpha * lengths)).clip(min=0).astype(np.float32)
        advantages = critics = self._advantages(rollout, own)
        if self.gae_lambda_vf is not None or self.gae_length_alpha is not None:
            of_critic = self.gae_lambda if self.gae_lambda_vf is None else self.gae_lambda_vf
            critics = self._advantages(rollout, of_critic)
        return advantages, critics + rollout.values

    def _advantages(self, rollout: SequenceRolloutBuffer, gae_lambda: Any) -> Floats:
        """Return advantages, with one lambda or one for each step, (steps, environments)."""
        values = rollout.values
        advantages = np.zeros_like(values)
        after_the_end = 1.0 - rollout.last_dones.astype(np.float32)
        next_values, goes_on = rollout.last_values, after_the_end
        advantage: Any = 0
        ragged = bool((rollout.lengths < len(values)).any())
        for step in reversed(range(len(values))):
            delta = rollout.rewards[step] + self.gamma * next_values * goes_on - values[step]
            at_step = gae_lambda if isinstance(gae_lambda, float) else gae_lambda[step]
            advantage = delta + self.gamma * at_step * goes_on * advantage
            next_values, goes_on = values[step], 1.0 - rollout.episode_starts[step]
            if ragged:  # where an environment has no such step yet, nothing follows
                idle = step >= rollout.lengths
                advantage = np.where(idle, 0, advantage)
                next_values = np.where(idle, rollout.last_values, next_values)
                goes_on = np.where(idle, after_the_end, goes_on)
            advantages[step] = advantage
        return advantages


def episode_lengths(rollout: SequenceRolloutBuffer) -> npt.NDArray[np.int64]:
    """Return for each step how many steps of its episode the rollout has, (steps, environments)."""
    lengths = np.ones(rollout.episode_starts.shape, dtype=np.int64)
    for slot, length in enumerate(rollout.lengths):
        starts = np.flatnonzero(rollout.episode_starts[:length, slot])
        bounds = np.unique([0, *starts, length])
        lengths[:length, slot] = np.repeat(np.diff(bounds), np.diff(bounds))
    return lengths


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
        returns = returns_to_go(rollout, rollout.rewards, self.gamma)
        return returns, returns.copy()


def returns_to_go(rollout: SequenceRolloutBuffer, numbers: Floats, gamma: float) -> Floats:
    """Return for each step the discounted sum of numbers from there to the end of the episode.

    Args:
        rollout: Where episodes begin.
        numbers: (steps, environments), 0 where there is no step.
        gamma: The discount of a step.
    """
    sums = np.zeros_like(numbers)
    to_come = np.zeros(rollout.n_envs)
    for step in reversed(range(len(sums))):
        to_come = numbers[step] + gamma * to_come
        sums[step] = to_come
        to_come = np.where(rollout.episode_starts[step], 0.0, to_come)
    return sums
