"""What a policy needs of a language model: hidden states, logits, and a cache that may be there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch as th

from agents.decoding.tokens import Observation, Scope
from agents.models.layout import SequenceBatch, SequenceLayout

if TYPE_CHECKING:
    from agents.models.lora import Adapter


@dataclass(frozen=True)
class Capabilities:
    """What a model can do, and why not.

    Args:
        caches: Why keys and values cannot be remembered, or None: they can.
        packs: Why sequences cannot be computed in one row without padding, or None: they can.
        compiles: Why steps cannot be compiled, or None: they can.
        shares: Why prefixes that sequences share cannot be computed once, or None: they can.
    """

    caches: str | None = None
    packs: str | None = None
    compiles: str | None = None
    shares: str | None = None


class Backbone(th.nn.Module, ABC):
    """A language model, seen as what gives hidden states and what makes logits of them.

    A new kind of model implements the abstract methods; everything else has a plain default.

    Attributes:
        hidden_size: The width of the hidden states.
        num_logits: How many logits there are for a token; it may be more than the tokenizer has.
        layout: How tokens become the sequences that it reads.
        capabilities: What it can do.
        adapter: A LoRA adapter that is trained instead of the weights, or None.
        convention: How prompts are to be read for it; see `TextCodec`. None: it does not matter.
        never_said: Tokens that it must not emit, whatever the action space allows.
        readable: How many ids prompts may have. None: as many as it can emit.
    """

    hidden_size: int
    num_logits: int
    layout: SequenceLayout
    capabilities: Capabilities = Capabilities("no cache", "no packing", "no programs", "no packing")
    adapter: Adapter | None = None
    convention: Literal["causal", "encoder"] | None = None
    never_said: tuple[int, ...] = ()
    readable: int | None = None

    @property
    @abstractmethod
    def config(self) -> Any:
        """What to make the model of again before its weights are loaded: plain, picklable data."""

    @property
    def made_of(self) -> Any:
        """What `TransformerPolicy` and its like take to make it again: the config, or a name."""
        return self.config

    @abstractmethod
    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from, row by row."""

    @abstractmethod
    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state (rows, hidden) at each row's last token, all of it computed.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
        """

    @abstractmethod
    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits (n, num_logits) of hidden states: the whole head."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the model into a folder that its own library reads."""

    def longest_prompt(self, response: int) -> float | None:
        """Return the most tokens of a prompt before a response of some tokens; below 1: none.

        None: as many as are left of prompt and response budgets.
        """
        return None

    def generation_settings(self) -> dict[str, Any]:
        """Return what `generate` has to be told so that it begins, and leaves out, as rollouts."""
        return {}

    def save_merged(self, folder: Path) -> None:
        """Write the model, and if it has an adapter, with that added to its weights."""
        self.save_pretrained(folder)

    def merge_adapter(self) -> None:
        """Add an adapter, if there is one, to the weights for good."""
        return None

    def next_hidden(self, observation: Observation, scope: Scope = "rollout") -> th.Tensor:
        """Return what `last_hidden` gives, up to rounding, without gradients; a cache may help."""
        with th.no_grad():
            return self.last_hidden(observation)

    def next_logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return what `logits` gives, up to rounding, as rollouts compute it."""
        return self.logits(hidden)

    def program(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of hidden states as rollouts run it, compiled if that is wanted."""
        return function

    def start_rollout(self, steps: int) -> None:
        """Let what is cached go, and prepare for a rollout of so many steps."""
        self.clear_cache()

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Expect the rollout to go on with these of its rows, in this order."""
        self.clear_cache()

    def clear_cache(self) -> None:
        """Let what is cached go."""
        return None
