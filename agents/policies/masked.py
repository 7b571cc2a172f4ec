"""A policy that says only what a lagging copy of itself finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.models.backbone import Backbone, Scope
from agents.models.frozen import frozen_copy, renew
from agents.models.layout import SequenceBatch
from agents.policies.transformer import TransformerPolicy


class MaskedTransformerPolicy(TransformerPolicy):
    """A `TransformerPolicy` under the top-p mask of a lagging copy of its actor.

    Each token is one of the smallest set of tokens to which the copy gives at least a probability
    of `top_mask`, or ends the turn: of what the action space and the constraint allow, and at the
    policy's temperature (Ramamurthy et al. 2023). So it is in rollouts, updates and predictions;
    another model, such as the reference, is scored without the copy's mask, so that a KL to it is
    that of the policy as it acts. The copy costs another forward wherever the actor has one, and
    another model's memory; with LoRA another adapter's, but then it reads its whole context at each
    step.

    Args:
        *args: As for `TransformerPolicy`.
        top_mask: The probability, in (0, 1].
        **kwargs: As for `TransformerPolicy`.

    Raises:
        ValueError: For a `top_mask` out of its bounds.

    Attributes:
        mask_backbone: The copy; `renew_mask` makes it what the actor is.
    """

    _ends: th.Tensor

    def __init__(self, *args: Any, top_mask: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < top_mask <= 1:
            raise ValueError(f"top_mask must be more than 0 and at most 1, but it is {top_mask}.")
        self.top_mask = top_mask
        ends = th.zeros(self.vocab_size, dtype=th.bool)
        ends[[i for i in getattr(self.action_space, "stop_token_ids", ()) if i < len(ends)]] = True
        self.register_buffer("_ends", ends, persistent=False)
        self.mask_backbone = frozen_copy(self.backbone)

    def renew_mask(self) -> None:
        """Let the copy be what the actor is now."""
        renew(self.mask_backbone, self.backbone)

    def follow_actor(self) -> None:
        """Copy the actor's weights into what masks it, and into a critic that is to be its copy."""
        super().follow_actor()
        self.renew_mask()

    @property
    def backbones(self) -> list[Backbone]:
        """All models that rollouts ask, the actor's first."""
        return [*super().backbones, self.mask_backbone]

    def _said(
        self, obs: PyTorchObs | SequenceBatch, scope: Scope = "predict"
    ) -> tuple[Sequence[Any], ...]:
        with th.no_grad():
            hidden: Any = self._last_hidden(obs, self.mask_backbone, scope)
        return (*super()._said(obs, scope), hidden)

    def _mask(self, *said: Any, keep: th.Tensor | None = None) -> th.Tensor | None:
        *places, hidden = said
        allowed = self._allowed(*places)
        likely = replace(self.sampling, top_k=0, top_p=self.top_mask)
        with th.no_grad():
            logits = self.mask_backbone.logits(hidden)[:, : self.vocab_size]
            chosen = likely.scores(logits, allowed, keep) > -th.inf
            return chosen | (self._ends if allowed is None else self._ends & allowed)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "top_mask": self.top_mask}
