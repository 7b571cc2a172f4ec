"""A rollout buffer that stores tokens once and yields whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from agents import parallel

Tokens = npt.NDArray[np.int32]


@dataclass
class Segment:
    """Context tokens, then actions: part of a sequence.

    Args:
        context: The tokens that precede the actions and are no actions of this rollout.
        start: The first step whose action belongs to it.
        stop: One past the last step.
        begun: How many tokens at the end of the context are of the response already.
    """

    context: Tokens
    start: int
    stop: int = -1
    begun: int = 0


@dataclass
class Sequence:
    """One environment's episode, or what the rollout holds of it: segments one after another."""

    env: int
    segments: list[Segment] = field(default_factory=list)
    length: int = 0


class SequenceRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer for text: an episode is a sequence, evaluated in one forward.

    Each prompt is stored once, each step as one token; the turns of a dialogue join into one
    sequence as long as each prompt starts with what came before. Samples hold whole sequences and
    only their actions, flat and unpadded, so SB3's losses need no mask.

    Args:
        buffer_size: Steps for each environment.
        observation_space: That of a text environment.
        action_space: A `Discrete`.
        device: Where samples go.
        gae_lambda: The lambda of generalised advantage estimation.
        gamma: The discount.
        n_envs: The number of environments.

    Attributes:
        settle: Completes the rewards when all steps are in, before anything is computed from them.
            None: they are complete.
    """

    observation_space: spaces.Dict
    ref_log_probs: npt.NDArray[np.float32]
    settle: Callable[[], None] | None = None

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        device: th.device | str = "auto",
        gae_lambda: float = 1,
        gamma: float = 0.99,
        n_envs: int = 1,
    ) -> None:
        super().__init__(
            buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs
        )

    def reset(self) -> None:
        """Empty the buffer."""
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.zeros(shape, dtype=np.int32)
        self.episode_starts = np.zeros(shape, dtype=np.bool_)
        for name in ("rewards", "returns", "values", "log_probs", "advantages", "ref_log_probs"):
            setattr(self, name, np.zeros(shape, dtype=np.float32))
        self.sequences: list[Sequence] = []
        self._open: list[Sequence | None] = [None] * self.n_envs
        self._next_lengths = np.zeros(self.n_envs, dtype=np.int64)
        self.last_values: th.Tensor | None = None
        self.last_dones: npt.NDArray[np.bool_] | None = None
        self.pos = 0
        self.full = False

    def add(  # type: ignore[override]
        self,
        obs: dict[str, npt.NDArray[np.int64]],
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        episode_start: npt.NDArray[Any],
        value: th.Tensor,
        log_prob: th.Tensor,
    ) -> None:
        """Add a step of every environment; see `RolloutBuffer.add`."""
        starts = np.asarray(episode_start, dtype=np.bool_)
        lengths = np.asarray(obs["response_length"]).reshape(-1)
        # A length that does not follow is that of an environment that somebody else has stepped.
        begins = starts | (lengths == 0) | (lengths != self._next_lengths)
        if self.pos == 0:
            begins[:] = True
        self._next_lengths = lengths + 1
        for env in np.flatnonzero(begins):
            self._begin_segment(int(env), obs, bool(starts[env]))
        self.actions[self.pos] = np.asarray(action).reshape(-1)
        self.rewards[self.pos] = reward
        self.episode_starts[self.pos] = starts
        self.values[self.pos] = value.detach().cpu().numpy().reshape(-1)
        self.log_probs[self.pos] = log_prob.detach().cpu().numpy().reshape(-1)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def compute_returns_and_advantage(
        self, last_values: th.Tensor, dones: npt.NDArray[np.bool_]
    ) -> None:
        """Compute the advantages as SB3 does; the arguments are kept for a second time."""
        if not (np.isfinite(self.log_probs).all() and np.isfinite(self.values).all()):
            raise ValueError(
                "The policy's log-probabilities or values are no longer finite: training has "
                "diverged. Lower learning_rate, or raise kl_coef."
            )
        if self.settle is not None:
            self.settle()
        self.last_values, self.last_dones = last_values, dones
        for env in range(self.n_envs):
            self._close(env)
        super().compute_returns_and_advantage(last_values, dones)

    def recompute_returns_and_advantage(self) -> None:
        """Compute the advantages again, after the rewards have been changed."""
        if self.last_values is None or self.last_dones is None:
            raise RuntimeError("compute_returns_and_advantage has not been called yet.")
        super().compute_returns_and_advantage(self.last_values, self.last_dones)

    def drop_unfinished(self) -> None:
        """Leave out the sequences of episodes that the end of the rollout has cut.

        Raises:
            ValueError: If none is left on any rank.
        """
        assert self.full and self.last_dones is not None, "The rollout is not complete."
        finished = [
            sequence
            for sequence in self.sequences
            if sequence.segments[-1].stop < self.buffer_size or self.last_dones[sequence.env]
        ]
        if not any(parallel.all_gather([len(finished)])):
            raise ValueError(
                f"No episode ended within the rollout's {self.buffer_size} steps, so "
                "whole_episodes=True leaves nothing to learn from: raise n_steps."
            )
        self.sequences = finished

    def get(self, batch_size: int | None = None) -> Generator[RolloutBufferSamples, None, None]:
        """Yield minibatches of whole sequences in random order.

        Args:
            batch_size: About how many actions to a minibatch. As sequences stay whole, the
                minibatches are as even as their lengths allow. None: all at once.
        """
        yield from map(self.samples, self.minibatches(batch_size))

    def minibatches(
        self, batch_size: int | None, groups: int | None = None
    ) -> list[list[Sequence]]:
        """Split the sequences, in random order, into groups; see `batches`."""
        order = np.random.permutation(len(self.sequences))
        return self.batches(batch_size, [self.sequences[i] for i in order], groups)

    def batches(
        self,
        batch_size: int | None,
        sequences: list[Sequence] | None = None,
        groups: int | None = None,
    ) -> list[list[Sequence]]:
        """Split sequences (None: all) into consecutive groups of about `batch_size` actions.

        With `groups` it is so many groups, or fewer if there are too few sequences.
        """
        assert self.full, "The buffer is not full yet."
        if sequences is None:
            sequences = self.sequences
        actions = np.array([self._count(sequence) for sequence in sequences])
        if groups is None:
            groups = 1 if batch_size is None else max(1, round(int(actions.sum()) / batch_size))
        middle = np.cumsum(actions) - actions / 2
        group = (middle * groups / actions.sum()).astype(int)
        split = [
            [s for s, g in zip(sequences, group, strict=True) if g == k] for k in range(groups)
        ]
        return [batch for batch in split if batch]

    def micro_batches(self, sequences: list[Sequence], size: int | None) -> list[list[Sequence]]:
        """Split a minibatch into parts of at most `size` actions, one sequence at least.

        Sequences of like length come together, so that little is padded.

        Args:
            sequences: The minibatch.
            size: None: all in one part.
        """
        parts: list[list[Sequence]] = []
        actions = 0
        for sequence in sorted(sequences, key=lambda s: s.length):
            actions += self._count(sequence)
            if not parts or (size is not None and actions > size):
                parts.append([])
                actions = self._count(sequence)
            parts[-1].append(sequence)
        return parts

    def samples(self, sequences: list[Sequence]) -> RolloutBufferSamples:
        """Return sequences as SB3's samples.

        `observations` holds `tokens` (sequences, width), right-padded, and of that shape the
        boolean `action_positions` and `turn_starts`: where the hidden state is that an action, and
        that the first token of a response, was chosen from. Everything else is flat, one entry for
        each action, sequence by sequence.
        """
        # The last action of a sequence is only predicted, never read.
        width = max(sequence.length for sequence in sequences) - 1
        tokens = np.full((len(sequences), width), self._padding(), dtype=np.int64)
        positions, starts = np.zeros((2, len(sequences), width), dtype=np.bool_)
        for row, sequence in enumerate(sequences):
            at = 0
            for segment in sequence.segments:
                actions = self.actions[segment.start : segment.stop, sequence.env]
                piece = np.concatenate([segment.context, actions])[: width - at]
                tokens[row, at : at + len(piece)] = piece
                at += len(segment.context)
                positions[row, at - 1 : at - 1 + len(actions)] = True
                starts[row, at - 1 - segment.begun] = True
                at += len(actions)
        steps, envs = self.index(sequences)
        flat = (self.values, self.log_probs, self.advantages, self.returns)
        return RolloutBufferSamples(
            cast(
                "Any",
                {
                    "tokens": self._tensor(tokens),
                    "action_positions": self._tensor(positions),
                    "turn_starts": self._tensor(starts),
                },
            ),
            self._tensor(self.actions[steps, envs].astype(np.int64)),
            *(self._tensor(array[steps, envs]) for array in flat),
        )

    def index(self, sequences: list[Sequence]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the steps and environments of the sequences' actions, in the samples' order."""
        pieces = [(segment, s.env) for s in sequences for segment in s.segments]
        steps = [np.arange(segment.start, segment.stop) for segment, _ in pieces]
        envs = [np.full(segment.stop - segment.start, env) for segment, env in pieces]
        return np.concatenate(steps), np.concatenate(envs)

    def nbytes(self) -> int:
        """Return the memory that the stored rollout takes, in bytes."""
        arrays = (
            self.actions,
            self.episode_starts,
            self.rewards,
            self.returns,
            self.values,
            self.log_probs,
            self.advantages,
            self.ref_log_probs,
        )
        contexts = (segment.context for s in self.sequences for segment in s.segments)
        return sum(array.nbytes for array in arrays) + sum(c.nbytes for c in contexts)

    def _begin_segment(
        self, env: int, obs: dict[str, npt.NDArray[np.int64]], episode_start: bool
    ) -> None:
        """Start a turn: in the running sequence if it goes on from there, else in a new one."""
        context = np.concatenate(
            [obs[key][env, : int(obs[f"{key}_length"][env, 0])] for key in ("prompt", "response")]
        ).astype(np.int32)
        begun = int(obs["response_length"][env, 0])
        sequence = self._open[env]
        if sequence is not None:
            sequence.segments[-1].stop = self.pos
            before = self._tokens(sequence)
            sequence.length = len(before)
            if (
                not episode_start
                and len(context) > len(before)
                and np.array_equal(context[: len(before)], before)
            ):
                sequence.segments.append(Segment(context[len(before) :], self.pos, begun=begun))
                return
            self._close(env)
        self._open[env] = Sequence(env, [Segment(context, self.pos, begun=begun)])

    def _close(self, env: int) -> None:
        sequence = self._open[env]
        if sequence is not None:
            sequence.segments[-1].stop = self.pos
            sequence.length = len(self._tokens(sequence))
            self.sequences.append(sequence)
            self._open[env] = None

    def _tokens(self, sequence: Sequence) -> Tokens:
        pieces = [
            piece
            for segment in sequence.segments
            for piece in (segment.context, self.actions[segment.start : segment.stop, sequence.env])
        ]
        return np.concatenate(pieces)

    def num_actions(self) -> int:
        """Return how many actions the sequences have together."""
        return sum(map(self._count, self.sequences))

    @staticmethod
    def _count(sequence: Sequence) -> int:
        return sum(segment.stop - segment.start for segment in sequence.segments)

    def _padding(self) -> int:
        return int(getattr(self.action_space, "pad_token_id", 0))

    def _tensor(self, array: npt.NDArray[Any]) -> th.Tensor:
        return th.as_tensor(array, device=self.device)
