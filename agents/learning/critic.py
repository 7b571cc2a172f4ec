"""What a critic knows before it teaches: its head is fitted to the first rollout's returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch as th

from agents import parallel
from agents.learning.advantages import ReturnToGo
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer

# Into so many parts episodes are split; the values of one come from a fit to the others.
FOLDS = 5
# Of the features' variance; the last one leaves nothing but the mean return.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, float("inf"))


@dataclass(frozen=True)
class Moments:
    """Sums over examples, from which a linear fit follows.

    Args:
        count: How many examples.
        features: (d,) their sum.
        squares: (d, d) the sum of their outer products.
        target: The sum of the targets.
        products: (d,) the sum of features times targets.
    """

    count: float
    features: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]
    target: float
    products: npt.NDArray[np.float64]

    @classmethod
    def of(cls, features: npt.NDArray[np.float32], targets: npt.NDArray[np.float64]) -> Moments:
        """Return those of examples, features (n, d) and targets (n,)."""
        exact = features.astype(np.float64)
        return cls(
            len(exact), exact.sum(0), exact.T @ exact, float(targets.sum()), exact.T @ targets
        )

    def plus(self, other: Moments, sign: int = 1) -> Moments:
        """Return those of the examples of both, or with sign -1 of the rest."""
        return Moments(*(own + sign * vars(other)[name] for name, own in vars(self).items()))

    def fit(self, ridge: float) -> tuple[npt.NDArray[np.float64], float]:
        """Return weight (d,) and bias of the least-squares fit.

        Args:
            ridge: What a squared weight costs, times the variance of its feature.
        """
        mean, target = self.features / self.count, self.target / self.count
        if np.isinf(ridge):
            return np.zeros_like(mean), target
        covariance = self.squares / self.count - np.outer(mean, mean)
        variance = covariance.diagonal().clip(min=1e-12)
        penalised = covariance + np.diag(ridge * variance)
        along = self.products / self.count - mean * target
        weight = np.linalg.lstsq(penalised, along)[0].astype(np.float64)
        return weight, float(target - mean @ weight)


@th.no_grad()
def fit_critic(
    policy: TransformerPolicy, buffer: SequenceRolloutBuffer, gamma: float, size: int | None
) -> bool:
    """Fit a value head to the returns of a rollout's complete episodes, and enter its values.

    By ridge regression on what the head reads; nothing else is changed. The value of an action
    comes from a fit that has not seen its episode: one that had would know its outcome, and make
    the advantages too small. How large the ridge is, these values decide, too. The head gets the
    fit to all episodes.

    Args:
        policy: Whose critic it is.
        buffer: The rollout, its rewards complete.
        gamma: The discount of a step.
        size: How many actions to a forward, about.

    Returns:
        Whether there were enough complete episodes; if not, nothing is changed.
    """
    assert policy.value_head is not None, "There is no critic."
    returns = ReturnToGo(gamma)(buffer)[1]
    unknown = buffer.unfinished_episodes | buffer.truncated_episodes

    parts = buffer.parts(size)
    hidden = np.concatenate(
        [policy.critic_hidden(buffer.collate(part)).float().cpu().numpy() for part in parts]
    )
    sequences = [sequence for part in parts for sequence in part]
    index = buffer.index(sequences)
    episodes = np.repeat([s.episode for s in sequences], [s.num_actions for s in sequences])
    targets = returns[index].astype(np.float64)
    known = ~np.isin(episodes, list(unknown))
    fold = np.where(known, episodes % FOLDS, FOLDS)

    counts = [len(set(episodes[fold == k].tolist())) for k in range(FOLDS)]
    if min(np.sum(parallel.all_gather([counts]), axis=0)) == 0:
        return False
    own = [Moments.of(hidden[fold == k], targets[fold == k]) for k in range(FOLDS)]
    folds = [_sum(parallel.all_gather([moments])) for moments in own]
    every = _sum(folds)

    predicted = np.empty((len(RIDGES), len(hidden)))
    for k in range(FOLDS + 1):
        rest = every if k == FOLDS else every.plus(folds[k], -1)
        for row, ridge in zip(predicted, RIDGES, strict=True):
            weight, bias = rest.fit(ridge)
            row[fold == k] = hidden[fold == k] @ weight + bias
    errors = ((predicted - targets)[:, known] ** 2).sum(1)
    best = int(np.argmin(np.sum(parallel.all_gather([errors]), axis=0)))

    weight, bias = every.fit(RIDGES[best])
    policy.value_head.weight.copy_(th.from_numpy(weight)[None])
    policy.value_head.bias.fill_(bias)
    buffer.values[index] = predicted[best]
    return True


def _sum(moments: list[Moments]) -> Moments:
    total = moments[0]
    for other in moments[1:]:
        total = total.plus(other)
    return total
