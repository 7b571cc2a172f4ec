"""A rollout buffer that stores tokens once and yields whole sequences."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples

from agents.models.layout import CausalLayout, SequenceBatch, SequenceLayout
from agents.rollouts.recorder import SequenceRecorder
from agents.rollouts.sequences import (
    Segment,
    Sequence,
    TokenBatch,
    by_group,
    split_by_size,
    split_evenly,
)

Observation = dict[str, npt.NDArray[np.int64]]
FLOATS = ("rewards", "returns", "values", "log_probs", "advantages", "ref_log_probs")


class Diverged(ValueError):
    """A training whose numbers are no longer finite."""


@dataclass(frozen=True)
class Truncation:
    """An episode that was truncated: it would have gone on after this step.

    Args:
        step: The step that was its last.
        slot: Its environment.
        observation: What the agent would have seen next.
    """

    step: int
    slot: int
    observation: Observation


class SequenceRolloutBuffer(RolloutBuffer):
    """SB3's rollout buffer for text: an episode is a sequence, evaluated in one forward.

    Each prompt is stored once, each step as one token; the turns of a dialogue join into one
    sequence as the model's layout has it. Samples hold whole sequences and only their actions,
    flat and unpadded, so SB3's losses need no mask.

    Args:
        buffer_size: Steps for each environment; where episodes are collected whole, the buffer
            grows as they need it.
        observation_space: That of a text environment.
        action_space: A `Discrete`.
        device: Where samples go.
        gae_lambda: The lambda of generalised advantage estimation.
        gamma: The discount.
        n_envs: The number of environments.

    Attributes:
        lengths: (n_envs,) how many steps each environment has.
        truncations: The episodes that were truncated.
        cut_turns: Environment and last step of the turns that their budget ended.
        examples: By environment and first step, the index of the example of each episode that
            began, as far as the environment tells.
        last_values: (n_envs,) values of what followed the last steps.
        last_dones: (n_envs,) whether they ended their episodes.
        layout: How tokens become sequences; that of the policy's model.
        group_size: So many neighbouring environments answer the same prompts.
        first_episodes: (n_envs,) how many episodes each environment has had before the rollout.
            None: as many.
        policy_version: Of the policy whose rollout it is.
    """

    observation_space: spaces.Dict
    ref_log_probs: npt.NDArray[np.float32]
    last_values: npt.NDArray[np.float32]
    last_dones: npt.NDArray[np.bool_]
    layout: SequenceLayout = CausalLayout()
    group_size = 1
    first_episodes: npt.NDArray[np.intp] | None = None
    policy_version = 0

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
        for name in FLOATS:
            setattr(self, name, np.zeros(shape, dtype=np.float32))
        self._recorder = SequenceRecorder(
            self.layout, self.n_envs, self.group_size, self.first_episodes
        )
        self.truncations: list[Truncation] = []
        self.cut_turns: set[tuple[int, int]] = set()
        self.examples: dict[tuple[int, int], int] = {}
        self.lengths = np.zeros(self.n_envs, dtype=np.intp)
        self._next_lengths = np.zeros(self.n_envs, dtype=np.int64)
        self.pos = 0
        self.full = False

    def put_in_front(
        self,
        slot: int,
        columns: Mapping[str, npt.NDArray[Any]],
        sequences: list[list[Segment]],
        policy_version: int,
    ) -> None:
        """Begin an environment's steps with those of an episode that goes on.

        Args:
            slot: The environment, which has no steps yet.
            columns: (steps,) each, what goes into the arrays of these names.
            sequences: The turns of each of the episode's sequences.
            policy_version: Of the policy that began it.
        """
        steps = len(columns["actions"])
        while steps > len(self.actions):
            self._grow()
        for name, column in columns.items():
            getattr(self, name)[:steps, slot] = column
        self.lengths[slot] = steps
        self.pos = int(self.lengths.max())
        self._recorder.reopen(slot, sequences, self._actions_of(slot), policy_version)
        turn = sequences[-1][-1]
        self._next_lengths[slot] = turn.begun + turn.stop - turn.start

    def add(  # type: ignore[override]
        self,
        obs: Observation,
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        episode_start: npt.NDArray[Any],
        value: th.Tensor | npt.NDArray[Any] | None,
        log_prob: th.Tensor | npt.NDArray[Any],
        slots: npt.NDArray[np.intp] | None = None,
    ) -> None:
        """Add a step of each environment; see `RolloutBuffer.add`.

        Args:
            obs: What the actions were chosen from.
            action: The tokens.
            reward: The rewards.
            episode_start: Whether the observations are the first ones of their episodes.
            value: Their values. None: they are computed later, or there is no critic.
            log_prob: The tokens' log-probabilities.
            slots: Which environments the rows are of. None: all, in order.
        """
        rows = np.arange(self.n_envs) if slots is None else slots
        steps = self.lengths[rows]
        if steps.max() >= len(self.actions):
            self._grow()
        starts = np.asarray(episode_start, dtype=np.bool_)
        lengths = np.asarray(obs["response_length"]).reshape(-1)
        # A length that does not follow is that of an environment that somebody else has stepped.
        begins = starts | (lengths == 0) | (lengths != self._next_lengths[rows]) | (steps == 0)
        self._next_lengths[rows] = lengths + 1
        for row in np.flatnonzero(begins).tolist():
            self._begin_turn(int(rows[row]), obs, row, bool(starts[row]))
        at = steps, rows
        self.actions[at] = np.asarray(action).reshape(-1)
        self.rewards[at] = reward
        self.episode_starts[at] = starts
        self.log_probs[at] = _array(log_prob)
        if value is not None:
            self.values[at] = _array(value)
        self.lengths[rows] += 1
        self.pos = int(self.lengths.max())
        self.full = slots is None and self.pos == self.buffer_size

    def add_turn(
        self,
        slot: int,
        obs: Observation,
        actions: npt.NDArray[Any],
        reward: float,
        episode_start: bool,
        log_probs: npt.NDArray[Any],
        values: npt.NDArray[Any] | None = None,
    ) -> None:
        """Add a whole turn of one environment, as its tokens one by one would be added.

        Args:
            slot: The environment.
            obs: What the turn's first token was chosen from, one row of each array.
            actions: (n,) the tokens.
            reward: That of the turn, which comes with its last token.
            episode_start: Whether the turn is the first one of its episode.
            log_probs: (n,) the tokens' log-probabilities.
            values: (n,) what the critic said. None: see `add`.
        """
        start, stop = int(self.lengths[slot]), int(self.lengths[slot]) + len(actions)
        while stop > len(self.actions):
            self._grow()
        self._begin_turn(slot, obs, 0, episode_start)
        self.actions[start:stop, slot] = actions
        self.rewards[stop - 1, slot] = reward
        self.episode_starts[start, slot] = episode_start
        self.log_probs[start:stop, slot] = log_probs
        if values is not None:
            self.values[start:stop, slot] = values
        self._next_lengths[slot] = 0
        self.lengths[slot] = stop
        self.pos = int(self.lengths.max())

    def finish(self, last_values: npt.NDArray[Any], dones: npt.NDArray[np.bool_]) -> None:
        """Take the rollout for complete: close its sequences.

        Args:
            last_values: (n_envs,) values of the observations that followed the last steps.
            dones: (n_envs,) whether the last steps ended their episodes.

        Raises:
            Diverged: If log-probabilities or values are not finite.
        """
        self.last_values = np.asarray(last_values, dtype=np.float32).reshape(-1)
        self.check_finite()
        self.last_dones = np.asarray(dones, dtype=np.bool_)
        for env in range(self.n_envs):
            self._recorder.close(env, self._actions_of(env))
        self.full = True

    def check_finite(self) -> None:
        """Raise `Diverged` if log-probabilities or values are not finite."""
        arrays = (self.log_probs, self.values, self.last_values)
        if not all(np.isfinite(array).all() for array in arrays):
            raise Diverged(
                "The policy's log-probabilities or values are no longer finite: training has "
                "diverged. Lower learning_rate, or raise kl_coef."
            )

    def compute_returns_and_advantage(
        self, last_values: th.Tensor, dones: npt.NDArray[np.bool_]
    ) -> None:
        """Complete the rollout and compute advantages, as SB3's own algorithms want it."""
        self.finish(_array(last_values), dones)
        super().compute_returns_and_advantage(last_values, dones)

    def drop_episodes(self, episodes: set[int]) -> None:
        """Leave out the sequences of some episodes; what they earned stays in the arrays."""
        self.sequences = [s for s in self.sequences if s.episode not in episodes]

    def drop_unfinished(self) -> None:
        """Leave out the sequences of episodes that the end of the rollout has cut."""
        self.drop_episodes(self.unfinished_episodes)

    def drop_truncated(self) -> None:
        """Leave out episodes that were truncated, and those with a turn that its budget ended.

        What they earned stays in the arrays.
        """
        self.drop_episodes(self.truncated_episodes | self._with_a_turn_that_ends(self.cut_turns))

    @property
    def unfinished_episodes(self) -> set[int]:
        """The numbers of the episodes that the end of the rollout has cut."""
        return {s.episode for s in self.sequences if not self.is_complete(s)}

    @property
    def truncated_episodes(self) -> set[int]:
        """The numbers of the episodes that were truncated."""
        return self._with_a_turn_that_ends({(cut.slot, cut.step) for cut in self.truncations})

    def _with_a_turn_that_ends(self, places: set[tuple[int, int]]) -> set[int]:
        """Return the episodes that have a turn whose environment and last step is in `places`."""
        ends = ((s.episode, (s.env, t.stop - 1)) for s in self.sequences for t in s.segments)
        return {episode for episode, end in ends if end in places}

    def is_complete(self, sequence: Sequence) -> bool:
        """Return whether a sequence's episode ended within the rollout."""
        ended = sequence.segments[-1].stop < self.lengths[sequence.env]
        return bool(ended or self.last_dones[sequence.env])

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
        """Split the sequences, in random order, into minibatches; see `split_evenly`.

        Those that answer one prompt come together, so that it is read once.
        """
        assert self.full, "The rollout is not complete."
        together = list(by_group(self.sequences))
        order = np.random.permutation(len(together))
        return split_evenly([s for i in order for s in together[i]], batch_size, groups)

    def parts(self, size: int | None) -> list[list[Sequence]]:
        """Split all sequences into parts of at most `size` actions; see `split_by_size`."""
        return split_by_size(self.sequences, size)

    def samples(self, sequences: list[Sequence]) -> RolloutBufferSamples:
        """Return sequences as SB3's samples.

        `observations` holds `tokens`, `action_positions`, `turn_starts` and, for an encoder,
        `source` and `source_lengths`, as `SequenceBatch` has them. Everything else is flat, one
        entry for each action, sequence by sequence.
        """
        index = self.index(sequences)
        flat = (self.values, self.log_probs, self.advantages, self.returns)
        return RolloutBufferSamples(
            cast("Any", self.collate(sequences).tensors()),
            self._tensor(self.actions[index].astype(np.int64)),
            *(self._tensor(array[index]) for array in flat),
        )

    def batch(self, sequences: list[Sequence]) -> TokenBatch:
        """Return sequences with all that is known of their actions."""
        index = self.index(sequences)
        counts = [sequence.num_actions for sequence in sequences]
        floats = {
            "old_log_probs": self.log_probs,
            "ref_log_probs": self.ref_log_probs,
            "old_values": self.values,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        ids = {
            "sequence_ids": range(len(sequences)),
            "episode_ids": [sequence.episode for sequence in sequences],
            "group_ids": [sequence.group for sequence in sequences],
        }
        return TokenBatch(
            self.collate(sequences),
            self._tensor(np.array([sequence.policy_version for sequence in sequences])),
            self._tensor(np.array(counts)),
            actions=self._tensor(self.actions[index].astype(np.int64)),
            turn_ids=self._tensor(np.concatenate([sequence.turns for sequence in sequences])),
            **{name: self._tensor(array[index]) for name, array in floats.items()},
            **{name: self._tensor(np.repeat(values, counts)) for name, values in ids.items()},
        )

    def collate(self, sequences: list[Sequence]) -> SequenceBatch:
        """Return sequences as the model reads them."""
        rows = [cast("Any", sequence.row) for sequence in sequences]
        return self.layout.collate(rows, self._padding(), self.device)

    def index(self, sequences: list[Sequence]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the steps and environments of the sequences' actions, in the samples' order."""
        steps = [sequence.steps for sequence in sequences]
        envs = np.repeat([sequence.env for sequence in sequences], list(map(len, steps)))
        return np.concatenate(steps), envs

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences; what the end of the rollout leaves of them once it is complete."""
        return self._recorder.sequences

    @sequences.setter
    def sequences(self, sequences: list[Sequence]) -> None:
        self._recorder.sequences = sequences

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """Boolean, as the arrays are: where there is a step."""
        real: npt.NDArray[np.bool_] = np.arange(len(self.actions))[:, None] < self.lengths
        return real

    @property
    def episode_ends(self) -> npt.NDArray[np.bool_]:
        """Boolean, as the arrays are: where an episode's last step is."""
        ends = np.vstack([self.episode_starts[1:], np.zeros_like(self.last_dones)])
        envs = np.flatnonzero(self.lengths)
        ends[self.lengths[envs] - 1, envs] = self.last_dones[envs]
        return ends

    def num_actions(self) -> int:
        """Return how many actions the sequences have together."""
        return sum(sequence.num_actions for sequence in self.sequences)

    def nbytes(self) -> int:
        """Return the memory that the stored rollout takes, in bytes."""
        arrays = [self.actions, self.episode_starts, *(getattr(self, name) for name in FLOATS)]
        contexts = [segment.context for s in self.sequences for segment in s.segments]
        rows = [array for sequence in self.sequences for array in sequence.row or ()]
        return sum(array.nbytes for array in [*arrays, *contexts, *rows] if array is not None)

    def _begin_turn(self, env: int, obs: Observation, row: int, episode_start: bool) -> None:
        prompt, response = (
            obs[key][row, : int(obs[f"{key}_length"][row, 0])] for key in ("prompt", "response")
        )
        context = np.concatenate([prompt, response]).astype(np.int32)
        self._recorder.begin(
            env,
            self._actions_of(env),
            context,
            begun=len(response),
            episode_start=episode_start,
            policy_version=self.policy_version,
        )

    def _actions_of(self, env: int) -> npt.NDArray[np.int32]:
        """Return an environment's actions so far."""
        actions: npt.NDArray[np.int32] = self.actions[: self.lengths[env], env]
        return actions

    def _grow(self) -> None:
        """Make room for as many steps again."""
        for name in ("actions", "episode_starts", *FLOATS):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))

    def _padding(self) -> int:
        return int(getattr(self.action_space, "pad_token_id", 0))

    def _tensor(self, array: npt.NDArray[Any]) -> th.Tensor:
        return th.as_tensor(array, device=self.device)


def _array(values: th.Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers on the host, flat."""
    if isinstance(values, th.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values).reshape(-1)
