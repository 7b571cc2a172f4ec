"""Whole turns at once: the same transitions as their tokens one by one, and what is no turn."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.textenvs.toys import Chat, Echo, encode, same
from textenvs.envs.engine import TextEngine
from textenvs.text.codec import TextCodec, TokenIds

EOS = 0
NUM_ENVS = 4


class Twin:
    """An engine with generators of its own, started on the seeds of the slots."""

    def __init__(self, engine: TextEngine) -> None:
        self.engine = engine
        self.rngs = [np.random.default_rng(slot) for slot in range(engine.num_envs)]
        for slot in range(engine.num_envs):
            self.restart(slot)

    def restart(self, slot: int) -> None:
        self.engine.reset(slot, self.rngs[slot])

    def step(self, slots: list[int], responses: list[TokenIds]) -> tuple[Any, ...]:
        """Emit the responses token by token; return what the turns' ends gave, as `respond`."""
        rewards, terminated = np.zeros(NUM_ENVS), np.zeros(NUM_ENVS, dtype=np.bool_)
        infos: list[tuple[int, Any]] = []
        for position in range(max(map(len, responses))):
            actions = np.full(NUM_ENVS, -1)
            for slot, response in zip(slots, responses, strict=True):
                if position < len(response):
                    actions[slot] = response[position]
            result = self.engine.step(actions, self.rngs, np.flatnonzero(actions >= 0))
            rewards, terminated = rewards + result[0], terminated | result[1]
            infos += result[2]
        return rewards, terminated, sorted(infos, key=lambda pair: slots.index(pair[0]))

    def standing(self) -> Any:
        return self.engine.get_state(), [rng.bit_generator.state for rng in self.rngs]


def response(engine: TextEngine, slot: int, rng: np.random.Generator) -> TokenIds:
    """A turn of any kind: what the task demonstrates, random tokens up to EOS, a full budget."""
    kind = rng.integers(3)
    if kind == 0:
        text = engine.task.demonstrate(engine.example(slot), engine.turns[slot], rng)
        return engine.encode_response(text, slot)
    tokens = rng.integers(1, engine.action_space.n, size=engine.max_new_tokens)
    return np.append(tokens[: rng.integers(len(tokens))], EOS) if kind == 1 else tokens


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_a_whole_turn_is_its_tokens_one_by_one(env_id: str) -> None:
    engine = TextEngine(env_id, NUM_ENVS, reward=["task", "length_penalty", "missing_eos_penalty"])
    stepped, given = Twin(engine), Twin(engine.with_slots(NUM_ENVS))
    rng = np.random.default_rng(0)
    ended, longest = 0, 0
    for _ in range(40):
        slots = rng.permutation(NUM_ENVS)[: rng.integers(1, NUM_ENVS + 1)].tolist()
        responses = [response(stepped.engine, slot, rng) for slot in slots]
        before = [tokens.copy() for tokens in responses]
        theirs = stepped.step(slots, responses)
        ours = given.engine.respond(slots, responses, given.rngs)
        assert same(list(ours), list(theirs)) and [slot for slot, _ in ours[2]] == slots
        assert same(given.standing(), stepped.standing())
        assert same(responses, before)
        for slot, info in ours[2]:
            longest = max(longest, len(info["transcript"].responses))
            if ours[1][slot]:
                ended += 1
                stepped.restart(slot)
                given.restart(slot)
    assert ended > 5 and longest == (1 if env_id == "TextGen-v0" else stepped.engine.task.max_turns)


def test_a_turn_that_has_begun_is_completed() -> None:
    engine = Twin(TextEngine(Chat, NUM_ENVS))
    other = copy.deepcopy(engine)
    begun = np.full(NUM_ENVS, 5)
    for each in (engine, other):
        each.engine.step(begun, each.rngs)
    rest = [np.array([6, EOS]), np.array([5] * 7)]
    ours = engine.engine.respond([2, 0], rest, engine.rngs)
    assert same(list(ours), list(other.step([2, 0], rest)))
    assert same(engine.standing(), other.standing())
    assert [info["transcript"].response_tokens for _, info in ours[2]] == [3, 8]


def test_a_stop_token_other_than_eos_ends_a_response() -> None:
    engine = Twin(TextEngine(Echo, 1, tokenizer=TextCodec(stop_token_ids=[7])))
    _, terminated, [(_, info)] = engine.engine.respond([0], [[*encode("a"), 7]], engine.rngs)
    assert terminated[0] and info["transcript"].stopped and info["transcript"].response == "a"


def test_no_slots_give_no_transitions() -> None:
    engine = Twin(TextEngine(Echo, 2))
    rewards, terminated, infos = engine.engine.respond([], [], engine.rngs)
    assert rewards.tolist() == [0, 0] and not terminated.any() and infos == []


NO_TURNS: dict[str, tuple[list[int], list[Any], str]] = {
    "goes on": ([1], [[5, EOS, 6]], "slot 1 has tokens after the stop token at position 1"),
    "too long": ([1], [[5] * 7], r"slot 1 has 7 tokens, but only 6 are left of max_new_tokens=6"),
    "incomplete": (
        [0, 1],
        [[EOS], [5, 6]],
        r"slot 1 neither ends with a stop token \(0,\) nor fills the budget: it has 2 .* 6 are",
    ),
    "empty": ([1], [[]], "slot 1 neither ends with a stop token"),
    "no ids": ([0], [[10**6, EOS]], r"token ids in \[0, \d+\), but they range from 0 to 1000000"),
    "numbers": ([0], [[0.5, 0.0]], "slot 0 must be a list of token ids"),
    "nested": ([0], [[[5, EOS]]], "slot 0 must be a list of token ids"),
    "one response": ([0, 1], [[EOS]], r"got 1 responses for the slots \[0, 1\]"),
    "one slot twice": ([1, 1], [[EOS], [EOS]], r"got 2 responses for the slots \[1, 1\]"),
    "over": ([2], [[EOS]], "Slot 2 has nothing to respond to: reset it first"),
    "never reset": ([3], [[EOS]], "Slot 3 has nothing to respond to"),
}


@pytest.mark.parametrize("kind", NO_TURNS)
def test_what_is_no_turn_is_an_error_and_changes_nothing(kind: str) -> None:
    slots, responses, message = NO_TURNS[kind]
    engine = TextEngine(Echo, NUM_ENVS)
    rngs = [np.random.default_rng(slot) for slot in range(NUM_ENVS)]
    for slot in range(3):
        engine.reset(slot, rngs[slot])
    engine.respond([2], [[EOS]], rngs)
    before = copy.deepcopy(engine.get_state())
    with pytest.raises(ValueError, match=message):
        engine.respond(slots, responses, rngs)
    assert same(engine.get_state(), before)


def test_a_response_of_any_integer_type_is_taken() -> None:
    tokens: npt.NDArray[np.int32] = np.array([5, EOS], dtype=np.int32)
    results = []
    for given in (tokens, tokens.tolist(), tuple(tokens.tolist())):
        engine = Twin(TextEngine(Chat, 1))
        engine.engine.respond(np.array([0]), [given], engine.rngs)  # type: ignore[list-item]
        results.append(engine.standing())
    assert same(results[0], results[1]) and same(results[1], results[2])
