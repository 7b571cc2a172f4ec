"""Sequences in the making: turns are put together as a rollout goes on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents.models.layout import SequenceLayout, Turn
from agents.rollouts.sequences import Segment, Sequence, Tokens


class SequenceRecorder:
    """Makes sequences of the turns of each environment, as a model's layout has it.

    Args:
        layout: Whether a turn goes on with a sequence, and what the model reads.
        n_envs: The number of environments.
        group_size: So many neighbouring environments answer the same prompts.
        first: (n_envs,) how many episodes each has had before. None: as many.

    Raises:
        ValueError: If the environments make no whole groups.

    Attributes:
        sequences: Those that are complete.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        n_envs: int,
        group_size: int,
        first: npt.NDArray[np.intp] | None = None,
    ) -> None:
        if n_envs % group_size:
            raise ValueError(f"{n_envs} environments make no whole groups of {group_size}.")
        self.sequences: list[Sequence] = []
        self._layout, self._n_envs, self._group_size = layout, n_envs, group_size
        self._open: list[Sequence | None] = [None] * n_envs
        self._episodes = np.zeros(n_envs, dtype=np.intp)
        self._first = np.zeros(n_envs, dtype=np.intp) if first is None else first

    def begin(
        self,
        env: int,
        actions: Tokens,
        context: Tokens,
        *,
        begun: int,
        episode_start: bool,
        policy_version: int,
    ) -> None:
        """Begin a turn: in the running sequence if it goes on from there, else in a new one.

        Args:
            env: The environment.
            actions: All that it has done so far.
            context: What the turn's first action is chosen from.
            begun: How many tokens at the end of the context are of the response already.
            episode_start: Whether the turn is the first one of its episode.
            policy_version: See `Sequence`.
        """
        start = len(actions)
        sequence = self._open[env]
        if sequence is not None:
            sequence.segments[-1].stop = start
            if not episode_start and self._layout.continues(_turns(sequence, actions), context):
                sequence.segments.append(Segment(context[sequence.length :], start, begun))
                return
            self.close(env, actions)
        if episode_start or start == 0:
            self._episodes[env] += 1
        number = int(self._episodes[env]) - 1
        self._open[env] = Sequence(
            env,
            episode=number * self._n_envs + env,
            group=self._group(env, number),
            policy_version=policy_version,
            segments=[Segment(context, start, begun)],
        )

    def reopen(
        self, env: int, sequences: list[list[Segment]], actions: Tokens, policy_version: int
    ) -> None:
        """Take in what an environment had done of its episode before the rollout.

        Args:
            env: The environment, which has done nothing else.
            sequences: The turns of each of the episode's sequences; the last one goes on.
            actions: All of the episode's so far.
            policy_version: See `Sequence`.
        """
        self._episodes[env] = 1
        for segments in sequences:
            self.close(env, actions[: segments[0].start])
            self._open[env] = Sequence(env, env, self._group(env, 0), policy_version, segments)

    def _group(self, env: int, number: int) -> int:
        """Return the number of the group that an environment's episode of the rollout is of."""
        groups = self._n_envs // self._group_size
        return int(self._first[env] + number) * groups + env // self._group_size

    def close(self, env: int, actions: npt.NDArray[np.int32]) -> None:
        """Complete an environment's running sequence, if there is one."""
        sequence = self._open[env]
        if sequence is not None:
            sequence.segments[-1].stop = len(actions)
            sequence.row = self._layout.row(_turns(sequence, actions))
            self.sequences.append(sequence)
            self._open[env] = None


def _turns(sequence: Sequence, actions: Tokens) -> list[Turn]:
    return [Turn(s.context, actions[s.start : s.stop], s.begun) for s in sequence.segments]
