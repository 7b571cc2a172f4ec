"""The engine: what a token does, when turns and episodes end, budgets, dialogues, cost."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.textenvs.toys import EXAMPLES, Chat, Echo, encode
from textenvs import Example, LengthPenalty, Task, Transcript
from textenvs.envs.engine import TextEngine
from textenvs.rewards import CallableReward
from textenvs.text.codec import TextCodec
from textenvs.text.loading import EMBEDDED_TOKENIZER, embedded_tokenizer

TOKENIZER = embedded_tokenizer()
EOS, PAD = 0, 1


class Emoji(Echo):
    max_new_tokens = 64


class Labels(Task):
    """The responses are labels."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = choices

    def examples(self, split: str) -> Sequence[Example]:
        return EXAMPLES

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response in (self.choices or ())) for t in transcripts]


def rngs(count: int = 1) -> list[np.random.Generator]:
    return [np.random.default_rng(slot) for slot in range(count)]


def started(engine: TextEngine) -> TextEngine:
    for slot in range(engine.num_envs):
        engine.reset(slot, np.random.default_rng(slot), slot % len(engine.examples))
    return engine


def emit(engine: TextEngine, tokens: Sequence[int]) -> tuple[float, bool, dict[str, Any]]:
    """Emit tokens in a one-slot engine; return what the last step returned."""
    for token in tokens:
        rewards, terminated, infos = engine.step(np.array([token]), rngs())
    return float(rewards[0]), bool(terminated[0]), infos[0][1] if infos else {}


def prompt_of(engine: TextEngine, slot: int = 0) -> list[int]:
    length = engine.observations["prompt_length"][slot, 0]
    return engine.observations["prompt"][slot, :length].tolist()  # type: ignore[no-any-return]


def test_the_embedded_specials_are_what_the_tests_assume() -> None:
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (EOS, PAD)


def test_observations_start_with_the_prompt_and_are_right_padded() -> None:
    engine = started(TextEngine(Echo, 3))
    longest = max(len(encode(example.prompt)) for example in EXAMPLES)
    assert {key: array.shape for key, array in engine.observations.items()} == {
        "prompt": (3, longest),
        "prompt_length": (3, 1),
        "response": (3, 6),
        "response_length": (3, 1),
    }
    assert all(array.dtype == np.int64 for array in engine.observations.values())
    for slot, example in enumerate(EXAMPLES):
        ids = encode(example.prompt)
        assert engine.observations["prompt"][slot].tolist() == ids + [PAD] * (longest - len(ids))
    assert (engine.observations["response"] == PAD).all()
    assert (engine.observations["response_length"] == 0).all()


def test_a_token_is_appended_and_nothing_else_happens() -> None:
    engine = started(TextEngine(Echo, 2))
    before = copy.deepcopy(engine.observations)
    rewards, terminated, infos = engine.step(np.array([7, 9]), rngs(2))
    assert rewards.tolist() == [0.0, 0.0] and not terminated.any() and infos == []
    assert engine.observations["response"].tolist() == [[7] + [PAD] * 5, [9] + [PAD] * 5]
    assert engine.observations["response_length"].tolist() == [[1], [1]]
    assert np.array_equal(engine.observations["prompt"], before["prompt"])


def test_eos_ends_the_turn_and_the_reward_comes_with_it() -> None:
    engine = started(TextEngine(Echo))
    reward, terminated, info = emit(engine, [*encode(" so good"), EOS])
    assert (reward, terminated) == (len("so good"), True)
    transcript = info["transcript"]
    assert (transcript.response, transcript.stopped, transcript.final) == ("so good", True, True)
    assert transcript.response_tokens == len(encode(" so good")) + 1
    assert transcript.example == EXAMPLES[0] and transcript.references == EXAMPLES[0].references
    assert info["reward_terms"] == {"task": reward}
    assert info["is_success"] is True and info["example"] == 0
    assert engine.observations["response_length"][0, 0] == transcript.response_tokens


def test_the_budget_ends_the_turn_without_eos() -> None:
    engine = started(TextEngine(Echo, max_new_tokens=2))
    _, terminated, info = emit(engine, [5, 6])
    assert terminated and not info["transcript"].stopped
    assert info["transcript"].response_tokens == 2
    assert info["is_success"] is False


def test_eos_as_the_last_token_of_the_budget_is_a_stop() -> None:
    _, terminated, info = emit(started(TextEngine(Echo, max_new_tokens=2)), [5, EOS])
    assert terminated and info["transcript"].stopped
    assert info["transcript"].response_tokens == 2


def test_the_stop_token_is_the_tokenizers_own() -> None:
    # Token 0, which is EOS elsewhere, is not here.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED_TOKENIZER), eos_token="!")
    engine = started(TextEngine(Echo, tokenizer=tokenizer, reward=["task", "missing_eos_penalty"]))
    assert engine.eos_token_id == 2
    _, terminated, info = emit(engine, [5, EOS, 6, 2])
    assert terminated and info["transcript"].stopped
    assert info["reward_terms"]["missing_eos_penalty"] == 0
    _, terminated, info = emit(started(engine), [5, 5, 5, 5, 5, EOS])
    assert terminated and not info["transcript"].stopped
    assert info["reward_terms"]["missing_eos_penalty"] == -1


def test_any_stop_token_ends_a_turn() -> None:
    codec = TextCodec(stop_token_ids=[7])
    engine = TextEngine(Echo, tokenizer=codec, reward=["task", "missing_eos_penalty"])
    for stop in (7, EOS):
        _, terminated, info = emit(started(engine), [*encode(" good"), stop])
        assert terminated and info["transcript"].stopped
        assert info["transcript"].response == "good"
        assert info["reward_terms"] == {"task": 4.0, "missing_eos_penalty": 0}


def test_an_empty_response_is_a_response() -> None:
    reward, terminated, info = emit(started(TextEngine(Echo)), [EOS])
    assert (reward, terminated, info["transcript"].response) == (0.0, True, "")
    assert info["transcript"].response_tokens == 1


def test_success_is_left_out_if_the_task_knows_none() -> None:
    _, _, info = emit(started(TextEngine(Chat)), [*encode("stop"), EOS])
    assert "is_success" not in info and "example" in info


def test_text_split_over_byte_tokens_is_put_together_again() -> None:
    text = "ñandú 🙂 漢字"
    tokens = encode(text)
    assert len(tokens) > len(text)
    _, _, info = emit(started(TextEngine(Emoji)), [*tokens, EOS])
    assert info["transcript"].response == text


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokens = encode("🙂")
    assert len(tokens) > 1
    reward, _, info = emit(started(TextEngine(Emoji)), [tokens[0], EOS])
    assert set(info["transcript"].response) == {"�"} and reward > 0


def test_special_tokens_within_a_response_are_no_text() -> None:
    _, terminated, info = emit(started(TextEngine(Echo)), [PAD, *encode("a"), PAD, EOS])
    assert terminated and info["transcript"].response == "a"


@pytest.mark.parametrize("action", [-1, 10**6])
def test_an_action_out_of_range_changes_nothing(action: int) -> None:
    engine = started(TextEngine(Echo, 2))
    before = copy.deepcopy(engine.observations)
    with pytest.raises(ValueError, match=rf"\[0, {len(TOKENIZER)}\).*{action}"):
        engine.step(np.array([3, action]), rngs(2))
    assert all(np.array_equal(before[key], engine.observations[key]) for key in before)


def test_only_the_given_slots_are_stepped() -> None:
    engine = started(TextEngine(Echo, 3))
    _, _, infos = engine.step(np.array([EOS, -1, 4]), rngs(3), np.array([0, 2]))
    assert engine.observations["response_length"][:, 0].tolist() == [1, 0, 1]
    assert [slot for slot, _ in infos] == [0]


class CountingTokenizer(PreTrainedTokenizerFast):
    """The embedded tokenizer; it keeps what it has decoded."""

    def __init__(self) -> None:
        super().__init__(
            tokenizer_file=str(EMBEDDED_TOKENIZER), eos_token="<|eos|>", pad_token="<|pad|>"
        )
        self.decoded: list[int] = []

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        self.decoded.append(len(token_ids))
        return super().decode(token_ids, *args, **kwargs)


def test_turns_that_end_together_are_scored_in_one_call_and_decoded_once() -> None:
    batches: list[int] = []
    tokenizer = CountingTokenizer()

    def count(transcripts: Sequence[Transcript]) -> list[float]:
        batches.append(len(transcripts))
        return [0.0] * len(transcripts)

    kwargs: dict[str, Any] = {"dataset": [Example("The food")], "max_new_tokens": 50}
    engine = started(TextEngine(Echo, 4, tokenizer=tokenizer, reward=count, **kwargs))
    for _ in range(20):
        engine.step(np.full(4, 5), rngs(4))
    assert batches == tokenizer.decoded == []
    engine.step(np.array([EOS, 5, EOS, EOS]), rngs(4))
    assert batches == [3] and tokenizer.decoded == [20, 20, 20]


def test_a_step_within_a_turn_touches_one_entry_of_each_slot() -> None:
    """No array is replaced or rewritten as the response grows."""
    engine = started(TextEngine(Echo, 2, max_new_tokens=200))
    arrays = dict(engine.observations)
    for length in range(100):
        before = engine.observations["response"].copy()
        engine.step(np.array([5, 6]), rngs(2))
        changed = np.argwhere(before != engine.observations["response"])
        assert changed.tolist() == [[0, length], [1, length]]
    assert all(engine.observations[key] is array for key, array in arrays.items())


@pytest.mark.parametrize("tokens", [[*encode("hm"), EOS], [5] * 8], ids=["eos", "budget"])
def test_a_dialogue_grows_by_the_emitted_tokens_and_the_reply(tokens: list[int]) -> None:
    engine = started(TextEngine(Chat))
    before = prompt_of(engine)
    assert before == encode("User: The food\nAgent:")
    reward, terminated, info = emit(engine, tokens)
    assert (reward, terminated, info["transcript"].final) == (1.0, False, False)
    assert "example" not in info
    reply = engine.turns[0][-1]
    assert reply.role == "user" and reply.text.startswith("Go on ")
    assert prompt_of(engine) == before + tokens + encode(f"\nUser: {reply.text}\nAgent:")
    assert engine.observations["response_length"][0, 0] == 0
    assert (engine.observations["response"] == PAD).all()


def test_emitted_tokens_are_never_tokenised_again() -> None:
    letters = [token for letter in "soup" for token in encode(letter)]
    assert letters != encode("soup")
    engine = started(TextEngine(Chat))
    before = prompt_of(engine)
    _, _, info = emit(engine, [*letters, EOS])
    assert info["transcript"].response == "soup"
    assert prompt_of(engine)[: len(before) + 5] == [*before, *letters, EOS]


def test_a_dialogue_ends_with_its_turns_or_when_the_user_ends_it() -> None:
    engine = started(TextEngine(Chat))
    ends = [emit(engine, [5, EOS])[1] for _ in range(3)]
    assert ends == [False, False, True]
    assert [turn.role for turn in engine.turns[0]] == ["user", "agent"] * 3
    _, terminated, info = emit(started(TextEngine(Chat)), [*encode("stop"), EOS])
    assert terminated and info["transcript"].final


def test_a_conversation_that_outgrows_the_prompt_budget_ends_with_its_reward() -> None:
    size = len(encode("User: The food\nAgent:"))
    one = TextEngine(Chat, dataset=EXAMPLES[:1], max_prompt_tokens=size + 2)
    reward, terminated, info = emit(started(one), [5, EOS])
    assert (reward, terminated, info["transcript"].final) == (1.0, True, True)
    assert [turn.role for turn in one.turns[0]] == ["user", "agent"]
    assert prompt_of(one) == encode("User: The food\nAgent:")
    exact = size + 2 + len(encode("\nUser: Go on 850\nAgent:"))
    for budget, over in ((exact, False), (exact - 1, True)):
        engine = started(TextEngine(Chat, dataset=EXAMPLES[:1], max_prompt_tokens=budget))
        assert emit(engine, [5, EOS])[1] is over
        if not over:
            assert engine.turns[0][-1].text == "Go on 850"
            assert len(prompt_of(engine)) == budget


def test_replies_come_from_the_slots_own_generator() -> None:
    engine = started(TextEngine(Chat, 2))
    engine.step(np.array([EOS, EOS]), [np.random.default_rng(seed) for seed in (4, 5)])
    expected = [f"Go on {np.random.default_rng(seed).integers(1000)}" for seed in (4, 5)]
    assert [turns[-1].text for turns in engine.turns] == expected


def test_the_default_prompt_budget_has_room_for_every_turn() -> None:
    longest = max(len(encode(Chat().prompt(example))) for example in EXAMPLES)
    engine = TextEngine(Chat)
    assert engine.max_prompt_tokens >= longest + 2 * (engine.max_new_tokens + 8)
    assert TextEngine(Echo).max_prompt_tokens == max(len(encode(e.prompt)) for e in EXAMPLES)


def test_with_slots_shares_the_task_but_no_state() -> None:
    engine = started(TextEngine(Echo, 2))
    engine.step(np.array([5, 6]), rngs(2))
    other = started(engine.with_slots(3))
    other.step(np.array([7, 8, EOS]), rngs(3))
    assert other.examples is engine.examples and other.num_envs == 3
    assert engine.observations["response"][:, 0].tolist() == [5, 6]
    assert engine.observations["response_length"][:, 0].tolist() == [1, 1]
    assert len(engine.turns[0]) == 1


def test_a_deep_copy_goes_on_by_itself() -> None:
    engine = started(TextEngine(Echo))
    emit(engine, [5])
    twin = copy.deepcopy(engine)
    emit(twin, [6])
    assert twin.observations["response_length"][0, 0] == 2
    assert twin.observations["response"][0, :2].tolist() == [5, 6]
    assert engine.observations["response_length"][0, 0] == 1
    assert emit(twin, [EOS])[1]


@pytest.mark.parametrize("name", ["max_prompt_tokens", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "6", [6]])
def test_budgets_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{name} must be a positive integer.*{re.escape(str(value))}"
    ):
        TextEngine(Echo, **{name: value})


def test_a_prompt_over_the_budget_is_an_error_that_names_the_example() -> None:
    with pytest.raises(
        ValueError, match=r"example 1 .*max_prompt_tokens=3.*A small hotel"
    ) as error:
        TextEngine(Echo, max_prompt_tokens=3)
    assert "truncate_prompt='left'" in str(error.value)


def test_prompts_are_truncated_on_the_side_asked_for() -> None:
    ids = encode(EXAMPLES[1].prompt)
    for side, expected in (("left", ids[-3:]), ("right", ids[:3])):
        engine = TextEngine(Echo, max_prompt_tokens=3, truncate_prompt=side)  # type: ignore[arg-type]
        engine.reset(0, np.random.default_rng(0), 1)
        assert prompt_of(engine) == expected
    with pytest.raises(ValueError, match="'left' or 'right', but it is 'middle'"):
        TextEngine(Echo, truncate_prompt="middle")  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [-1, 3])
def test_an_unknown_example_is_an_error(example: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 3\) for split 'train', but it is {example}"):
        TextEngine(Echo).reset(0, np.random.default_rng(0), example)


def test_an_empty_prompt_is_one_token() -> None:
    engine = started(TextEngine(Echo, dataset=[Example("")]))
    assert prompt_of(engine) == [EOS]


def test_single_token_choices_take_one_step_and_no_eos() -> None:
    yes, no = encode(" good"), encode(" bad")
    assert len(yes) == len(no) == 1
    engine = started(TextEngine(Labels(("good", "bad"))))
    assert engine.max_new_tokens == 1
    assert engine.action_space.allowed_tokens == tuple(sorted(yes + no))
    reward, terminated, info = emit(engine, no)
    assert (reward, terminated, info["transcript"].response) == (1.0, True, "bad")


def test_choices_of_different_lengths_may_stop_early() -> None:
    choices = ("good", "a bad one indeed")
    engine = started(TextEngine(Labels(choices)))
    lengths = [len(encode(f" {choice}")) for choice in choices]
    assert engine.max_new_tokens == max(lengths) > min(lengths)
    assert engine.action_space.allowed_tokens is not None
    assert EOS in engine.action_space.allowed_tokens
    for choice in choices:
        engine.reset(0, np.random.default_rng(0), 0)
        reward, terminated, _ = emit(engine, engine.encode_response(choice).tolist())
        assert (reward, terminated) == (1.0, True)


def test_choices_that_do_not_fit_the_budget_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens=1 .*'a bad one indeed'"):
        TextEngine(Labels(("good", "a bad one indeed")), max_new_tokens=1)


def test_encode_response_fits_the_place_and_the_budget() -> None:
    engine = started(TextEngine(Echo))
    assert engine.encode_response("so good").tolist() == [*encode(" so good"), EOS]
    assert len(engine.encode_response("so good " * 9)) == 6
    glued = started(TextEngine(Echo, dataset=[Example("Say:\n")]))
    assert glued.encode_response("so good").tolist() == [*encode("so good"), EOS]


def test_terms_are_added_up_with_their_weights() -> None:
    half = CallableReward(lambda ts: [1.0] * len(ts), name="half", weight=0.5)
    engine = started(TextEngine(Echo, reward=["task", half, LengthPenalty(0.1)]))
    reward, _, info = emit(engine, [*encode("a"), EOS])
    assert info["reward_terms"] == {"task": 1.0, "half": 0.5, "length_penalty": -0.2}
    assert reward == pytest.approx(1.3)
