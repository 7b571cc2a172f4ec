"""How our algorithms take the arguments of SB3's, and say what they take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from stable_baselines3.common.base_class import BaseAlgorithm

Method = TypeVar("Method", bound=Callable[..., Any])


def for_transformers(method: Method) -> Method:
    """Let a method run with a `TransformerPolicy`; with any other policy SB3's own runs instead."""
    return cast("Method", _ForTransformers(method))


class _ForTransformers:
    """Puts a choice between two methods into the class that it is named in."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __set_name__(self, owner: type, name: str) -> None:
        method = self._method

        @functools.wraps(method)
        def run(agent: Any, *args: Any, **kwargs: Any) -> Any:
            if agent.is_text:
                return method(agent, *args, **kwargs)
            return getattr(super(owner, agent), name)(*args, **kwargs)

        setattr(owner, name, run)


def sb3_class(cls: type) -> type[BaseAlgorithm]:
    """Return the algorithm of SB3 that a class of ours is made from."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("stable_baselines3."))


def given_arguments(
    cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], text_defaults: dict[str, Any] | None
) -> dict[str, Any]:
    """Return arguments of SB3's class by name, with None replaced where it stands for a default.

    Args:
        cls: A class of ours.
        args: Those behind the policy and the environment.
        kwargs: Those by name.
        text_defaults: What stands in for None. None: SB3's own defaults do.

    Raises:
        TypeError: If the class takes no such arguments.
    """
    unused = cast("Any", cls).unused
    names = [name for name in inspect.signature(sb3_class(cls)).parameters if name not in unused]
    names = names[2:]  # behind policy and env
    if len(args) > len(names):
        raise TypeError(f"{cls.__name__} takes at most {len(names) + 2} positional arguments.")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in given or name not in names:
            known = "got twice" if name in given else f"unknown; it has {', '.join(signed(cls))}"
            raise TypeError(f"The argument {name!r} of {cls.__name__} is {known}.")
        given[name] = value
    optional = cast("Any", cls).text_defaults
    given = {k: v for k, v in given.items() if v is not None or k not in optional}
    return {**(text_defaults or {}), **given}


def signed(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class of ours: SB3's, then those that ours add."""
    theirs = inspect.signature(sb3_class(cls)).parameters
    merged = {name: theirs[name] for name in theirs if name not in cls.unused}
    for name in cls.text_defaults:
        if name in merged:
            merged[name] = merged[name].replace(default=None)
    own = {name: p for name, p in own_parameters(cls).items() if name not in cls.unused}
    return {**merged, **own}


def own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters that ours add to SB3's."""
    ours = [base for base in reversed(cls.__mro__) if base.__module__.startswith("agents.")]
    made = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    return {
        name: parameter
        for function in made
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def given_own(agent: Any, names: Iterable[str] | None = None) -> list[str]:
    """Return which of an agent's own arguments (or of these) are not at their defaults."""
    own = own_parameters(type(agent))
    asked = own if names is None else names
    return [name for name in asked if getattr(agent, name) != own[name].default]
