"""What the strings of an option stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from textenvs.registration import load_task, register_task, task_ids


def resolve_env_id(env: str) -> str:
    """Return a registered id for an id or for "package.module:Task", which is registered.

    Raises:
        ValueError: If there is no such environment.
    """
    if env in task_ids():
        return env
    load_task(env)  # raises if there is none; importing a module may register its task, too
    env_id = f"{env.rpartition(':')[2].rpartition('.')[2]}-v0"
    if env_id not in task_ids():
        register_task(env_id, env)
    return env_id


def parse_fields(fields: Sequence[str], option: str = "fields") -> dict[str, str] | None:
    """Return {"prompt": "mr"} for ("prompt=mr",); `option` is what a message calls them."""
    pairs = [field.partition("=") for field in _strings(fields, option)]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"{option} takes NAME=COLUMN, not {name + equals + column!r}.")
    return {name: column for name, _, column in pairs} or None


def parse_rewards(
    rewards: Sequence[str], option: str = "reward"
) -> list[tuple[str, float] | str] | None:
    """Return [("bleu", 0.5), "task"] for ("0.5*bleu", "task"); see `parse_fields`."""
    parsed: list[tuple[str, float] | str] = []
    for reward in _strings(rewards, option):
        weight, star, name = reward.partition("*")
        try:
            parsed.append((name, float(weight)) if star else reward)
        except ValueError:
            raise ValueError(f"{option} takes NAME or WEIGHT*NAME, not {reward!r}.") from None
    return parsed or None


def _strings(values: Sequence[str], option: str) -> Sequence[str]:
    """Return strings; one string alone would be taken for its letters."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{option} takes a tuple of strings, but it is {values!r}.")
    return values


def choices(cls: type[Any]) -> dict[str, tuple[str, ...]]:
    """Return what the fields of a class that are one of a few may be."""
    return {
        name: get_args(part)
        for name, hint in get_type_hints(cls).items()
        for part in (hint, *get_args(hint))
        if get_origin(part) is Literal
    }
