from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from agents import PPO
from agents.files import json_line, read_jsonl
from agents.rollouts.traces import TraceCallback, drop_traces, evenly_spread, text_pieces, trace
from tests.agents.agents import ITERATION, KINDS, N_STEPS, NUM_ENVS, make_agent, same, weights
from textenvs.rewards import CallableReward
from textenvs.text.loading import embedded_tokenizer

COLUMNS = ("log_probs", "values", "advantages", "rewards")
ALL = 1000  # more episodes than any rollout here has


class Copies(BaseCallback):
    """Keeps what each rollout's buffer holds at its end, and what its steps told."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Any] = []
        self.steps: list[tuple[Any, Any, Any]] = []

    def _on_step(self) -> bool:
        told = (self.locals["infos"], self.locals["dones"], self.locals["obs_tensor"])
        self.steps.append(deepcopy(told))
        return True

    def _on_rollout_end(self) -> None:
        self.buffers.append(deepcopy(self.model.rollout_buffer))  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_rollout(kind: str, tmp_path: Path) -> None:
    copies, path = Copies(), tmp_path / "traces.jsonl"
    make_agent(kind).learn(2 * ITERATION, callback=[copies, TraceCallback(path, ALL)])
    traces = read_jsonl(path)
    tokenizer = embedded_tokenizer()
    assert len(traces) == sum(len(buffer.sequences) for buffer in copies.buffers)
    for number, buffer in enumerate(copies.buffers):
        own = [t for t in traces if t["num_timesteps"] == (number + 1) * ITERATION]
        steps = copies.steps[number * N_STEPS : (number + 1) * N_STEPS]
        seen = np.zeros((N_STEPS, NUM_ENVS), dtype=np.int64)
        for record, sequence in zip(own, buffer.sequences, strict=True):
            slot, turns = record["slot"], record["turns"]
            assert slot == sequence.env and len(turns) == len(sequence.segments)
            first, last = sequence.segments[0].start, sequence.segments[-1].stop - 1
            assert record["from_start"] == bool(buffer.episode_starts[first, slot])
            assert record["finished"] == bool(steps[last][1][slot])
            read: list[int] = []
            for turn, segment in zip(turns, sequence.segments, strict=True):
                span = slice(segment.start, segment.stop)
                seen[span, slot] += 1
                assert turn["tokens"] == buffer.actions[span, slot].tolist()
                for name in COLUMNS:
                    expected = getattr(buffer, name)[span, slot]
                    assert np.array_equal(np.float32(turn[name]), expected), name
                # The prompts, joined with what was said, are what the policy was shown.
                read += turn["prompt_tokens"]
                shown = steps[segment.start][2]
                pieces = [
                    shown[key][slot, : int(shown[f"{key}_length"][slot])].tolist()
                    for key in ("prompt", "response")
                ]
                assert read == pieces[0] + pieces[1]
                read += turn["tokens"]
                assert turn["prompt"] == tokenizer.decode(turn["prompt_tokens"])
                assert "".join(turn["pieces"]) == tokenizer.decode(turn["tokens"])
                info = steps[segment.stop - 1][0][slot]
                assert turn["reward_terms"] == info.get("reward_terms")
        assert (seen == 1).all()
    finished = [t for t in traces if t["finished"]]
    assert finished and {t["from_start"] for t in traces} == {True, False}
    assert all(
        t["turns"][-1]["reward_terms"].keys() == {"task", "length_penalty"} for t in finished
    )
    assert (max(len(t["turns"]) for t in traces) > 1) == (kind == "several turns")


class Watched(PPO):
    """Keeps the buffer that its last update learns from."""

    def train(self) -> None:
        self.learned_from = deepcopy(self.rollout_buffer)
        super().train()


@pytest.mark.parametrize(
    "kl_coef",
    [
        0.0,
        0.3,
    ],
)
def test_traces_are_what_the_update_learns_from(kl_coef: float, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    model = make_agent(cls=Watched, kl_coef=kl_coef)
    model.learn(2 * ITERATION, callback=TraceCallback(path, ALL))
    buffer: Any = model.learned_from
    traces = [t for t in read_jsonl(path) if t["num_timesteps"] == 2 * ITERATION]
    names = (*COLUMNS, "ref_log_probs") if kl_coef else COLUMNS
    for name in names:
        columns = [turn[name] for record in traces for turn in record["turns"]]
        expected = getattr(buffer, name)[buffer.index(buffer.sequences)]
        assert np.array_equal(np.float32(np.concatenate(columns)), expected), name
    if kl_coef:
        assert not np.array_equal(buffer.ref_log_probs, buffer.log_probs)


def test_what_an_agent_lacks_is_null(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    model = make_agent().learn(ITERATION, callback=TraceCallback(path, 1))
    (record,) = read_jsonl(path)
    assert all(turn["ref_log_probs"] is None for turn in record["turns"])
    assert all(turn["values"] is not None for turn in record["turns"])
    buffer = model.rollout_buffer
    buffer.ref_log_probs[:] = -2.5
    bare = trace(buffer, buffer.sequences[0], absent={"values"})["turns"][0]
    assert bare["ref_log_probs"] == [-2.5] * len(bare["tokens"])
    assert [bare[name] for name in ("values", "prompt", "pieces", "reward_terms")] == [None] * 4


def lengths(transcripts: Any) -> list[float]:
    return [float(len(transcript.response)) for transcript in transcripts]


def test_slow_reward_terms_are_complete(tmp_path: Path) -> None:
    traces = []
    for slow in (False, True):
        path = tmp_path / f"{slow}.jsonl"
        reward = ["task", CallableReward(lengths, "lengths", 0.1, slow=slow)]
        model = make_agent(env={"reward": reward})
        model.learn(2 * ITERATION, callback=TraceCallback(path, ALL))
        traces.append(read_jsonl(path))
    assert traces[0] == traces[1]
    terms = [turn["reward_terms"] for record in traces[0] for turn in record["turns"]]
    assert any(term is not None and term["lengths"] > 0 for term in terms)


def test_traced_run_is_the_untraced_one(tmp_path: Path) -> None:
    states = []
    for callback in (None, TraceCallback(tmp_path / "traces.jsonl", 2)):
        model = make_agent("several turns", kl_coef=0.1).learn(3 * ITERATION, callback=callback)
        generators = th.get_rng_state(), np.random.randint(2**31, size=9)
        states.append((weights(model.policy), model.rollout_buffer.actions, *generators))
    assert same(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])
    assert th.equal(states[0][2], states[1][2]) and np.array_equal(states[0][3], states[1][3])
    assert len(read_jsonl(tmp_path / "traces.jsonl")) == 3 * 2


def test_some_episodes_are_spread_over_the_rollout() -> None:
    assert evenly_spread(10, 1) == [5] and evenly_spread(10, 2) == [2, 7]
    assert evenly_spread(3, 5) == [0, 1, 2] and evenly_spread(0, 5) == []
    for total in (4, 7, 100):
        indices = evenly_spread(total, 4)
        assert len(set(indices)) == 4 and 0 <= indices[0] and indices[-1] < total
        gaps = np.diff(indices)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("text", ["Plain words.", "naïve café", "日本 🍣!", ""])
def test_pieces_are_the_text(text: str, hf_tokenizer: Any) -> None:
    for tokenizer in (embedded_tokenizer(), hf_tokenizer):
        tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
        pieces = text_pieces(tokenizer, tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == text + tokenizer.eos_token
        assert pieces[-1] == tokenizer.eos_token
        # Nothing is lost of what is no whole character either.
        assert "".join(text_pieces(tokenizer, tokens[:3])) == tokenizer.decode(tokens[:3])


def test_what_came_after_a_checkpoint_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    drop_traces(path, 128)
    assert not path.exists()
    lines = [json_line({"num_timesteps": steps}) for steps in (128, 128, 256, 384)]
    path.write_text("".join(lines)[:-4])
    drop_traces(path, 256)
    assert path.read_text() == "".join(lines[:3])


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episodes must be at least 1, but it is 0"):
        TraceCallback(tmp_path / "traces.jsonl", 0)
    model = PPO("MlpPolicy", gym.make("CartPole-v1"), n_steps=8, batch_size=8)
    with pytest.raises(TypeError, match=r"need a SequenceRolloutBuffer.* is a RolloutBuffer"):
        model.learn(8, callback=TraceCallback(tmp_path / "traces.jsonl"))
