"""What states are made of besides arrays: generators, and whom they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding


def generator_state(generator: np.random.Generator | None) -> Mapping[str, Any] | None:
    """Return a generator's state as plain data."""
    return None if generator is None else generator.bit_generator.state


def generator_from(state: Mapping[str, Any] | None) -> np.random.Generator | None:
    """Return a new generator in a given state."""
    if state is None:
        return None
    bit_generator = getattr(np.random, state["bit_generator"])()
    bit_generator.state = state
    return np.random.Generator(bit_generator)


class SlotGenerators:
    """The generator of each slot of a vector environment; none before the first seeding.

    Args:
        num_envs: The number of slots.

    Attributes:
        rngs: The generators, a list that stays the same object.
        seeds: What each of them was seeded with.
    """

    def __init__(self, num_envs: int) -> None:
        self._num_envs = num_envs
        self.rngs: list[np.random.Generator] = []
        self.seeds: list[int | None] = []

    def seed(
        self, seed: int | Sequence[int | None] | None, mask: npt.NDArray[np.bool_]
    ) -> list[int]:
        """Seed the slots of a mask (num_envs,).

        Args:
            seed: One for each slot, or s for s, s+1, ...; None keeps the generators going.
            mask: Which slots are seeded. The first time, all of them are.

        Returns:
            Which slots have a new generator.

        Raises:
            ValueError: If the number of seeds is not that of slots.
        """
        if seed is None:
            seeds: Sequence[int | None] = [None] * self._num_envs
        elif isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + slot for slot in range(self._num_envs)]
        else:
            seeds = seed
        if len(seeds) != self._num_envs:
            raise ValueError(
                f"Expected {self._num_envs} seeds, one for each slot, got {len(seeds)}."
            )
        if not self.rngs:
            generators = [seeding.np_random(s) for s in seeds]
            self.rngs[:] = [rng for rng, _ in generators]
            self.seeds[:] = [used for _, used in generators]
            return list(range(self._num_envs))
        seeded = [slot for slot, s in enumerate(seeds) if s is not None and mask[slot]]
        for slot in seeded:
            self.rngs[slot], self.seeds[slot] = seeding.np_random(seeds[slot])
        return seeded

    def get_state(self) -> dict[str, Any]:
        """Return where the generators stand, as plain data."""
        return {
            "generators": [generator_state(rng) for rng in self.rngs],
            "seeds": list(self.seeds),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned."""
        generators = [generator_from(generator) for generator in state["generators"]]
        self.rngs[:] = [rng for rng in generators if rng is not None]
        self.seeds[:] = state["seeds"]


def check_fits(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of an environment that was made otherwise.

    Args:
        saved: What the saved environment was made of, by name.
        own: The same of the environment that is to take its place.

    Raises:
        ValueError: If anything differs.
    """
    names = dict.fromkeys([*own, *saved])
    different = [name for name in names if saved.get(name) != own.get(name)]
    if different:
        raise ValueError(
            "The state is that of another environment: expected "
            + ", ".join(f"{name}={own.get(name)}" for name in different)
            + ", got "
            + ", ".join(f"{name}={saved.get(name)}" for name in different)
            + ". Make the environment with the task, dataset, split, tokenizer, budgets and number "
            "of slots of the one that the state was taken from."
        )
