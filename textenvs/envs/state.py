"""What states are made of besides arrays: generators, and whom they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def generator_state(generator: np.random.Generator | None) -> Mapping[str, Any] | None:
    """Return a generator's state as plain data."""
    return None if generator is None else generator.bit_generator.state


def generator_from(state: Mapping[str, Any] | None) -> np.random.Generator | None:
    """Return a new generator that goes on from a state."""
    if state is None:
        return None
    bit_generator = getattr(np.random, state["bit_generator"])()
    bit_generator.state = state
    return np.random.Generator(bit_generator)


def check_fits(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of an environment that was made otherwise.

    Args:
        saved: What the saved environment was made of, by name.
        own: The same of the environment that is to take its place.

    Raises:
        ValueError: If anything differs.
    """
    different = [name for name in own if saved.get(name) != own[name]]
    if different:
        raise ValueError(
            "The state is that of another environment: expected "
            + ", ".join(f"{name}={own[name]}" for name in different)
            + ", got "
            + ", ".join(f"{name}={saved.get(name)}" for name in different)
            + ". Make the environment with the task, dataset, split, tokenizer, budgets and number "
            "of slots of the one that the state was taken from."
        )
