"""A task put together from examples and a function, without a class of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from textenvs.data.splits import split_examples
from textenvs.task import Example, ScoreFunction, Task, Transcript

# With fewer examples, a tenth of them is no split.
FEWEST_TO_SPLIT = 20


class FunctionTask(Task):
    """What `register_task(id, examples=..., score=...)` registers.

    Args:
        examples: All examples.
        score: Scores a batch of transcripts.
        **attributes: Attributes of `Task`, such as `max_new_tokens`.

    Raises:
        TypeError: If a task has no such attribute, or an example is none.
    """

    def __init__(
        self, examples: Sequence[Example], score: ScoreFunction, **attributes: Any
    ) -> None:
        self._examples = tuple(examples)
        for example in self._examples:
            if not isinstance(example, Example):
                raise TypeError(f"examples must be textenvs.Example objects, not {example!r}.")
        if len(self._examples) < FEWEST_TO_SPLIT:
            gym.logger.warn(
                f"A task of {len(self._examples)} examples, fewer than {FEWEST_TO_SPLIT}, has the "
                "same ones for training, validation and test: what it reaches on held-out data "
                "says nothing. Give it more examples, or held-out data of their own (dataset=)."
            )
        self._score = score
        for name, value in attributes.items():
            if not hasattr(Task, name):
                raise TypeError(f"A Task has no attribute {name!r}.")
            setattr(self, name, value)

    def examples(self, split: str) -> Sequence[Example]:
        """Return 80, 10 and 10 % of the examples; fewer than 20 are too few to be split."""
        if len(self._examples) < FEWEST_TO_SPLIT:
            return self._examples
        return split_examples(self._examples, split)

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Call the function."""
        return self._score(transcripts)
