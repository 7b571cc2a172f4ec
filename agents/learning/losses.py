"""Loss terms: one number for each token, to be averaged by an `Objective`.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017). With the arguments that SB3
has, the losses are those of SB3's PPO and A2C, but for the clipped value loss, which is the larger
one of clipped and unclipped, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch as th

from agents.learning.kl import KLEstimator, estimate_kl
from agents.policies.base import Scores
from agents.rollouts.sequences import TokenBatch

# What a ratio is of: a token; all tokens of a sequence, as their mean in logarithms (GSPO, Zheng et
# al. 2025); or their product.
RatioLevel = Literal["token", "sequence", "product"]


def ratios(batch: TokenBatch, new: Scores, level: RatioLevel = "token") -> th.Tensor:
    """Return how many times as likely as in the rollout actions are, (actions,), with gradients.

    Args:
        batch: What the rollout knows of the actions.
        new: What the present policy makes of them.
        level: See `RatioLevel`; all actions of a sequence have its ratio.
    """
    logarithms = new.log_probs - batch.old_log_probs
    if level == "token":
        return logarithms.exp()
    sums = logarithms.new_zeros(len(batch.policy_versions))
    sums = sums.index_add(0, batch.sequence_ids, logarithms)
    if level == "sequence":
        sums = sums / batch.sequence_lengths
    return sums.exp()[batch.sequence_ids]


def _bounds(clip_range: float, clip_range_high: float | None) -> tuple[float, float]:
    """Return the ratios between which nothing is clipped."""
    return 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)


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
        clip_range: How far below 1 the ratio counts.
        clip_range_high: How far above. None: as far.
        ratio_level: What the ratio is of; see `ratios`.
    """

    clip_range: float
    clip_range_high: float | None = None
    ratio_level: RatioLevel = "token"
    name: str = "policy_gradient_loss"
    weight: float = 1.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        ratio = ratios(batch, new, self.ratio_level)
        clipped = ratio.clamp(*_bounds(self.clip_range, self.clip_range_high))
        return -th.min(batch.advantages * ratio, batch.advantages * clipped)


@dataclass(frozen=True)
class CappedPolicyLoss:
    """CISPO's: the policy gradient, each token weighted by its ratio up to a cap.

    No token is left out, however far its ratio is (MiniMax, "MiniMax-M1", 2025).

    Args:
        cap: The largest weight itself.
        ratio_level: What the ratio is of; see `ratios`.
    """

    cap: float
    ratio_level: RatioLevel = "token"
    name: str = "policy_gradient_loss"
    weight: float = 1.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        weights = ratios(batch, new, self.ratio_level).detach().clamp(max=self.cap)
        return -(weights * batch.advantages * new.log_probs)


@dataclass(frozen=True)
class SoftPolicyLoss:
    """A gate instead of a clip: the farther a ratio is from 1, the less its gradient counts.

    Gao et al., "Soft Adaptive Policy Optimization" (2025).

    Args:
        positive: How steep the gate is for advantages above 0.
        negative: How steep it is for the others.
        ratio_level: What the ratio is of; see `ratios`.
    """

    positive: float = 1.0
    negative: float = 1.05
    ratio_level: RatioLevel = "token"
    name: str = "policy_gradient_loss"
    weight: float = 1.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        ratio = ratios(batch, new, self.ratio_level)
        steep = th.where(batch.advantages > 0, self.positive, self.negative)
        gate = th.sigmoid(steep * (ratio - 1)) * 4 / steep
        return -(gate * batch.advantages)


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
        corrected: Whether each token is weighted by its own ratio, whatever the loss of the policy
            weights it by. GRPO as published does not.
    """

    weight: float
    estimator: KLEstimator = "k1"
    corrected: bool = True
    name: str = "kl_loss"
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return the loss of each action."""
        estimate = estimate_kl(new.log_probs, batch.ref_log_probs, self.estimator)
        return ratios(batch, new) * estimate if self.corrected else estimate


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
    """The share of actions whose ratio is farther from 1 than it counts; logged alone.

    Args:
        clip_range: How far below 1 it counts.
        clip_range_high: How far above. None: as far.
        ratio_level: What the ratio is of; see `ratios`.
    """

    clip_range: float
    clip_range_high: float | None = None
    ratio_level: RatioLevel = "token"
    name: str = "clip_fraction"
    weight: float = 0.0
    uses_entropy: ClassVar[bool] = False

    def __call__(self, batch: TokenBatch, new: Scores) -> th.Tensor:
        """Return 1 or 0 for each action."""
        low, high = _bounds(self.clip_range, self.clip_range_high)
        with th.no_grad():
            ratio = ratios(batch, new, self.ratio_level)
        return ((ratio < low) | (ratio > high)).float()


def ratio_errors(batch: TokenBatch, new: Scores) -> th.Tensor:
    """Return how far from 1 each action's ratio is, (actions,), without gradients."""
    return ((new.log_probs.detach() - batch.old_log_probs).exp() - 1).abs()
