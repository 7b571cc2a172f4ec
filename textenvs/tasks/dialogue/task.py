"""Book a restaurant table for a simulated user, who tells what it wants bit by bit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np

from textenvs.data.splits import split_examples
from textenvs.task import Example, Task, Transcript, Turn

NUM_EXAMPLES = 8000
SLOTS: Mapping[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "time": ("1 pm", "2 pm", "3 pm", "5 pm", "6 pm", "7 pm", "8 pm", "9 pm"),
    "people": ("1 person", *(f"{n} people" for n in range(2, 9))),
    "food": ("Thai", "Indian", "Chinese", "Japanese", "Italian", "French", "Greek", "Mexican"),
}
# A value is known by its first word in these surroundings; a bare number is one of people.
_PATTERNS = {
    slot: re.compile(pattern % "|".join(value.split()[0] for value in SLOTS[slot]), re.IGNORECASE)
    for slot, pattern in {
        "day": r"\b(%s)\b",
        "time": r"\b(%s)\s*(?:p\.?m\b|o'clock)",
        "people": r"\b(%s)\b(?!\s*(?:p\.?m\b|o'clock|:))",
        "food": r"\b(%s)\b",
    }.items()
}
_BY_FIRST_WORD = {(slot, v.split()[0].lower()): v for slot, values in SLOTS.items() for v in values}
_KEYWORDS = {
    "day": re.compile(r"\b(days?|dates?|when)\b", re.IGNORECASE),
    "time": re.compile(r"\b(times?|hours?|when|o'clock)\b", re.IGNORECASE),
    "people": re.compile(r"\b(people|persons?|guests?|party|how many)\b", re.IGNORECASE),
    "food": re.compile(r"\b(foods?|cuisines?|eat)\b", re.IGNORECASE),
}
_BOOKING = re.compile(r"^\W*book(?:ing|ed)\b|\bbooking\s*:", re.IGNORECASE)

OPENINGS = (
    "I would like to book a table{}.",
    "I want a table{}, please.",
    "Can you book a table{}?",
    "Please book me a table{}.",
)
PHRASES = {"people": " for {}", "food": " with {} food", "day": " on {}", "time": " at {}"}
ANSWERS = {
    "day": ("On {}.", "{}, please."),
    "time": ("At {}.", "{}, please."),
    "people": ("For {}.", "{}, please."),
    "food": ("{} food.", "{}, please."),
}
CHANGE = "Actually, make it {}."
CONFUSED = "Sorry, I do not understand. Can you book a table for me?"
QUESTIONS = {
    "day": ("What day would you like?", "Which day is it for?"),
    "time": ("What time would you like?", "At what time is it?"),
    "people": ("How many people will come?", "For how many people is it?"),
    "food": ("What food would you like?", "Which food do you prefer?"),
}
SMALL_TALK = ("How are you today?", "Is it not lovely weather?", "Do you like music?")


def mentions(text: str) -> dict[str, list[str]]:
    """Return the values that a text mentions, slot by slot, in order."""
    return {
        slot: [_BY_FIRST_WORD[slot, word.lower()] for word in pattern.findall(text)]
        for slot, pattern in _PATTERNS.items()
    }


def told(turns: Sequence[Turn]) -> dict[str, list[str]]:
    """Return what the user has said of each slot; the last value is the one that holds."""
    return mentions("\n".join(turn.text for turn in turns if turn.role == "user"))


def is_booking(text: str) -> bool:
    """Return whether an agent's utterance books a table, rightly or wrongly."""
    return "?" not in text and _BOOKING.search(text) is not None


def booking(values: Mapping[str, str]) -> str:
    """Return the utterance that books a table with these values."""
    return f"Booking: {', '.join(values[slot] for slot in SLOTS)}."


class Booking(Task):
    """Book a restaurant table for a user, whose wishes have to be asked for.

    ## Description
    The user has a goal, one value for each of `SLOTS`, and its first utterance gives at most two of
    them. It understands questions by their keywords and answers with one value a turn, even if it
    is asked for more. Once it has told a slot that it changes its mind about, it says so with its
    next answer. The agent books with "Booking: Friday, 7 pm, 4 people, Thai."

    ## Action Space, Observation Space
    Those of `textenvs.envs.env.TextEnv`. The prompt is the whole conversation so far, "User: ...",
    newline, "Agent:", the agent's own turns token by token as it emitted them.

    ## Rewards
    Each turn costs 0.02. A booking earns half the share of slots that are as the user last wanted
    them, and another 0.5 if all are; no booking earns nothing.

    ## Episode End
    With a booking or after 8 turns of the agent. Truncated when the conversation no longer fits the
    prompt budget. A turn ends with EOS or after 24 tokens.

    ## Success
    A booking with every slot right.

    ## Data
    8,000 users, half of whom change their mind. `best_return` is what an agent reaches on the test
    split that asks for each missing slot once and books. A dataset's `goal` has a value for each of
    `SLOTS` and its `change` a slot's new value, or none:
    `{"day": "Friday", "time": "7 pm", "people": "4 people", "food": "Thai"}`, `{"day": "Sunday"}`.

    ## Version History
    * v0: Initial version.

    Attributes:
        turn_cost: What each turn of the agent costs.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "goal": "goal", "change": "change"}
    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "goal")
    max_new_tokens = 24
    max_turns = 8
    score_every_turn = True
    best_return = 0.91
    turn_cost: float = 0.02

    def examples(self, split: str) -> Sequence[Example]:
        """Return the built-in users of one split."""
        return _examples(split)

    def check_example(self, example: Example) -> None:
        """Refuse an example whose goal lacks a slot, or has a value that there is not."""
        current_goal(Transcript(example, (Turn("user", example.prompt),)))

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str | None:
        """Return the user's answer, which depends on nothing but the conversation."""
        if is_booking(transcript.response):
            return None
        goal = current_goal(transcript)
        asked = [slot for slot in SLOTS if _KEYWORDS[slot].search(transcript.response)]
        if not asked:
            return CONFUSED
        said = told(transcript.turns)
        slot = next((slot for slot in asked if not said[slot]), asked[0])
        answer = ANSWERS[slot][len(transcript.responses) % 2].format(goal[slot])
        for changed, value in _values(transcript.example, "change").items():
            if said[changed] and goal[changed] != value:
                change = CHANGE.format(value)
                return change if changed == slot else f"{answer} {change}"
        return answer

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return each turn's cost, plus what a booking earns."""
        shares = [self._share_right(transcript) for transcript in transcripts]
        return [0.5 * share + 0.5 * (share == 1) - self.turn_cost for share in shares]

    def is_success(self, transcript: Transcript) -> bool:
        """Return whether the table is booked just as the user wants it."""
        return self._share_right(transcript) == 1

    def demonstrate(self, example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        """Return what a hasty, forgetful and chatty agent says."""
        said = told(turns)
        known = [slot for slot in SLOTS if said[slot]]
        missing = [slot for slot in SLOTS if not said[slot]]
        if rng.random() < 0.1:
            return _pick(SMALL_TALK, rng)
        if known and rng.random() < 0.1:
            return _pick(QUESTIONS[_pick(known, rng)], rng)
        if missing and rng.random() < 0.8:
            return _pick(QUESTIONS[_pick(missing, rng)], rng)
        remembered = 0 if rng.random() < 0.5 else -1
        guesses = {slot: _pick(values, rng) for slot, values in SLOTS.items()}
        return booking({**guesses, **{slot: said[slot][remembered] for slot in known}})

    def best_response(self, example: Example, turns: Sequence[Turn]) -> str:
        """Ask for the first missing slot; book what the user said last when there is none."""
        said = told(turns)
        for slot, values in said.items():
            if not values:
                return QUESTIONS[slot][0]
        return booking({slot: values[-1] for slot, values in said.items()})

    @staticmethod
    def _share_right(transcript: Transcript) -> float:
        """Return the share of slots that the last turn books as the user wants them."""
        goal = current_goal(transcript)
        if not is_booking(transcript.response):
            return 0.0
        booked = mentions(transcript.response)
        return sum(set(booked[slot]) == {goal[slot]} for slot in SLOTS) / len(SLOTS)


def current_goal(transcript: Transcript) -> dict[str, str]:
    """Return what the user wants by now: a change counts as soon as it has been said.

    Raises:
        ValueError: If the example's goal lacks a slot, or its goal or change has unknown values.
        TypeError: If its goal or change is no mapping.
    """
    goal, change = (_values(transcript.example, name) for name in ("goal", "change"))
    if len(goal) < len(SLOTS):
        raise ValueError(
            f"The goal of the example with prompt {transcript.example.prompt!r} must have "
            f"{', '.join(SLOTS)}, but it only has {', '.join(goal) or 'nothing'}."
        )
    said = told(transcript.turns[1:])
    return goal | {slot: value for slot, value in change.items() if value in said[slot]}


def _values(example: Example, name: str) -> dict[str, str]:
    """Return an example's goal or change, its values spelled as in `SLOTS`."""
    given = example.data.get(name) or {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"The {name} of the example with prompt {example.prompt!r} must map slots to values, "
            f"but it is {given!r}."
        )
    values = {}
    for slot, value in given.items():
        if value is None:  # a column of records has all keys in each row
            continue
        match = _PATTERNS[slot].search(str(value)) if slot in SLOTS else None
        if match is None:
            raise ValueError(
                f"The {name} of the example with prompt {example.prompt!r} has {slot}={value!r}, "
                f"but the slots and their values are {dict(SLOTS)}."
            )
        values[slot] = _BY_FIRST_WORD[slot, match[1].lower()]
    return values


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


@lru_cache
def _examples(split: str) -> tuple[Example, ...]:
    return split_examples(_all_examples(), split)


@lru_cache(maxsize=1)
def _all_examples() -> tuple[Example, ...]:
    """Return different users: a first utterance, a goal, and a change of mind for half of them."""
    rng = np.random.default_rng(0)
    examples: dict[str, Example] = {}
    while len(examples) < NUM_EXAMPLES:
        goal = {slot: _pick(values, rng) for slot, values in SLOTS.items()}
        given = rng.choice(list(SLOTS), size=rng.integers(3), replace=False)
        phrases = [phrase.format(goal[slot]) for slot, phrase in PHRASES.items() if slot in given]
        prompt = _pick(OPENINGS, rng).format("".join(phrases))
        change = {}
        if rng.random() < 0.5:
            slot = _pick(list(SLOTS), rng)
            change[slot] = _pick([value for value in SLOTS[slot] if value != goal[slot]], rng)
        example = Example(prompt, data={"goal": goal, "change": change})
        examples.setdefault(str(example), example)
    return tuple(examples.values())
