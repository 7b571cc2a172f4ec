"""Booking: what the user says and understands, what a booking earns, how good the scripts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from textenvs.task import SPLITS, Example, Transcript, Turn
from textenvs.tasks.dialogue import task as dialogue
from textenvs.tasks.dialogue.task import (
    CONFUSED,
    SLOTS,
    Booking,
    booking,
    current_goal,
    is_booking,
    mentions,
)

TASK = Booking()
GOAL = {"day": "Friday", "time": "7 pm", "people": "4 people", "food": "Thai"}
RIGHT = "Booking: Friday, 7 pm, 4 people, Thai."
Agent = Callable[[Example, Sequence[Turn]], str]


def user(prompt: str = "I want a table.", **change: str) -> Example:
    return Example(prompt, data={"goal": GOAL, "change": change})


def converse(example: Example, agent: Agent) -> tuple[Transcript, float]:
    """Play an episode as the environment does; return its end and its return."""
    turns: tuple[Turn, ...] = (Turn("user", example.prompt),)
    total = 0.0
    while True:
        turns = (*turns, Turn("agent", agent(example, turns)))
        last = len(turns) // 2 == TASK.max_turns
        transcript = Transcript(example, turns, final=False)
        reply = None if last else TASK.reply(transcript, np.random.default_rng(0))
        transcript = Transcript(example, turns, final=reply is None)
        total += TASK.score([transcript])[0]
        if reply is None:
            return transcript, total
        turns = (*turns, Turn("user", reply))


def say(*utterances: str) -> Agent:
    """Return an agent that says these things in turn, and the last one ever after."""
    return lambda example, turns: utterances[min(len(turns) // 2, len(utterances) - 1)]


def replies(example: Example, *utterances: str) -> list[str]:
    """Return what the user says to these utterances, followed by a booking."""
    transcript, _ = converse(example, say(*utterances, RIGHT))
    return [turn.text for turn in transcript.turns[2:] if turn.role == "user"]


def test_splits_are_disjoint_and_examples_distinct_and_deterministic() -> None:
    splits = [[str(example) for example in TASK.examples(split)] for split in SPLITS]
    assert len(set().union(*splits)) == sum(map(len, splits)) == dialogue.NUM_EXAMPLES
    dialogue._all_examples.cache_clear()
    assert [[str(e) for e in Booking().examples(split)] for split in SPLITS] == splits
    with pytest.raises(ValueError, match="train, validation, test"):
        TASK.examples("dev")


def test_first_utterance_gives_up_to_two_right_values() -> None:
    counts = set()
    for example in TASK.examples("validation"):
        values = mentions(example.prompt)
        assert all(values[slot] in ([], [example.data["goal"][slot]]) for slot in SLOTS)
        counts.add(sum(map(len, values.values())))
        assert all(example.data["goal"][slot] != v for slot, v in example.data["change"].items())
    assert counts == {0, 1, 2}


def test_prompt_names_the_speakers() -> None:
    assert TASK.prompt(user()) == "User: I want a table.\nAgent:"


@pytest.mark.parametrize(
    ("question", "value"),
    [
        ("What day would you like?", "Friday"),
        ("which DATE", "Friday"),
        ("At what time?", "7 pm"),
        ("At what hours?", "7 pm"),
        ("How many of you?", "4 people"),
        ("For how many people is it?", "4 people"),
        ("And the size of your party?", "4 people"),
        ("What would you like to eat?", "Thai"),
        ("Any cuisine you prefer?", "Thai"),
        ("Is your booking for a day in May?", "Friday"),
    ],
)
def test_user_answers_questions(question: str, value: str) -> None:
    (answer,) = replies(user(), question)
    assert value in answer
    assert sum(map(len, mentions(answer).values())) == 1


@pytest.mark.parametrize("utterance", ["", "Do you like music?", "Sunday's birthdays", "Book it?"])
def test_user_does_not_understand_the_rest(utterance: str) -> None:
    assert replies(user(), utterance) == [CONFUSED]


def test_scripted_questions_are_understood_and_small_talk_is_not() -> None:
    for slot, questions in dialogue.QUESTIONS.items():
        for question in questions:
            (answer,) = replies(user(), question)
            assert [known for known, values in mentions(answer).items() if values] == [slot]
    assert all(replies(user(), text) == [CONFUSED] for text in dialogue.SMALL_TALK)


def test_user_answers_one_slot_a_turn_and_the_untold_first() -> None:
    answers = replies(user("A table for 4 people?"), *["When, for how many, what food?"] * 3)
    assert [GOAL[slot] in answers[i] for i, slot in enumerate(("day", "time", "food"))] == [
        True
    ] * 3
    assert [sum(map(len, mentions(answer).values())) for answer in answers] == [1, 1, 1]
    assert "4 people" in replies(user("A table for 4 people?"), "How many people?")[0]


def test_change_comes_after_the_first_value_was_told_and_only_once() -> None:
    example = user(day="Sunday")
    first, second, third = replies(example, "What day?", "What time?", "How many people?")
    assert (mentions(first)["day"], "Actually" in first) == (["Friday"], False)
    assert second.endswith(" Actually, make it Sunday.") and "7 pm" in second
    assert "4 people" in third and "Actually" not in third
    assert replies(example, "What day?", "Which day again?")[1] == "Actually, make it Sunday."


def test_change_counts_once_it_was_said() -> None:
    example, sunday = user(day="Sunday"), RIGHT.replace("Friday", "Sunday")
    heard = ("What day?", "What time?")
    assert TASK.is_success(converse(example, say(*heard, sunday))[0])
    assert not TASK.is_success(converse(example, say(*heard, RIGHT))[0])
    unheard = ("What time?", "What day?")
    assert TASK.is_success(converse(example, say(*unheard, RIGHT))[0])
    assert not TASK.is_success(converse(example, say(*unheard, sunday))[0])


@pytest.mark.parametrize(
    ("utterance", "earned"),
    [
        (RIGHT, 1.0),
        ("booking friday 7PM for 4, thai food", 1.0),
        ("Great! Booking: a Thai table for 4 at 7 p.m. on Friday", 1.0),
        ("Booked: 4 persons, Friday, 7 o'clock, Thai", 1.0),
        ("Booking: Friday, 7 pm, 4 people, Greek.", 0.375),
        ("Booking: Friday, 7 pm, 5 people, Greek.", 0.25),
        ("Booking: Friday, 6 pm, 5 people, Greek.", 0.125),
        ("Booking: Sunday, 6 pm, 5 people, Greek.", 0.0),
        ("Booking: Friday, 7 pm, 4 people.", 0.375),
        ("Booking: Friday, Sunday, 7 pm, 4 people, Thai.", 0.375),  # no fishing
        ("Booking:", 0.0),
        ("Friday, 7 pm, 4 people, Thai.", 0.0),  # says nothing about booking
    ],
)
def test_what_a_booking_earns(utterance: str, earned: float) -> None:
    transcript = Transcript(user(), (Turn("user", "I want a table."), Turn("agent", utterance)))
    assert TASK.score([transcript]) == pytest.approx([earned - 0.02])
    assert TASK.is_success(transcript) == (earned == 1.0)


def test_only_the_users_words_count_as_told() -> None:
    transcript, total = converse(user(), say("What day?\nUser: 7 pm, 4 people, Thai.", RIGHT))
    assert "Friday" in transcript.turns[2].text
    assert total == pytest.approx(1 - 2 * 0.02)


def test_each_turn_costs_and_no_booking_earns_nothing() -> None:
    transcript, total = converse(user(), say("Do you like music?"))
    assert len(transcript.responses) == TASK.max_turns
    assert total == pytest.approx(-0.02 * TASK.max_turns)
    assert not TASK.is_success(transcript)


def test_booking_ends_the_conversation_and_questions_about_it_do_not() -> None:
    assert replies(user(), RIGHT) == []
    assert booking(GOAL) == RIGHT and is_booking(RIGHT)
    assert is_booking("I am booking: Friday") and not is_booking("Booking for what day?")
    assert not is_booking("What day would you like to book?")


def test_replies_do_not_use_the_generator() -> None:
    example = TASK.examples("train")[0]
    transcript = Transcript(example, (Turn("user", example.prompt), Turn("agent", "When?")))
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert TASK.reply(transcript, rng) == TASK.reply(transcript, rng)
    assert rng.bit_generator.state == state


def test_best_response_reaches_best_return_and_demonstrations_are_worse() -> None:
    rng = np.random.default_rng(0)
    examples = TASK.examples("test")
    best = [converse(example, TASK.best_response) for example in examples]
    shown = [converse(e, lambda e, turns: TASK.demonstrate(e, turns, rng)) for e in examples]
    assert TASK.best_return is not None
    mean = np.mean([total for _, total in best])
    assert TASK.best_return <= mean < TASK.best_return + 0.01
    assert all(TASK.is_success(transcript) for transcript, _ in best)
    changed = [
        current_goal(transcript) != transcript.example.data["goal"] for transcript, _ in best
    ]
    assert 0.2 < np.mean(changed) < 0.5
    assert 0.3 < np.mean([total for _, total in shown]) < mean - 0.3
    assert 0.3 < np.mean([TASK.is_success(transcript) for transcript, _ in shown]) < 0.6
    for transcript, total in (*best, *shown):
        assert -0.02 * TASK.max_turns <= total <= 1 - 0.02
        for turn in transcript.turns:
            assert len(turn.text.split()) <= {"agent": 12, "user": 15}[turn.role], turn.text


def test_scripts_use_only_what_was_said() -> None:
    turns = (Turn("user", "Table at 6 pm?"), Turn("agent", "When?"), Turn("user", "On Monday."))
    mine, other = user(), Example("", data={"goal": dict(GOAL, day="Sunday"), "change": {}})
    assert TASK.best_response(mine, turns) == TASK.best_response(other, turns)
    for seed in range(20):
        mine_says, other_says = (
            TASK.demonstrate(example, turns, np.random.default_rng(seed))
            for example in (mine, other)
        )
        assert mine_says == other_says


def test_demonstrator_books_too_early_forgets_changes_and_chats() -> None:
    example = user(RIGHT.removeprefix("Booking: "), day="Sunday")
    turns = [Turn("user", example.prompt), Turn("agent", "When?"), Turn("user", "Make it Sunday.")]
    rng = np.random.default_rng(0)
    complete = {TASK.demonstrate(example, turns, rng) for _ in range(200)}
    assert {text for text in complete if is_booking(text)} == {
        RIGHT,
        RIGHT.replace("Friday", "Sunday"),
    }
    assert complete > set(dialogue.SMALL_TALK)
    early = [TASK.demonstrate(user(), [Turn("user", "Hello.")], rng) for _ in range(200)]
    assert 10 < len({text for text in early if is_booking(text)}) < 80


def test_a_users_own_goals_may_be_spelled_otherwise() -> None:
    goal: dict[str, Any] = {"day": "friday", "time": "7PM", "people": 4, "food": "thai"}
    change = {"day": None, "time": "8 p.m.", "people": None, "food": None}
    example = Example("Hello, 7 pm?", data={"goal": goal, "change": change})
    transcript, total = converse(example, TASK.best_response)
    assert transcript.response == "Booking: Friday, 8 pm, 4 people, Thai."
    assert total == pytest.approx(1 - 4 * 0.02)
    without_change = Example("Hello", data={"goal": goal})
    assert TASK.is_success(converse(without_change, TASK.best_response)[0])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"goal": dict(GOAL, food="Martian")}, ValueError, "food='Martian'.*Thai"),
        ({"goal": dict(GOAL, wine="red")}, ValueError, "wine='red'"),
        ({"goal": {"day": "Friday"}}, ValueError, "must have day, time, people, food"),
        ({"goal": GOAL, "change": {"time": "noon"}}, ValueError, "change.*time='noon'"),
        ({"goal": "Friday at 7"}, TypeError, "map slots to values"),
    ],
)
def test_impossible_goals_are_named(
    data: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    example = Example("Hello", data=data)
    transcript = Transcript(example, (Turn("user", "Hello"), Turn("agent", "When?")))
    for method in (
        lambda: TASK.reply(transcript, np.random.default_rng(0)),
        lambda: TASK.score([transcript]),
    ):
        with pytest.raises(error, match=message):
            method()
