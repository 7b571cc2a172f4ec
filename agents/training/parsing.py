"""What the strings of an option stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym

from textenvs.importing import load_object
from textenvs.registration import load_task, register_task, task_ids

_REGISTERED = re.compile(r"-v\d+$")


def resolve_env_id(env: str) -> str:
    """Return the registered id that an option names.

    Args:
        env: A registered id; "package.module:Name-v0", an id that the module registers; or
            "package.module:Task", which is registered if its module has not done so. It is called
            "Task-v0", or "package.module/Task-v0" (with "-" for ".") where another task has that
            id.

    Raises:
        ValueError: If there is no such environment.
    """
    if env in task_ids():
        return env
    module, _, name = env.rpartition(":")
    if module and _REGISTERED.search(name):
        try:
            import_module(module)
        except ImportError as error:
            raise ValueError(f"Could not import {module!r} of {env!r}: {error}.") from error
        load_task(name)  # raises, with the nearest id, if the module has not registered it
        return name
    load_task(env)  # raises if there is none; importing a module may register its task, too
    own = [env_id for env_id in task_ids() if _is_task(gym.registry[env_id].kwargs["task"], env)]
    if own:
        return own[0]
    env_id = f"{name.rpartition('.')[2]}-v0"
    if env_id in gym.registry:
        env_id = f"{module.replace('.', '-')}/{env_id}"
    register_task(env_id, env)
    return env_id


def _is_task(registered: Any, path: str) -> bool:
    """Return whether a registered task is the one that "package.module:Task" points to."""
    return registered == path if isinstance(registered, str) else registered is load_object(path)


def parse_fields(fields: Sequence[str], option: str = "fields") -> dict[str, str] | None:
    """Return {"prompt": "mr"} for ("prompt=mr",); `option` is what a message calls them."""
    pairs = [field.partition("=") for field in strings(fields, option)]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"{option} takes NAME=COLUMN, not {name + equals + column!r}.")
    return {name: column for name, _, column in pairs} or None


def parse_rewards(
    rewards: Sequence[str], option: str = "reward"
) -> list[tuple[str, float] | str] | None:
    """Return [("bleu", 0.5), "task"] for ("0.5*bleu", "task"); see `parse_fields`."""
    parsed: list[tuple[str, float] | str] = []
    for reward in strings(rewards, option):
        weight, star, name = reward.partition("*")
        try:
            parsed.append((name, float(weight)) if star else reward)
        except ValueError:
            raise ValueError(f"{option} takes NAME or WEIGHT*NAME, not {reward!r}.") from None
    return parsed or None


def strings(values: Sequence[str], option: str) -> Sequence[str]:
    """Return strings; one string alone would be taken for its letters."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{option} takes a tuple of strings, but it is {values!r}.")
    return values


@cache
def allowed_values(cls: type[Any]) -> dict[str, tuple[str, ...]]:
    """Return what the fields of a class that are one of a few, or several of these, may be."""
    return {
        name: get_args(part)
        for name, hint in get_type_hints(cls).items()
        for part in (hint, *get_args(hint))
        if get_origin(part) is Literal
    }


def check_keywords(given: Iterable[str], known: Iterable[str], cls: str) -> None:
    """Refuse keywords that a class does not have, and name the nearest one.

    Raises:
        TypeError: If there is one.
    """
    known = list(known)
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
            raise TypeError(f"{cls} has no option {name!r}: {hint}")
