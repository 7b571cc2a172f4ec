"""The algorithms that a run can name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

from agents.policies.transformer import TransformerPolicy
from textenvs.importing import load_object

# Where the classes are. A class takes (policy, env, **options), its options named as in `PPO`.
ALGORITHMS = {
    "ppo": "agents.algorithms.ppo:PPO",
    "a2c": "agents.algorithms.a2c:A2C",
    "grpo": "agents.algorithms.grpo:GRPO",
    "rloo": "agents.algorithms.rloo:RLOO",
    "reinforce++": "agents.algorithms.reinforce_plus_plus:ReinforcePlusPlus",
    "remax": "agents.algorithms.remax:ReMax",
    "reinforce": "agents.algorithms.reinforce:Reinforce",
    "nlpo": "agents.algorithms.nlpo:NLPO",
    "expert_iteration": "agents.algorithms.expert_iteration:ExpertIteration",
    "sft": "agents.algorithms.sft:SFT",
}


def algorithm_class(name: str, called: str = "algo") -> type[Any]:
    """Return an algorithm's class.

    Args:
        name: One of `ALGORITHMS`, or "package.module:Class" for one of your own.
        called: What a message calls the option.

    Raises:
        ValueError: If there is no such class.
    """
    if name not in ALGORITHMS and ":" not in name:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"{called} must be one of {known}, or package.module:Class, not {name!r}.")
    try:
        found = load_object(ALGORITHMS.get(name, name))
    except ValueError as error:
        raise ValueError(f"{called} is {name!r}, which there is not. {error}") from error
    if not (isinstance(found, type) and {"policy", "env"} <= {*keywords(found)}):
        raise ValueError(
            f"{called} is {name!r}, which is no algorithm: it takes no policy and env."
        )
    return found


def algorithm_options() -> set[str]:
    """Return the names of all arguments that any of the algorithms takes."""
    return set[str]().union(*map(_options, ALGORITHMS.values()))


@cache
def _options(algorithm: str) -> frozenset[str]:
    """Return the names of the arguments of an algorithm at "package.module:Class"."""
    return frozenset(keywords(load_object(algorithm))) - {"policy", "env"}


def policy_options() -> set[str]:
    """Return the names of all arguments that the policy takes."""
    return {*inspect.signature(TransformerPolicy).parameters}


def keywords(algorithm: type[Any]) -> Iterator[str]:
    """Yield the names that a class's constructor takes, and its bases' where it hands on more."""
    own = inspect.signature(algorithm).parameters.values()
    yield from (parameter.name for parameter in own)
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in own):
        for base in algorithm.__mro__[1:-1]:
            yield from inspect.signature(base).parameters
