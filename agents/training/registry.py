"""The algorithms that a run can name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Where the classes are. A class takes (policy, env, **options), its options named as in `PPO`.
ALGORITHMS = {
    "ppo": "agents.algorithms.ppo:PPO",
    "a2c": "agents.algorithms.a2c:A2C",
    "reinforce": "agents.algorithms.reinforce:Reinforce",
}


def algorithm_class(name: str) -> type[Any]:
    """Return an algorithm's class by its name in `ALGORITHMS`."""
    module, _, class_name = ALGORITHMS[name].partition(":")
    found: type[Any] = getattr(import_module(module), class_name)
    return found
