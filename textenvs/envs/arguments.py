"""What environments are given: what is misspelt, and what was probably meant."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, cast

import numpy as np
import numpy.typing as npt


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


def check_reset_mask(mask: Any, num_envs: int) -> npt.NDArray[np.bool_]:
    """Return which slots are to be reset, (num_envs,): all of them where the mask is None.

    Raises:
        ValueError: If it is no mask of all slots, or an empty one.
    """
    if mask is None:
        return np.ones(num_envs, dtype=np.bool_)
    mask = np.asarray(mask)
    if mask.shape != (num_envs,) or mask.dtype != np.bool_ or not mask.any():
        raise ValueError(
            f"options['reset_mask'] must be a boolean array of shape ({num_envs},) with at least "
            f"one True, but it has dtype {mask.dtype}, shape {mask.shape}."
        )
    return cast("npt.NDArray[np.bool_]", mask)
