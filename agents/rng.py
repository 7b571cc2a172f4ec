"""The global random number generators: SB3 draws from them, so a run's course depends on them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th


def get_rng_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch (all devices)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()]
        if th.cuda.is_initialized()
        else [],
    }


def set_rng_state(states: Mapping[str, Any]) -> None:
    """Put the global generators where `get_rng_state` found them."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(th.from_numpy(states["torch"].copy()))
    for device, state in enumerate(states["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(th.from_numpy(state.copy()), device)


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Put the global generators back to where they were, whatever happens in between."""
    states = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(states)
