"""Loss terms: one number for each token, to be averaged by an `Objective`.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017). With the arguments that SB3
has, the losses are those of SB3's PPO and A2C, but for the clipped value loss, which is the larger
one of clipped and unclipped, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch as th

from agents.learning.kl import KLEstimator, estimate_kl
from agents.policies.base import Scores
from agents.rollouts.sequences import TokenBatch


class LossTerm(Protocol):
    """A part of what an update minimises.

    Attributes:
        name: Under which it is logged.
        weight: What it is multiplied by. 0: it is logged and nothing else.
        uses_entropy: Whether it wants gradients of the entropies, which take time and memory; a
            term that does not say so gets them.
    """

    @property
    def name(self) -> str:
        """The name."""
        ...

    @property
    def weight(self) -> float:
        """The weight."""
        ...

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return a number for each action, (actions,), not averaged.

        Args:
            batch: What the rollout knows of the actions.
            new: What the present policy makes of them, with gradients.
        """
        ...


@dataclass(frozen=True)
class ClippedPolicyLoss:
    """PPO's: minus the advantage times the ratio, clipped where that would be too good.

    Args:
        clip_range: How far from 1 the ratio counts.
    """

    clip_range: float
    name: str = "policy_gradient_loss"
    weight: float = 1.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        ratio = (new.log_probs - batch.old_log_probs).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -th.min(batch.advantages * ratio, batch.advantages * clipped)


@dataclass(frozen=True)
class PolicyGradientLoss:
    """Minus the advantage times the log-probability (Williams 1992; A2C: Mnih et al. 2016)."""

    name: str = "policy_loss"
    weight: float = 1.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        return -(batch.advantages * new.log_probs)


@dataclass(frozen=True)
class ValueLoss:
    """The squared error of the critic.

    Args:
        weight: `vf_coef`.
        clip_range: How far from the old value the new one counts, or None: as far as it is.
    """

    weight: float
    clip_range: float | None = None
    name: str = "value_loss"
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        assert new.values is not None, "There is no critic."
        loss = (batch.returns - new.values) ** 2
        if self.clip_range is None:
            return loss
        change = (new.values - batch.old_values).clamp(-self.clip_range, self.clip_range)
        return th.max(loss, (batch.returns - batch.old_values - change) ** 2)


@dataclass(frozen=True)
class EntropyLoss:
    """Minus the entropy.

    Args:
        weight: `ent_coef`.
    """

    weight: float
    name: str = "entropy_loss"

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        return -new.entropies


@dataclass(frozen=True)
class KLLoss:
    """The KL to the reference model.

    With the ratio, the mean over tokens of the old policy is that of the new one, and its gradient
    that of KL(policy || reference); the estimator alone has another.

    Args:
        weight: `kl_coef`.
        estimator: See `estimate_kl`.
    """

    weight: float
    estimator: KLEstimator = "k1"
    name: str = "kl_loss"
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        ratio = (new.log_probs - batch.old_log_probs).exp()
        return ratio * estimate_kl(new.log_probs, batch.ref_log_probs, self.estimator)


@dataclass(frozen=True)
class ApproximateKL:
    """Schulman's estimate of the KL between the old policy and the new one; logged alone."""

    name: str = "approx_kl"
    weight: float = 0.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the estimate for each action, without gradients."""
        log_ratio = new.log_probs.detach() - batch.old_log_probs
        return log_ratio.exp() - 1 - log_ratio


@dataclass(frozen=True)
class ClipFraction:
    """The share of actions whose ratio is farther from 1 than it counts; logged alone."""

    clip_range: float
    name: str = "clip_fraction"
    weight: float = 0.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return 1 or 0 for each action."""
        return (ratio_errors(batch, new) > self.clip_range).float()


def ratio_errors(batch: TokenBatch, new: Scores) -> th.Tensor:
    """Return how far from 1 each action's ratio is, (actions,), without gradients."""
    return ((new.log_probs.detach() - batch.old_log_probs).exp() - 1).abs()
