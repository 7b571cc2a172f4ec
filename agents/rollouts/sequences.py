"""What a rollout holds of an episode: turns, and where their actions are in the buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch as th

from agents.models.layout import Row, SequenceBatch

Tokens = npt.NDArray[np.int32]


@dataclass
class Segment:
    """A turn, or what the rollout holds of it: context tokens, then actions.

    Args:
        context: The tokens that precede the actions and are no actions of this sequence.
        start: The first step whose action belongs to it.
        begun: How many tokens at the end of the context are of the response already.
        stop: One past the last step.
    """

    context: Tokens
    start: int
    begun: int = 0
    stop: int = -1


@dataclass
class Sequence:
    """Turns of an episode that the model reads as one sequence.

    Args:
        env: The slot.
        episode: The number of the episode in the rollout, over all slots.
        group: The number of the group of episodes that answer one prompt.
        policy_version: Of the policy that made it: the updates that there had been.
        segments: The turns, one after another.
        row: What the model reads; made once, when the sequence is complete.
    """

    env: int
    episode: int = 0
    group: int = 0
    policy_version: int = 0
    segments: list[Segment] = field(default_factory=list)
    row: Row | None = None

    @property
    def num_actions(self) -> int:
        """How many actions it has."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def length(self) -> int:
        """How many tokens it has, the last action included."""
        return self.num_actions + sum(len(segment.context) for segment in self.segments)

    @property
    def steps(self) -> npt.NDArray[np.intp]:
        """The steps of its actions."""
        return np.concatenate([np.arange(s.start, s.stop) for s in self.segments])

    @property
    def turns(self) -> npt.NDArray[np.intp]:
        """The number of each action's turn in the sequence."""
        counts = [segment.stop - segment.start for segment in self.segments]
        return np.repeat(np.arange(len(counts)), counts)


@dataclass(frozen=True)
class TokenBatch:
    """Sequences and their actions, as losses see them; all but three fields are (actions,).

    Args:
        sequences: What the model reads.
        policy_versions: (sequences,) which policy made each; see `Sequence`.
        sequence_lengths: (sequences,) how many actions each has.
        actions: The tokens emitted, sequence by sequence.
        old_log_probs: Their log-probabilities when they were sampled.
        ref_log_probs: The same of the reference model; 0 without one.
        old_values: What the critic said in the rollout; 0 without one.
        advantages: The advantages.
        returns: What the critic should have said.
        sequence_ids: Which row each action is of, from 0 on.
        turn_ids: Which turn of its sequence.
        episode_ids: Which episode of the rollout.
        group_ids: Which group of episodes that answer one prompt.
    """

    sequences: SequenceBatch
    policy_versions: th.Tensor
    sequence_lengths: th.Tensor
    actions: th.Tensor
    old_log_probs: th.Tensor
    ref_log_probs: th.Tensor
    old_values: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    sequence_ids: th.Tensor
    turn_ids: th.Tensor
    episode_ids: th.Tensor
    group_ids: th.Tensor

    def with_advantages(self, advantages: th.Tensor) -> TokenBatch:
        """Return the same with other advantages."""
        return replace(self, advantages=advantages)


def by_episode(sequences: Iterable[Sequence]) -> dict[int, list[Sequence]]:
    """Return the sequences of each episode, by its number."""
    episodes: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        episodes.setdefault(sequence.episode, []).append(sequence)
    return episodes


def by_group(sequences: Iterable[Sequence]) -> Iterable[list[Sequence]]:
    """Return the sequences of each group, in the order of their first ones.

    Of a group of one episode, each sequence by itself.
    """
    groups: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.group, []).append(sequence)
    for members in groups.values():
        if len({sequence.episode for sequence in members}) > 1:
            yield members
        else:
            yield from ([sequence] for sequence in members)


def split_evenly(
    sequences: list[Sequence], batch_size: int | None, groups: int | None = None
) -> list[list[Sequence]]:
    """Split sequences into consecutive groups of about `batch_size` actions.

    Args:
        sequences: What to split.
        batch_size: None: all in one group.
        groups: How many groups, or fewer if there are too few sequences. None: as the batch size
            has it.
    """
    actions = np.array([sequence.num_actions for sequence in sequences])
    if groups is None:
        groups = 1 if batch_size is None else max(1, round(int(actions.sum()) / batch_size))
    middle = np.cumsum(actions) - actions / 2
    group = (middle * groups / actions.sum()).astype(int)
    split = [[s for s, g in zip(sequences, group, strict=True) if g == k] for k in range(groups)]
    return [batch for batch in split if batch]


def split_by_size(sequences: list[Sequence], size: int | None) -> list[list[Sequence]]:
    """Split sequences into parts of at most `size` actions, one sequence at least.

    Sequences of like length come together, so that little is padded; before that, those that
    answer one prompt.

    Args:
        sequences: What to split.
        size: None: all in one part.
    """
    parts: list[list[Sequence]] = []
    actions = 0
    groups = [sorted(group, key=lambda s: s.length) for group in by_group(sequences)]
    groups.sort(key=lambda group: group[-1].length)
    for sequence in chain.from_iterable(groups):
        actions += sequence.num_actions
        if not parts or (size is not None and actions > size):
            parts.append([])
            actions = sequence.num_actions
        parts[-1].append(sequence)
    return parts
