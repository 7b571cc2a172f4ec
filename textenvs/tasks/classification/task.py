"""Text classification: the response is a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np

from textenvs.data.splits import split_examples
from textenvs.task import Example, Task, Transcript, Turn
from textenvs.tasks.classification.reviews import sample_review

NUM_REVIEWS = 4000
DEMONSTRATION_ACCURACY = 0.9


class TextClassification(Task):
    """Say whether a short review is negative or positive.

    ## Description
    The agent reads two or three sentences about a hotel, a film, a book, a restaurant or a phone,
    and answers with one of the labels. What counts is the overall verdict, which may be negated
    ("it was far from great") or stand against someone's opinion ("a friend called it boring, but it
    was not"), while other clauses praise or blame single aspects. Every word is about as frequent
    in positive as in negative reviews, so counting words does not solve it.

    ## Action Space, Observation Space
    Those of `textenvs.envs.env.TextEnv`. The prompt is "Review: ...", newline, "Sentiment:". The
    space's `choices` are the labels as tokens, each after a space, and a policy says nothing else.

    ## Rewards
    1.0 if the response is the label, else 0.0.

    ## Episode End
    After as many tokens as the longest label has; with EOS after a shorter one. The tokenizer must
    give each label back as it is, which is checked when the environment is made.

    ## Success
    The response is the label.

    ## Data
    4,000 distinct reviews, half of them positive. A user's dataset has the columns `text` and
    `label`; a label is one of the choices or its index.

    ## Arguments
    * `choices`: The labels, in the order in which whole numbers count them. Two for the built-in
      reviews, the negative one first; a user's dataset may have more.

    ## Version History
    * v0: Initial version.

    Raises:
        ValueError: If the choices are not at least two different words.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "text", "label": "label"}
    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "label")
    best_return = 1.0
    choices: Sequence[str]

    def __init__(self, choices: Sequence[str] = ("negative", "positive")) -> None:
        if isinstance(choices, str) or len(set(choices)) < max(2, len(choices)):
            raise ValueError(f"choices must be two or more different labels, not {choices!r}.")
        self.choices = tuple(choices)

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
        labelled = tuple(
            Example(review, (self.choices[positive],), {"label": self.choices[positive]})
            for review, positive in _reviews()
        )
        return split_examples(labelled, split)

    def prompt(self, example: Example) -> str:
        """Return the review and the request for its label."""
        return f"Review: {example.prompt}\nSentiment:"

    def label(self, example: Example) -> str:
        """Return the example's label as one of the choices.

        Raises:
            ValueError: If it is neither a choice nor the index of one.
        """
        label = example.data.get("label")
        if label in self.choices:
            return str(label)
        # A CSV file has its numbers as text.
        index = int(label) if isinstance(label, str) and label.isdecimal() else label
        if isinstance(index, (int, np.integer)) and 0 <= index < len(self.choices):
            return self.choices[int(index)]
        raise ValueError(
            f"A label must be one of {', '.join(map(repr, self.choices))} or a whole number from 0 "
            f"to {len(self.choices) - 1}, but that of {example.prompt!r} is {label!r}. Set the "
            "labels with TextClassification(choices=...)."
        )

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return 1.0 for each response that is the label, else 0.0."""
        return [float(t.response == self.label(t.example)) for t in transcripts]

    def is_success(self, transcript: Transcript) -> bool:
        """Return whether the response is the label."""
        return transcript.response == self.label(transcript.example)

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


@lru_cache(maxsize=1)
def _reviews() -> tuple[tuple[str, bool], ...]:
    """Return distinct reviews and whether they are positive, which every other one is."""
    rng = np.random.default_rng(0)
    reviews: dict[str, bool] = {}
    while len(reviews) < NUM_REVIEWS:
        positive = len(reviews) % 2 == 1
        reviews.setdefault(sample_review(positive, rng), positive)
    return tuple(reviews.items())
