"""The critic: a head on the actor's trunk, on a model of its own, or none at all."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, cast

import torch as th
from torch import nn

from agents.models.backbone import Backbone, Observation
from agents.models.frozen import renew
from agents.models.layout import SequenceBatch


class ValueHead(nn.Linear):
    """One value for each hidden state, zero at the start.

    Args:
        hidden_size: The width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class CriticMixin(ABC):
    """The critic of a policy; its modules are the policy's own.

    Attributes:
        backbone: The actor's model.
        value_backbone: The critic's own model. None: it shares the actor's.
        value_head: What makes values of hidden states. None: there is no critic.
        value_model_is_copy: Whether the critic's model starts, and after a warm start again, as
            the actor's.
        vf_detach: Whether the value loss leaves a trunk alone that the critic shares.
    """

    backbone: Backbone
    value_backbone: Backbone | None
    value_head: ValueHead | None
    value_model_is_copy: bool
    vocab_size: int
    vf_detach: bool = False

    @abstractmethod
    def make_backbone(self, model: Any) -> Backbone:
        """Return a model that fits the policy's spaces."""

    def make_critic(self, value_model: Any, critic: bool) -> None:
        """Make the critic's modules.

        Args:
            value_model: None (the actor's model), "copy", or what `make_backbone` takes.
            critic: Whether there is a critic.

        Raises:
            ValueError: If there is a model for no critic, or one that lacks tokens.
        """
        if value_model is not None and not critic:
            raise ValueError("A value_model is a critic's: leave it out, or critic=False.")
        self.value_model_is_copy = isinstance(value_model, str) and value_model == "copy"
        self.value_backbone = None
        if self.value_model_is_copy:
            self.value_backbone = copy.deepcopy(self.backbone)
        elif value_model is not None:
            self.value_backbone = self.make_backbone(value_model)
            self.value_backbone.merge_adapter()
            own = self.value_backbone.num_logits
            if own < self.vocab_size:
                raise ValueError(
                    "The critic reads whatever the actor says, but its model's vocabulary has only "
                    f"{own} of {self.vocab_size} tokens: choose a value_model for this tokenizer."
                )
        self.value_head = ValueHead(self.critic_backbone.hidden_size) if critic else None

    @property
    def critic(self) -> bool:
        """Whether there are values."""
        return self.value_head is not None

    @property
    def critic_is_new(self) -> bool:
        """Whether there is a critic that has not learned anything yet."""
        head = self.value_head
        return head is not None and not (head.weight.any() or head.bias.any())

    @property
    def separate_critic(self) -> bool:
        """Whether the critic has a model of its own."""
        return self.value_backbone is not None

    @property
    def critic_backbone(self) -> Backbone:
        """The model that the critic reads."""
        return self.value_backbone or self.backbone

    def follow_actor(self) -> None:
        """Copy the actor's weights into a critic that is to start as its copy."""
        if self.value_model_is_copy and self.value_backbone is not None:
            renew(self.value_backbone, self.backbone)

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return the critic's own parameters: those of its head, and of its model if it has one."""
        modules = [module for module in (self.value_backbone, self.value_head) if module]
        return [parameter for module in modules for parameter in module.parameters()]

    def saved_value_model(self) -> Any:
        """Return the `value_model` to make the policy with before its weights are loaded."""
        if self.value_backbone is None:
            return None
        return "copy" if self.value_model_is_copy else self.value_backbone.made_of

    def critic_hidden(self, batch: SequenceBatch) -> th.Tensor:
        """Return what the value head reads of the actions of sequences, (n, hidden)."""
        return self.critic_backbone.hidden_states(batch)

    def values(self, batch: SequenceBatch) -> th.Tensor:
        """Return the values (n,) of what the actions of sequences were chosen from."""
        return self._values(self.critic_hidden(batch)).flatten()

    def observation_values(self, observation: Observation) -> th.Tensor:
        """Return the values (n,) of observations on the host, without the prefix cache."""
        return self._values(self.critic_backbone.last_hidden(observation)).flatten()

    def _values(self, hidden: th.Tensor) -> th.Tensor:
        """Return the values (n, 1) of hidden states, in float32; zeros without a critic."""
        if self.value_head is None:
            return hidden.new_zeros(len(hidden), 1, dtype=th.float32)
        return cast("th.Tensor", self.value_head(hidden.float()))
