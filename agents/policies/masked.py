"""A policy that says only what a lagging copy of itself finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.models.backbone import Backbone, Scope
from agents.models.frozen import AdapterReference, frozen_copy
from agents.models.layout import SequenceBatch
from agents.policies.transformer import TransformerPolicy


class MaskedTransformerPolicy(TransformerPolicy):
    """A `TransformerPolicy` under the top-p mask of a lagging copy of its actor.

    Each token is one of the smallest set of tokens to which the copy gives at least a probability
    of `top_mask`: of what the action space and the constraint allow, and at the policy's
    temperature. So it is in rollouts, updates, the reference and predictions (Ramamurthy et al.
    2023). The copy costs another forward wherever the actor has one, and another model's memory;
    with LoRA another adapter's, but then it reads its whole context at each step.

    Args:
        *args: As for `TransformerPolicy`.
        top_mask: The probability, in (0, 1].
        **kwargs: As for `TransformerPolicy`.

    Attributes:
        mask_backbone: The copy; `renew_mask` makes it what the actor is.
    """

    def __init__(self, *args: Any, top_mask: float = 0.9, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < top_mask <= 1:
            raise ValueError(f"top_mask must be more than 0 and at most 1, but it is {top_mask}.")
        self.top_mask = top_mask
        self.mask_backbone = frozen_copy(self.backbone)

    def renew_mask(self) -> None:
        """Let the copy be what the actor is now."""
        if isinstance(self.mask_backbone, AdapterReference):
            self.mask_backbone.renew()
        else:
            self.mask_backbone.load_state_dict(self.backbone.state_dict())
        self.mask_backbone.clear_cache()

    def follow_actor(self) -> None:
        """Let what starts as a copy of the actor start from it as it is now: critic and mask."""
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
        likely = replace(self.sampling, top_k=0, top_p=self.top_mask)
        with th.no_grad():
            logits = self.mask_backbone.logits(hidden)[:, : self.vocab_size]
            return likely.scores(logits, super()._mask(*places), keep) > -th.inf

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "top_mask": self.top_mask}
