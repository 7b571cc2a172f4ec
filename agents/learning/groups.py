"""Advantages without a critic: what an episode earned, and others that answer its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from agents import parallel
from agents.learning.advantages import Floats, ReturnToGo
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sequences import by_episode

# Returns that are no farther apart are the same but for rounding.
SAME = 1e-6

Baseline = Literal["group", "leave_one_out", "batch", "greedy", "none"]
Scale = Literal["none", "group", "batch"]


@dataclass(frozen=True)
class Outcome:
    """What came of a response, or of all responses from one turn on.

    Args:
        env: The environment.
        episode: The number of the episode in the rollout.
        steps: The steps whose actions are held responsible.
        group: The number of the group of episodes that answer one prompt.
        turn: The number of the turn; 0 for whole episodes.
        earned: The sum of the rewards from the first of the steps to the end of the episode.
    """

    env: int
    episode: int
    steps: npt.NDArray[np.intp]
    group: int
    turn: int
    earned: float


def outcomes(rollout: SequenceRolloutBuffer, by_turn: bool = False) -> list[Outcome]:
    """Return the outcomes of a rollout's episodes, or of each of their turns."""
    found = []
    for episode, sequences in by_episode(rollout.sequences).items():
        env, group = sequences[0].env, sequences[0].group
        turns = [np.arange(s.start, s.stop) for sequence in sequences for s in sequence.segments]
        rewards = rollout.rewards[:, env].astype(np.float64)
        end = turns[-1][-1] + 1
        parts = turns if by_turn else [np.concatenate(turns)]
        found += [
            Outcome(env, episode, steps, group, turn, float(rewards[steps[0] : end].sum()))
            for turn, steps in enumerate(parts)
        ]
    return found


@dataclass(frozen=True)
class GroupAdvantage:
    """The return of an episode less a baseline, for all of its tokens alike.

    Args:
        baseline: "group": the mean of the episodes that answer the prompt (Shao et al. 2024).
            "leave_one_out": the mean of the others of them (Ahmadian et al. 2024). "batch": the
            mean of the rollout. "greedy": what the most likely response earned (Li et al. 2023).
            "none": 0.
        scale: What differences are divided by: "none"; "group": the standard deviation of the
            episodes that answer the prompt, with n - 1; "batch": that of the rollout.
        epsilon: What is added to the standard deviation.
        by_turn: Whether each turn of a conversation is compared by what was earned from it on with
            the same turn of the others, instead of the whole episode.
        greedy: For the baseline "greedy": by episode, what the most likely response earns.
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    epsilon: float = 1e-4
    by_turn: bool = False
    greedy: Mapping[int, float] | None = None
    needs_values = False

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return advantages, and the returns that they come from."""
        found = outcomes(rollout, self.by_turn)
        earned = np.array([outcome.earned for outcome in found])
        advantages, returns = np.zeros_like(rollout.rewards), np.zeros_like(rollout.rewards)
        for outcome, advantage in zip(found, self._compare(found, earned), strict=True):
            advantages[outcome.steps, outcome.env] = advantage
            returns[outcome.steps, outcome.env] = outcome.earned
        return advantages, returns

    def _compare(self, found: list[Outcome], earned: Floats) -> Floats:
        groups = _numbered([(outcome.group, outcome.turn) for outcome in found])
        every = np.concatenate(parallel.all_gather([earned]))
        counts, sums = np.bincount(groups), np.bincount(groups, earned)
        if self.baseline == "group":
            baseline = (sums / counts)[groups]
        elif self.baseline == "leave_one_out":
            # Nobody else has had this turn: there is nothing to compare with.
            alone = counts[groups] == 1
            others = np.where(alone, 1, counts[groups] - 1)
            baseline = np.where(alone, earned, (sums[groups] - earned) / others)
        elif self.baseline == "batch":
            baseline = np.full(len(earned), every.mean() if len(every) else 0.0)
        elif self.baseline == "none":
            baseline = np.zeros(len(earned))
        else:
            assert self.greedy is not None, "What greedy responses earned is not known."
            baseline = np.array([self.greedy[outcome.episode] for outcome in found])
        difference = earned - baseline
        if self.scale == "none":
            return difference
        if self.scale == "batch":
            deviation = every.std(ddof=1) if len(every) > 1 else 0.0
            return difference / (deviation + self.epsilon)
        squares = np.bincount(groups, (earned - (sums / counts)[groups]) ** 2)
        deviations = np.sqrt(squares / np.maximum(1, counts - 1))
        return difference / (deviations[groups] + self.epsilon)


@dataclass(frozen=True)
class NormalizedReturns:
    """What was earned from a token on, normalised over all tokens of a rollout (Hu et al. 2025).

    Args:
        gamma: The discount of a step.
        baseline: "group": the mean return of the episodes that answer the prompt is taken off
            first; None: nothing is.
        floor: The least standard deviation that is divided by.
    """

    gamma: float
    baseline: Literal["group"] | None = None
    floor: float = 0.0
    needs_values = False

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return the normalised returns, and the returns."""
        returns = ReturnToGo(self.gamma)(rollout)[0]
        advantages = returns.astype(np.float64)
        if self.baseline == "group":
            found = outcomes(rollout)
            groups = _numbered([(outcome.group, 0) for outcome in found])
            means = np.bincount(groups, [o.earned for o in found]) / np.bincount(groups)
            for outcome, group in zip(found, groups, strict=True):
                advantages[outcome.steps, outcome.env] -= means[group]
        own = advantages[rollout.index(rollout.sequences)] if rollout.sequences else np.empty(0)
        every = np.concatenate(parallel.all_gather([own]))
        if len(every) > 1:
            advantages = (advantages - every.mean()) / max(self.floor, every.std() + 1e-8)
        return advantages.astype(np.float32), returns


def best_episodes(
    rollout: SequenceRolloutBuffer, keep_best: int, threshold: float | None
) -> set[int]:
    """Return the numbers of the episodes that earned most.

    Args:
        rollout: Of whole episodes.
        keep_best: Of each group so many at most, which have earned more than its mean. 0: all.
        threshold: What an episode must have earned at least. None: anything.
    """
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes(rollout):
        groups.setdefault(outcome.group, []).append(outcome)
    best: set[int] = set()
    for group in groups.values():
        if keep_best:
            mean = np.mean([outcome.earned for outcome in group])
            ranked = sorted(group, key=lambda outcome: -outcome.earned)
            group = [outcome for outcome in ranked[:keep_best] if outcome.earned > mean + SAME]
        best |= {o.episode for o in group if threshold is None or o.earned >= threshold}
    return best


@dataclass(frozen=True)
class ConstantAdvantage:
    """An advantage of 1 for every token: what is imitated was chosen before."""

    needs_values = False

    def __call__(self, rollout: SequenceRolloutBuffer) -> tuple[Floats, Floats]:
        """Return ones, and what was earned from each token on."""
        return np.ones_like(rollout.rewards), ReturnToGo(1.0)(rollout)[1]


def _numbered(keys: list[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """Return a number from 0 on for each key, the same for the same."""
    numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.intp)


def groups_with_signal(rollout: SequenceRolloutBuffer) -> npt.NDArray[np.bool_]:
    """Return which groups of a rollout of whole episodes have not all earned the same as a whole.

    Args:
        rollout: Each environment has had as many episodes; it may have to be finished yet.

    Returns:
        (episodes per environment, groups)
    """
    returns = [
        np.add.reduceat(
            rollout.rewards[:length, env], np.flatnonzero(rollout.episode_starts[:length, env])
        )
        for env, length in enumerate(rollout.lengths)
    ]
    earned = np.stack(returns, axis=1)
    by_group = earned.reshape(len(earned), -1, rollout.group_size)
    spread: npt.NDArray[np.bool_] = np.ptp(by_group, axis=2) > SAME
    return spread


def group_numbers(rollout: SequenceRolloutBuffer) -> npt.NDArray[np.intp]:
    """Return the numbers of the groups in the order of `groups_with_signal`, flat."""
    size = rollout.group_size
    groups = rollout.n_envs // size
    before = np.zeros(rollout.n_envs) if rollout.first_episodes is None else rollout.first_episodes
    episodes = int(rollout.episode_starts[: rollout.lengths[0], 0].sum())
    counts = before[::size] + np.arange(episodes)[:, None]
    return (counts * groups + np.arange(groups)).astype(np.intp).flatten()
