"""Episodes that the end of a rollout has cut, kept as plain data until they go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sequences import Segment, Sequence, by_episode

COLUMNS = ("actions", "episode_starts", "rewards", "values", "log_probs")


class UnfinishedEpisode(TypedDict):
    """What a rollout holds of an episode that has not ended.

    Keys:
        slot: Its environment.
        columns: The buffer's arrays of its steps, (steps,) each.
        sequences: For each of its sequences, for each of its turns: context, first step, how much
            of the response the context holds, one past the last step.
        policy_version: Of the policy that began it.
    """

    slot: int
    columns: dict[str, npt.NDArray[Any]]
    sequences: list[list[tuple[npt.NDArray[np.int32], int, int, int]]]
    policy_version: int


def unfinished_episodes(buffer: SequenceRolloutBuffer) -> list[UnfinishedEpisode]:
    """Return copies of the episodes that the end of a complete rollout has cut."""
    episodes = by_episode(buffer.sequences)
    return [_copy(buffer, episodes[number]) for number in sorted(buffer.unfinished_episodes)]


def _copy(buffer: SequenceRolloutBuffer, sequences: list[Sequence]) -> UnfinishedEpisode:
    slot, first = sequences[0].env, sequences[0].segments[0].start
    steps = slice(first, int(buffer.lengths[slot]))
    return UnfinishedEpisode(
        slot=slot,
        columns={name: getattr(buffer, name)[steps, slot].copy() for name in COLUMNS},
        sequences=[
            [(s.context, s.start - first, s.begun, s.stop - first) for s in sequence.segments]
            for sequence in sequences
        ],
        policy_version=sequences[0].policy_version,
    )


def put_back(buffer: SequenceRolloutBuffer, episodes: Iterable[UnfinishedEpisode]) -> None:
    """Begin an empty buffer with what the rollout before had of unfinished episodes."""
    for episode in episodes:
        sequences = [[Segment(*turn) for turn in turns] for turns in episode["sequences"]]
        buffer.put_in_front(
            episode["slot"], episode["columns"], sequences, episode["policy_version"]
        )
