"""Text classification: the response is a label."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from textenvs.data.preparation import check_choices
from textenvs.data.splits import split_examples
from textenvs.task import Example, Task, Transcript, Turn
from textenvs.tasks.classification.reviews import sample_review

NUM_REVIEWS = 8000
DEMONSTRATION_ACCURACY = 0.9
# If so many of a dataset's labels are the task's own, the others are mistakes.
OWN_SHARE = 0.9
# A label that occurs once and is spelled nearly as one that occurs so often is a mistake.
OFTEN = 10


class TextClassification(Task):
    """Say whether a short review is negative or positive.

    ## Description
    The agent reads two or three sentences about a hotel, a film, a book, a restaurant or a phone,
    and answers with one of the labels. What counts is the overall verdict, which may be negated
    ("it was far from great") or stand against someone's opinion ("a friend called it boring, but it
    was not"), while other clauses praise or blame single aspects. Every word is about as frequent
    in positive as in negative reviews, so counting words does not solve it.

    ## Action Space, Observation Space
    Those of `textenvs.envs.env.TextEnv`. The prompt is "Review: ...", newline, "Sentiment:"
    (`gym.make(..., template=...)` puts another text around it). The space's `choices` are the
    labels as tokens, each after a space, and a policy says nothing else.

    ## Rewards
    1.0 if the response is the label, else 0.0.

    ## Episode End
    After as many tokens as the longest label has; with EOS after a shorter one. The tokenizer must
    give each label back as it is, which is checked when the environment is made.

    ## Success
    The response is the label.

    ## Data
    8,000 distinct reviews, half of them positive. A user's dataset has the columns `text` and
    `label`; a label is one of the choices or its index. Without given choices they are taken from
    the data where these have other labels than "negative" and "positive": the different labels of
    all its splits, in alphabetical order, or the class names that a `datasets.Dataset` knows.

    ## Arguments
    * `choices`: The labels, in the order in which whole numbers count them. Two for the built-in
      reviews, the negative one first; a user's dataset may have more. `gym.make(..., choices=...)`
      gives them, too. None: "negative" and "positive", or what the data say.

    ## Version History
    * v0: Initial version.

    Raises:
        ValueError: If the choices are not at least two different words.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "text", "label": "label"}
    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "label")
    best_return = 1.0
    success_score = 1.0
    template = "Review: {prompt}\nSentiment:"
    choices: Sequence[str]

    def __init__(self, choices: Sequence[str] | None = None) -> None:
        self._given = choices is not None
        self._numbers_are_names = False
        self.choices = ("negative", "positive") if choices is None else check_choices(choices)

    def examples(self, split: str) -> Sequence[Example]:
        """Return the built-in reviews of one split.

        Raises:
            ValueError: If there are more or less than two choices.
        """
        if len(self.choices) != 2:
            raise ValueError(
                "The built-in reviews have two labels, negative and positive, but choices has "
                f"{len(self.choices)}: pass dataset=... for other labels."
            )
        return _examples(tuple(self.choices), split)

    def adapt_to(self, examples: Sequence[Example], class_names: Sequence[str] | None) -> Task:
        """Return a task whose choices are the labels of the examples, if its own are others."""
        counts = Counter(
            label for label in (e.data.get("label") for e in examples) if _is_label(label)
        )
        own = sum(count for label, count in counts.items() if self._choice(label) is not None)
        if self._given or not counts or own >= OWN_SHARE * len(examples):
            return self
        other = copy.copy(self)
        other._numbers_are_names = class_names is None
        other.choices = check_choices(_labels(counts) if class_names is None else class_names)
        return other

    def check_example(self, example: Example) -> None:
        """Refuse an example without a label that is one of the choices or its index."""
        self.label(example)

    def label(self, example: Example) -> str:
        """Return the example's label as one of the choices.

        Raises:
            ValueError: If it is neither a choice nor the index of one.
        """
        label = example.data.get("label")
        choice = self._choice(label)
        if choice is None:
            close = get_close_matches(str(label), self.choices, n=1)
            raise ValueError(
                f"A label must be one of {', '.join(map(repr, self.choices))} or a whole number "
                f"from 0 to {len(self.choices) - 1}, but that of {example.prompt!r} is {label!r}. "
                + (f"Did you mean {close[0]!r}? " if close else "")
                + "Other labels are given by choices=(...)."
            )
        return choice

    def _choice(self, label: Any) -> str | None:
        """Return the choice that a label stands for: its name, or its index."""
        if isinstance(label, str) or (self._numbers_are_names and _is_label(label)):
            label = str(label).strip()
            if label in self.choices or self._numbers_are_names:
                return label if label in self.choices else None
        # A CSV file has its numbers as text.
        index = int(label) if isinstance(label, str) and label.isdecimal() else label
        if isinstance(index, (int, np.integer)) and 0 <= index < len(self.choices):
            return self.choices[int(index)]
        return None

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return 1.0 for each response that is the label, else 0.0."""
        return [float(t.response == self.label(t.example)) for t in transcripts]

    def is_well_formed(self, transcript: Transcript) -> bool:
        """Return whether the response is one of the labels."""
        return transcript.response in self.choices

    def demonstrate(self, example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        """Return the label with probability 0.9, else another one: a warm start is not perfect."""
        label = self.label(example)
        if rng.random() < DEMONSTRATION_ACCURACY:
            return label
        others = [choice for choice in self.choices if choice != label]
        return others[int(rng.integers(len(others)))]

    def best_response(self, example: Example, turns: Sequence[Turn]) -> str:
        """Return the label."""
        return self.label(example)


def _is_label(value: Any) -> bool:
    """Return whether a value can name a class: a text or a whole number."""
    return isinstance(value, (str, int, np.integer))


def _labels(counts: Counter[Any]) -> list[str]:
    """Return the different labels in order, without those that are misspelled."""
    names: Counter[str] = Counter()
    for label, count in counts.items():
        names[str(label).strip()] += count
    del names[""]
    often = [name for name, count in names.items() if count >= OFTEN]
    labels = [n for n in names if names[n] > 1 or not get_close_matches(n, often, 1, 0.8)]
    numbers = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if numbers else sorted(labels)


@lru_cache(maxsize=6)
def _examples(labels: tuple[str, ...], split: str) -> tuple[Example, ...]:
    reviews = ((review, labels[positive]) for review, positive in _reviews())
    examples = [Example(review, (label,), {"label": label}) for review, label in reviews]
    return split_examples(examples, split)


@lru_cache(maxsize=1)
def _reviews() -> tuple[tuple[str, bool], ...]:
    """Return distinct reviews and whether they are positive, which every other one is."""
    rng = np.random.default_rng(0)
    reviews: dict[str, bool] = {}
    while len(reviews) < NUM_REVIEWS:
        positive = len(reviews) % 2 == 1
        reviews.setdefault(sample_review(positive, rng), positive)
    return tuple(reviews.items())
