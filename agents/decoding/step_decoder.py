"""What the decoders of all models share: what is remembered, of which weights, what computes it.

Copies of the weights (`agents.decoding.copies`) share everything with the model but its linear
layers. They compute what the model does, up to rounding.
"""

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


Memory = TypeVar("Memory", bound=Remembered)


class StepDecoder(ABC, Generic[Memory]):
    """Runs a model for rollouts and predictions, and notices when its weights have changed.

    Long rollouts are run by copies of the weights, which multiply faster, up to rounding.

    Args:
        model: The model.
        own: Its trunk, and what makes logits of its last hidden states.
        autocast: The precision that the trunk computes in. None: the model's own.
        compiled: Whether `torch.compile` makes programs of steps.

    Attributes:
        memories: What is remembered in each scope.
        compiled: See above.
        copies: Trunk and head by copies of their weights.
        prepacked: Whether the last step was run by these, and they are still at hand.
    """

    def __init__(
        self, model: PreTrainedModel, own: Modules, autocast: th.dtype | None, compiled: bool
    ) -> None:
        self.memories: dict[Scope, Memory] = {}
        self.compiled = compiled
        self.prepacked = False
        self._autocast = autocast
        self._programs = Programs()
        self.copies = Copies(model, own, autocast, self._programs.clear)
        self._own = own
        self._trunk, self._head = own  # where more is made of them, `use_original` follows
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
        weights, the number of rows or (of an encoder-decoder) the budget have changed, and after an
        exception.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
            scope: "predict" leaves alone what a rollout remembers, and how it is rounded.
        """
        if scope == "predict" and not observation["response_length"].any():
            self._look_closely()
        memory = self._memory(observation, scope)
        steps = max(memory.steps, self._steps if scope == "rollout" else 0)
        try:
            with th.inference_mode(not self.compiled), th.no_grad():
                if self.compiled or steps >= PREPACK_AFTER:
                    self.prepack(memory.weights)
                else:
                    self.use_original()
                hidden = self._next(memory, observation)
        except BaseException:  # an interrupt as well: half of what is remembered may be new
            self.memories.pop(scope, None)
            raise
        return hidden.clone()  # an ordinary tensor

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        memory = self.memories.pop("rollout", None)  # an exception would leave it half as it was
        if memory is not None:
            with th.inference_mode(not self.compiled), th.no_grad():
                memory.keep_rows(rows)
            self.memories["rollout"] = memory

    def clear(self) -> None:
        """Let all memory go but that of programs, which renew their copies of the weights."""
        self.memories.clear()
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
    def _next(self, memory: Memory, observation: Observation) -> th.Tensor:
        """Return the hidden states (n, hidden), and renew what is remembered."""

    @abstractmethod
    def _fits(self, memory: Memory, observation: Observation) -> bool:
        """Return whether what is remembered can be of such rows."""

    @abstractmethod
    def _remember(self, version: object, observation: Observation, scope: Scope) -> Memory:
        """Return what remembers such rows, computed by this version of the weights."""

    def _use(self, trunk: nn.Module, head: nn.Module) -> None:
        """Run by these modules."""
        self._trunk, self._head = trunk, head

    def _look_closely(self) -> None:
        """Drop what is remembered if weights have changed in a way that their version misses."""
        if self._weights_version.missed_a_change():
            self.clear()

    def _memory(self, observation: Observation, scope: Scope) -> Memory:
        """Return what is remembered, or a new memory if it is of other rows or weights."""
        version = self._weights_version()
        memory = self.memories.get(scope)
        if memory is not None and memory.weights != version:
            self.clear()
        elif memory is not None and self._fits(memory, observation):
            return memory
        del memory
        self.memories.pop(scope, None)  # its memory first
        return self.memories.setdefault(scope, self._remember(version, observation, scope))
