"""Which example a slot plays next: a function of the slot and of how many it has had."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Sampling = Literal["random", "epoch"]


class ExampleSampler:
    """Draws the examples of N slots, whichever of them comes first.

    Args:
        size: How many examples there are.
        num_envs: The number of slots.
        sampling: "random": any example each time. "epoch": slot i of N takes the examples i, i + N,
            ... of one permutation after the other, so that each is played once before any is again,
            as far as slots go on at one pace.
        group_size: So many neighbouring slots play the same examples in the same order; with
            "epoch", a group takes what one slot would.

    Raises:
        ValueError: For an unknown sampling, or slots that are no multiple of a group.
    """

    def __init__(
        self,
        size: int,
        num_envs: int = 1,
        sampling: Sampling = "random",
        group_size: int = 1,
    ) -> None:
        if sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be 'random' or 'epoch', but it is {sampling!r}.")
        if not isinstance(group_size, (int, np.integer)) or group_size < 1:
            raise ValueError(f"group_size must be a positive integer, but it is {group_size!r}.")
        if num_envs % group_size:
            raise ValueError(
                f"num_envs must be a multiple of group_size={group_size}, so that all groups are "
                f"whole, but it is {num_envs}."
            )
        self.size, self.num_envs = size, num_envs
        self.sampling, self.group_size = sampling, int(group_size)

    def draw(
        self, slot: int, count: int, rng: np.random.Generator, seeds: Sequence[int | None]
    ) -> int:
        """Return the index of a slot's next example.

        Args:
            slot: The slot.
            count: How many it has drawn since it was seeded.
            rng: Its generator, which draws if examples are random and slots are alone.
            seeds: What each slot was seeded with.
        """
        group = slot // self.group_size
        if self.sampling == "epoch":
            groups = self.num_envs // self.group_size
            epoch, place = divmod(count * groups + group, self.size)
            return int(_permutation(self.size, _seed(seeds[0]), epoch)[place])
        if self.group_size == 1:
            return int(rng.integers(self.size))
        first = _seed(seeds[group * self.group_size])
        return int(np.random.default_rng([first, count]).integers(self.size))


def _seed(seed: int | None) -> int:
    """Return what a slot was seeded with; of a generator that a user has set nothing is known."""
    return 0 if seed is None or seed < 0 else int(seed)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)
