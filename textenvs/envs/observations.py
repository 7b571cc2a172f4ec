"""Batches of observations that know which of their prompts have changed."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import count
from typing import Any

import numpy as np

from textenvs.text.codec import TokenIds

Observation = dict[str, TokenIds]

_VERSIONS = count(1)


def new_versions(number: int) -> TokenIds:
    """Return so many versions, (number,) int64, larger than all others in this process."""
    return np.fromiter(_VERSIONS, dtype=np.int64, count=number)


class Observations(Observation):
    """The observations of all slots, with a version of each slot's prompt.

    Where a slot has the same version as in an earlier batch, its prompt is the same, and its
    response is the earlier one with tokens appended: neither has to be compared. Otherwise it is
    equal to the dict of its arrays. Versions count within a process, so that a pickle is a plain
    dict, without them.

    Args:
        arrays: The observations, each (num_envs, ...).
        prompt_versions: The version of each slot's prompt, (num_envs,) int64.
    """

    def __init__(self, arrays: Mapping[str, TokenIds], prompt_versions: TokenIds) -> None:
        super().__init__(arrays)
        self.prompt_versions = prompt_versions

    def rows(self, slots: TokenIds) -> Observations:
        """Return the observations of some slots, in their order."""
        arrays = {key: array[slots] for key, array in self.items()}
        return Observations(arrays, self.prompt_versions[slots])

    def __deepcopy__(self, memo: dict[int, Any]) -> Observations:
        return Observations(deepcopy(dict(self), memo), self.prompt_versions.copy())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
