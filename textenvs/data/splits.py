"""How a task's own examples are divided into training, validation and test data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from textenvs.task import SPLITS, Example


def split_examples(examples: Sequence[Example], split: str, seed: int = 0) -> tuple[Example, ...]:
    """Shuffle the examples and return one split's share of them: 80 %, 10 % and 10 %.

    The three splits are disjoint and together hold every example. The same examples, in the same
    order, and the same seed give the same splits.

    Args:
        examples: All examples, which differ in their prompt or in their data.
        split: "train", "validation" or "test".
        seed: The seed of the shuffle.

    Raises:
        ValueError: If the split is none of these, or two examples are equal.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    seen: set[tuple[str, str]] = set()
    for example in examples:
        key = (example.prompt, repr(sorted(example.data.items())))
        if key in seen:
            raise ValueError(
                f"Two examples have the prompt {example.prompt!r} and the same data: they could "
                "end up in different splits. Keep one of them."
            )
        seen.add(key)
    order = np.random.default_rng(seed).permutation(len(examples))
    bounds = [len(examples) * tenths // 10 for tenths in (0, 8, 9, 10)]
    start = SPLITS.index(split)
    return tuple(examples[i] for i in order[bounds[start] : bounds[start + 1]])
