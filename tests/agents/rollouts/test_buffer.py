from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from gymnasium import spaces

from agents.rollouts.buffer import SequenceRolloutBuffer
from textenvs.spaces import TokenSpace

PROMPT, RESPONSE, VOCAB, PAD = 60, 8, 50, 1
SPACE = spaces.Dict(
    {
        "prompt": spaces.Box(0, VOCAB - 1, (PROMPT,), np.int64),
        "prompt_length": spaces.Box(0, PROMPT, (1,), np.int64),
        "response": spaces.Box(0, VOCAB - 1, (RESPONSE,), np.int64),
        "response_length": spaces.Box(0, RESPONSE, (1,), np.int64),
    }
)
Ids = list[int]


class Played:
    """Ragged random episodes, kept as plain lists beside the buffer that is filled with them.

    Args:
        steps: Steps of each environment.
        envs: The number of environments.
        turns: The most turns that an episode has.
        lead: Steps that were played before the buffer began, so that it starts mid-episode.
    """

    def __init__(self, steps: int, envs: int, turns: int = 1, lead: int = 0, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.gamma, self.lam = 0.97, 0.9
        self.buffer = SequenceRolloutBuffer(
            steps,
            SPACE,
            TokenSpace(VOCAB, 0, PAD),
            device="cpu",
            gamma=self.gamma,
            gae_lambda=self.lam,
            n_envs=envs,
        )
        # Of each environment: for each step its context, action, reward, value and end.
        self.steps: list[list[tuple[Ids, int, float, float, bool]]] = [[] for _ in range(envs)]
        self.log_probs: list[npt.NDArray[np.float32]] = []
        prompts = [self.ids(3, 8) for _ in range(envs)]
        responses: list[Ids] = [[] for _ in range(envs)]
        turn, starts = [0] * envs, np.ones(envs, dtype=bool)
        for step in range(lead + steps):
            obs = self.observe(prompts, responses)
            actions = [
                0 if self.rng.random() < 0.25 else int(a) for a in self.rng.integers(2, VOCAB, envs)
            ]
            rewards, values, log_probs = (
                self.rng.normal(size=envs).astype(np.float32) for _ in range(3)
            )
            dones = np.zeros(envs, dtype=bool)
            contexts = [prompts[env] + responses[env] for env in range(envs)]
            for env, action in enumerate(actions):
                responses[env] = [*responses[env], action]
                if action and len(responses[env]) < RESPONSE:
                    continue
                turn[env] += 1
                longer = prompts[env] + responses[env] + self.ids(1, 5)
                if turn[env] < turns and len(longer) <= PROMPT and self.rng.random() < 0.8:
                    prompts[env] = longer
                else:
                    dones[env], turn[env], prompts[env] = True, 0, self.ids(3, 8)
                responses[env] = []
            if step >= lead:
                self.buffer.add(
                    obs,
                    np.array(actions)[:, None],
                    rewards,
                    starts,
                    th.tensor(values)[:, None],
                    th.tensor(log_probs),
                )
                self.log_probs.append(log_probs)
                for env in range(envs):
                    self.steps[env].append(
                        (
                            contexts[env],
                            actions[env],
                            float(rewards[env]),
                            float(values[env]),
                            bool(dones[env]),
                        )
                    )
            starts = dones
        self.last_values = self.rng.normal(size=envs).astype(np.float32)
        self.buffer.compute_returns_and_advantage(th.tensor(self.last_values)[:, None], starts)

    def ids(self, low: int, high: int) -> Ids:
        return [int(token) for token in self.rng.integers(2, VOCAB, self.rng.integers(low, high))]

    @staticmethod
    def observe(prompts: list[Ids], responses: list[Ids]) -> dict[str, npt.NDArray[np.int64]]:
        obs = {}
        for key, rows, width in (("prompt", prompts, PROMPT), ("response", responses, RESPONSE)):
            obs[key] = np.array([row + [PAD] * (width - len(row)) for row in rows])
            obs[f"{key}_length"] = np.array([[len(row)] for row in rows])
        return obs

    def advantages(self) -> npt.NDArray[np.float64]:
        """The definition: sums of discounted TD errors up to the end of the episode."""
        result = np.zeros((len(self.log_probs), len(self.steps)))
        for env, steps in enumerate(self.steps):
            for start in range(len(steps)):
                for k, (_, _, reward, value, done) in enumerate(steps[start:]):
                    last = start + k + 1 == len(steps)
                    following = self.last_values[env] if last else steps[start + k + 1][3]
                    error = reward + self.gamma * (0.0 if done else float(following)) - value
                    result[start, env] += (self.gamma * self.lam) ** k * error
                    if done:
                        break
        return result


KINDS: list[dict[str, Any]] = [
    {"turns": 1},
    {"turns": 1, "lead": 3},
    {"turns": 4},
    {"turns": 4, "lead": 6},
]


@pytest.fixture(params=KINDS, ids=["single", "single-cut", "dialogue", "dialogue-cut"])
def played(request: pytest.FixtureRequest) -> Played:
    return Played(steps=40, envs=5, **request.param)


def test_gae_is_that_of_the_definition(played: Played) -> None:
    expected = played.advantages()
    assert np.abs(played.buffer.advantages - expected).max() < 1e-5
    values = np.array([[step[3] for step in steps] for steps in played.steps]).T
    assert np.abs(played.buffer.returns - expected - values).max() < 1e-5


def test_gae_of_one_episode_in_closed_form() -> None:
    # gamma = lambda = 1, no values: each step's advantage is the reward that is still to come.
    buffer = SequenceRolloutBuffer(4, SPACE, TokenSpace(VOCAB, 0, PAD), "cpu", gamma=1.0)
    for step in range(4):
        obs = Played.observe([[5, 6]], [[7] * step])
        reward, start = np.array([float(10**step)]), np.array([step == 0])
        buffer.add(obs, np.array([7]), reward, start, th.zeros(1, 1), th.zeros(1))
    buffer.compute_returns_and_advantage(th.full((1, 1), 9.0), np.array([True]))
    assert buffer.advantages[:, 0].tolist() == [1111, 1110, 1100, 1000]
    buffer.compute_returns_and_advantage(th.full((1, 1), 9.0), np.array([False]))
    assert buffer.advantages[:, 0].tolist() == [1120, 1119, 1109, 1009]


def test_recomputation_follows_changed_rewards(played: Played) -> None:
    played.buffer.rewards -= 0.5
    played.steps = [[(c, a, r - 0.5, v, d) for c, a, r, v, d in steps] for steps in played.steps]
    played.buffer.recompute_returns_and_advantage()
    assert np.abs(played.buffer.advantages - played.advantages()).max() < 1e-5


def test_recomputation_needs_a_first_time() -> None:
    buffer = SequenceRolloutBuffer(4, SPACE, TokenSpace(VOCAB, 0, PAD), "cpu")
    with pytest.raises(RuntimeError, match="compute_returns_and_advantage"):
        buffer.recompute_returns_and_advantage()


@pytest.mark.parametrize("batch_size", [None, 1, 7, 50, 1000])
def test_every_step_comes_once_with_its_own_context(played: Played, batch_size: int | None) -> None:
    expected = sorted(
        (tuple(context), action, float(played.log_probs[i][env]), value)
        for env, steps in enumerate(played.steps)
        for i, (context, action, _, value, _) in enumerate(steps)
    )
    advantage = {
        float(played.log_probs[i][env]): float(played.buffer.advantages[i, env])
        for env, steps in enumerate(played.steps)
        for i in range(len(steps))
    }
    seen = []
    for samples in played.buffer.get(batch_size):
        tokens, positions = (
            samples.observations[key]  # type: ignore[index]
            for key in ("tokens", "action_positions")
        )
        contexts = [tuple(tokens[i, : j + 1].tolist()) for i, j in positions.nonzero()]
        flat = (samples.actions, samples.old_log_prob, samples.old_values)
        columns = [column.tolist() for column in flat]
        assert len({len(contexts), *map(len, columns)}) == 1
        seen += list(zip(contexts, *columns, strict=True))
        for log_prob, value, returns in zip(
            columns[1], samples.advantages.tolist(), samples.returns.tolist(), strict=True
        ):
            assert value == advantage[log_prob]
            assert returns == pytest.approx(value + columns[2][columns[1].index(log_prob)])
    assert sorted(seen) == expected


def test_types_and_padding_of_samples(played: Played) -> None:
    (samples,) = played.buffer.get()
    tokens, positions, starts = samples.observations.values()
    assert tokens.dtype == samples.actions.dtype == th.int64
    assert positions.dtype == starts.dtype == th.bool
    for array in (samples.old_values, samples.old_log_prob, samples.advantages, samples.returns):
        assert array.dtype == th.float32
    for row, mask in zip(tokens, positions, strict=True):
        end = int(mask.nonzero().max()) + 2  # the last action is there if the width allows
        assert (row[end:] == PAD).all() and (row[:end] != PAD).all()


def test_turns_of_a_dialogue_are_one_sequence() -> None:
    played = Played(steps=60, envs=4, turns=4)
    episodes = sum(sum(step[4] for step in steps[:-1]) + 1 for steps in played.steps)
    assert len(played.buffer.sequences) == episodes
    assert max(len(sequence.segments) for sequence in played.buffer.sequences) >= 3
    sequences = played.buffer.sequences
    # Each token of a conversation is stored once.
    stored = sum(len(s.context) for sequence in sequences for s in sequence.segments)
    stored += played.buffer.actions.size
    longest = [
        len(steps[i][0]) + 1
        for steps in played.steps
        for i in range(len(steps))
        if steps[i][4] or i + 1 == len(steps)
    ]
    assert stored == sum(longest)


def test_prompt_that_does_not_go_on_is_a_new_sequence() -> None:
    buffer = SequenceRolloutBuffer(3, SPACE, TokenSpace(VOCAB, 0, PAD), "cpu")
    never = np.array([False])
    # The second turn's prompt was cut on the left; in the third, one token was changed.
    for prompt, action in (([5, 6, 7], 8), ([7, 8, 9], 10), ([7, 8, 11, 10, 12], 13)):
        obs = Played.observe([prompt], [[]])
        buffer.add(obs, np.array([action]), np.zeros(1), never, th.zeros(1, 1), th.zeros(1))
    buffer.compute_returns_and_advantage(th.zeros(1, 1), never)
    contexts = [[s.context.tolist() for s in q.segments] for q in buffer.sequences]
    assert contexts == [[[5, 6, 7]], [[7, 8, 9]], [[7, 8, 11, 10, 12]]]


def test_new_episode_is_a_new_sequence_even_if_its_prompt_goes_on() -> None:
    buffer = SequenceRolloutBuffer(2, SPACE, TokenSpace(VOCAB, 0, PAD), "cpu")
    start = np.array([True])
    for prompt in ([5, 6], [5, 6, 8, 9]):
        obs = Played.observe([prompt], [[]])
        buffer.add(obs, np.array([8]), np.zeros(1), start, th.zeros(1, 1), th.zeros(1))
    buffer.compute_returns_and_advantage(th.zeros(1, 1), start)
    assert [len(sequence.segments) for sequence in buffer.sequences] == [1, 1]


def test_rollout_cut_in_the_middle_starts_with_what_was_said() -> None:
    played = Played(steps=40, envs=5, turns=4, lead=5)
    cut = [steps[0][0] for steps in played.steps]
    firsts = [
        s.segments[0].context.tolist() for s in played.buffer.sequences if s.segments[0].start == 0
    ]
    assert sorted(firsts) == sorted(cut)


@pytest.mark.parametrize("batch_size", [20, 64, 100, 200])
def test_minibatches_are_about_of_the_size_asked_for(batch_size: int) -> None:
    played = Played(steps=100, envs=8)
    sizes = [len(samples.actions) for samples in played.buffer.get(batch_size)]
    assert len(sizes) == round(800 / batch_size) and sum(sizes) == 800
    assert max(abs(size - 800 / len(sizes)) for size in sizes) <= RESPONSE


@pytest.mark.parametrize("size", [1, 5, 30, 10_000])
def test_micro_batches_hold_each_sequence_once(played: Played, size: int) -> None:
    for minibatch in played.buffer.minibatches(64):
        parts = played.buffer.micro_batches(minibatch, size)
        assert sorted(id(s) for part in parts for s in part) == sorted(map(id, minibatch))
        counts = [len(played.buffer.index(part)[0]) for part in parts]
        for part, count in zip(parts, counts, strict=True):
            assert part and (count <= size or len(part) == 1)
        # What is alike in length is together, so that little is padded.
        lengths = [sequence.length for part in parts for sequence in part]
        assert lengths == sorted(lengths)
        (whole,) = played.buffer.micro_batches(minibatch, None)
        assert whole == [sequence for part in parts for sequence in part]
    assert len(played.buffer.micro_batches(played.buffer.sequences, 10_000)) == 1


def test_order_is_random_and_follows_numpys_seed() -> None:
    played = Played(steps=40, envs=5)

    def actions(seed: int) -> list[int]:
        np.random.seed(seed)
        return [a for samples in played.buffer.get(64) for a in samples.actions.tolist()]

    state = np.random.get_state()
    assert actions(0) == actions(0) != actions(1)
    np.random.set_state(state)


def test_memory_of_a_token() -> None:
    played = Played(steps=500, envs=8)
    buffer = played.buffer
    prompts = sum(4 * len(s.segments[0].context) for s in buffer.sequences)
    assert buffer.nbytes() - prompts <= 64 * 4000
    arrays = [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
    # Nothing that grows with the rollout is left out of the count.
    assert buffer.nbytes() >= sum(a.nbytes for a in arrays if a.size >= 4000)


def test_reset_empties_and_the_buffer_can_be_used_again() -> None:
    played = Played(steps=40, envs=5, turns=3)
    before = sorted(a for samples in played.buffer.get() for a in samples.actions.tolist())
    buffer = played.buffer
    buffer.reset()
    assert not buffer.full and not buffer.sequences and buffer.pos == 0
    with pytest.raises(AssertionError, match="not full"):
        next(buffer.get())
    again = Played(steps=40, envs=5, turns=3)
    assert sorted(a for s in again.buffer.get() for a in s.actions.tolist()) == before
