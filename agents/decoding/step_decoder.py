"""What runs models for rollouts has in common: what is remembered, of which weights, by what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers import PreTrainedModel

from agents.decoding.copies import PREPACK_AFTER, Copies, Modules
from agents.decoding.programs import Programs
from agents.decoding.tokens import Observation, Scope
from agents.decoding.weights_version import WeightsVersion


class Remembered(Protocol):
    """What is remembered of rows between steps."""

    weights: object
    """The version of the weights that it is of."""
    steps: int
    """How many steps there have been."""

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these rows, in this order."""
        ...


Cache = TypeVar("Cache", bound=Remembered)


class StepDecoder(ABC, Generic[Cache]):
    """Runs a model for rollouts and predictions, and notices when its weights have changed.

    Long rollouts are run by copies of the weights, which multiply faster, up to rounding.

    Args:
        model: The model.
        own: Its trunk, and what makes logits of its last hidden states.
        autocast: The precision that the trunk computes in. None: the model's own.
        compiled: Whether `torch.compile` makes programs of steps.

    Attributes:
        caches: What is remembered in each scope.
        compiled: See above.
        copies: Trunk and head by copies of their weights.
        prepacked: Whether it is these that run.
    """

    def __init__(
        self, model: PreTrainedModel, own: Modules, autocast: th.dtype | None, compiled: bool
    ) -> None:
        self.caches: dict[Scope, Cache] = {}
        self.compiled = compiled
        self.prepacked = False
        self._autocast = autocast
        self._programs = Programs()
        self.copies = Copies(model, own, autocast, self._programs.clear)
        self._own = own
        self._trunk, self._head = own
        self._steps = 0  # that a rollout will have, as far as is known
        self._weights_version = WeightsVersion(model)

    def __reduce__(self) -> Any:
        """Give a copy of a model no decoder: it makes its own."""
        return type(None), ()

    def start_rollout(self, steps: int) -> None:
        """Drop what is remembered, and prepare for a rollout of so many steps."""
        self.clear()
        self._steps = steps
        self._look_closely()

    def next_hidden(self, observation: Observation, scope: Scope) -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), without gradients.

        What is remembered of the last call's rows is used and renewed. It is dropped when the
        weights or the number of rows have changed, and after an exception.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
            scope: "predict" leaves alone what a rollout remembers, and how it is rounded.
        """
        if scope == "predict" and not observation["response_length"].any():
            self._look_closely()
        cache = self._cache(observation, scope)
        steps = max(cache.steps, self._steps if scope == "rollout" else 0)
        try:
            with th.inference_mode(not self.compiled), th.no_grad():
                if self.compiled or steps >= PREPACK_AFTER:
                    self.prepack(cache.weights)
                else:
                    self.use_original()
                hidden = self._next(cache, observation)
        except BaseException:  # an interrupt as well: half of what is remembered may be new
            self.caches.pop(scope, None)
            raise
        return hidden.clone()  # an ordinary tensor

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        cache = self.caches.pop("rollout", None)  # an exception would leave it half as it was
        if cache is not None:
            with th.inference_mode(not self.compiled), th.no_grad():
                cache.keep_rows(rows)
            self.caches["rollout"] = cache

    def clear(self) -> None:
        """Let all memory go but that of programs, which renew their copies of the weights."""
        self.caches.clear()
        self.prepacked = False
        self.copies.let_go(memory=not self.compiled)
        if not self.compiled:
            self.use_original()

    def prepack(self, version: object) -> None:
        """Run by copies of the weights, made now if those at hand are of another version."""
        self._use(*self.copies.of(version))
        self.prepacked = True

    def use_original(self) -> None:
        """Run by the model itself."""
        self._use(*self._own)
        self.prepacked = False

    def head(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self._head(hidden))

    def program(
        self, key: Hashable, function: Callable[..., Any], any_shape: bool = False
    ) -> Callable[..., Any]:
        """Return a function, compiled if this is wanted; see `Programs`."""
        if not self.compiled:
            return function
        return self._programs.get(key, function, self._captures, any_shape)

    @property
    def _captures(self) -> bool:
        """Whether programs are captured as graphs."""
        return False

    @abstractmethod
    def _next(self, cache: Cache, observation: Observation) -> th.Tensor:
        """Return the hidden states (n, hidden), and renew what is remembered."""

    @abstractmethod
    def _fits(self, cache: Cache, observation: Observation) -> bool:
        """Return whether what is remembered can be of such rows."""

    @abstractmethod
    def _make_cache(self, version: object, observation: Observation, scope: Scope) -> Cache:
        """Return what remembers such rows, computed by this version of the weights."""

    def _use(self, trunk: nn.Module, head: nn.Module) -> None:
        """Run by these modules."""
        self._trunk, self._head = trunk, head

    def _look_closely(self) -> None:
        """Drop what is remembered if weights have changed in a way that their version misses."""
        if self._weights_version.missed_a_change():
            self.clear()

    def _cache(self, observation: Observation, scope: Scope) -> Cache:
        """Return what is remembered, or a new memory if it is of other rows or weights."""
        version = self._weights_version()
        cache = self.caches.get(scope)
        if cache is not None and cache.weights != version:
            self.clear()
        elif cache is not None and self._fits(cache, observation):
            return cache
        del cache
        self.caches.pop(scope, None)  # its memory first
        return self.caches.setdefault(scope, self._make_cache(version, observation, scope))
