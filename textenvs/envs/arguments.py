"""What is misspelt, and what was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of some names, or nothing if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_arguments(environment: type[Any], unknown: Mapping[str, Any]) -> None:
    """Refuse arguments that an environment does not have.

    Raises:
        TypeError: If there are any.
    """
    if unknown:
        name = next(iter(unknown))
        known = list(inspect.signature(environment).parameters)[:-1]
        raise TypeError(
            f"{environment.__name__} got an unexpected keyword argument {name!r}."
            f"{nearest(name, known)} It takes {', '.join(known)}."
        )


def check_options(options: Mapping[str, Any] | None, known: Iterable[str]) -> None:
    """Refuse options of `reset` that would be ignored.

    Raises:
        ValueError: If there are any.
    """
    for name in options or ():
        if name not in known:
            raise ValueError(
                f"reset has no option {name!r}.{nearest(str(name), known)} It takes "
                f"{', '.join(known)}; texts of your own are examples, as in "
                "gym.make(..., dataset=[Example(...)])."
            )
