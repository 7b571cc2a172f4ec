"""Choices: the same tokens after every prompt, and nothing that the tokenizer changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.textenvs.tokenizers import KINDS, tokenizer_of
from textenvs import Example, Task, Transcript
from textenvs.constraints import AllOf, ChoiceConstraint
from textenvs.envs.engine import TextEngine
from textenvs.text.codec import TextCodec

ENDS = ("\n", ":", " ", "")
ROWS = tuple(
    Example(f"Is it good?{end}", (label,)) for end in ENDS for label in ("yes", "no, bye (ok)")
)


class Labels(Task):
    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = choices

    def examples(self, split: str) -> Sequence[Example]:
        return ROWS if split == "train" else ROWS[::-1]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response in t.references) for t in transcripts]


def choices_of(kind: str) -> tuple[str, ...]:
    """Two labels as the tokenizer writes them."""
    codec = TextCodec(tokenizer_of(kind))
    return tuple(codec.given_back(text) for text in ("yes", "no, bye (ok)"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separator", [None, ""])
def test_choices_hold_after_every_prompt_of_every_split(kind: str, separator: str | None) -> None:
    codec = TextCodec(tokenizer_of(kind), separator=separator)
    engines = [
        TextEngine(Labels(choices_of(kind)), 1, tokenizer=codec, split=split)
        for split in ("train", "test")
    ]
    engine = engines[0]
    assert engine.action_space == engines[1].action_space
    assert engine.action_space.choices is not None
    constraint = ChoiceConstraint(engine.action_space.choices, engine.eos_token_id)
    for i in range(len(ROWS)):
        engine.reset(0, np.random.default_rng(0), i)
        tokens = engine.encode_response(ROWS[i].references[0])
        state = constraint.start(np.array([1]))
        for token in tokens.tolist():
            assert token in (constraint.allowed(state) or ())
            state = constraint.advance(state, token)
        rewards, _, ((_, info),) = engine.respond([0], [tokens], [np.random.default_rng(0)])
        assert rewards[0] == 1.0 and info["transcript"].response in choices_of(kind)


@pytest.mark.parametrize(
    ("kind", "choice", "given_back"),
    [
        ("wordpiece", "Positive", "positive"),
        ("wordpiece", "sci/tech", "sci / tech"),
        ("unigram", "ﬁne", "fine"),
        ("byte level", " yes", "yes"),
        ("byte level", "yes</s>", None),
        ("byte level", "yes\n", "yes"),
    ],
)
def test_a_choice_that_the_tokenizer_changes_is_an_error(
    kind: str, choice: str, given_back: str | None
) -> None:
    make: Any = lambda *more: TextEngine(  # noqa: E731
        Labels((choice, "no")), tokenizer=tokenizer_of(kind), **dict(more)
    )
    if given_back is None:
        assert make().encode_response  # text is text, also in a label
        return
    with pytest.raises(ValueError, match=f"gives back '{given_back}' for the choice"):
        make()


def test_a_choice_that_ends_too_early_is_an_error() -> None:
    with pytest.raises(ValueError, match="gives back 'no' for the choice 'no, bye'"):
        TextEngine(Labels(("yes", "no, bye")), stop=",")


def test_the_prefix_tree() -> None:
    tree = ChoiceConstraint([(5, 6), (5, 6, 7), (8,)], 0)
    state = tree.start(np.array([1]))
    assert tree.allowed(state) == [5, 8]
    assert tree.allowed(tree.advance(state, 8)) == [0]
    six = tree.advance(tree.advance(state, 5), 6)
    assert tree.allowed(six) == [0, 7] and tree.allowed(tree.advance(six, 7)) == [0]
    assert tree.allowed(tree.advance(tree.advance(six, 0), 5)) is None
    full = ChoiceConstraint([(5, 6), (8, 9)], None)
    assert full.allowed(full.advance(full.advance((), 5), 6)) is None
    both: Any = AllOf([tree, ChoiceConstraint([(8,), (9,)], 0), ChoiceConstraint([], None)])
    state = both.start(np.array([1]))
    assert both.allowed(state).tolist() == [8]
    assert both.allowed(both.advance(state, 8)).tolist() == [0]
    assert both.allowed(both.advance(state, 1)) is None
