"""Runs a causal model for rollouts by prefix caches: a token of each row a step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers import PreTrainedModel

from agents.compat import cache_name, trunk_of, using_attention
from agents.decoding.layer_masks import LayerMasks, ModelMask, keeps_states
from agents.decoding.prefix_cache import PREFILL_TOKENS, PrefixCache
from agents.decoding.row_cache import KeyValues, RowCache
from agents.decoding.shared_prefix import ATTENTION as SHARED_ATTENTION
from agents.decoding.shared_prefix import SharedPrefix
from agents.decoding.step_decoder import StepDecoder
from agents.decoding.tokens import Observation, Scope


class Decoder(StepDecoder[PrefixCache]):
    """Runs a causal model for rollouts and predictions.

    Args:
        model: The model.
        head: What makes logits of its last hidden states.
        autocast: The precision that the trunk computes in. None: the model's own.
        compiled: Whether `torch.compile` makes a program of each step, on a GPU a captured graph.
            Shapes are then few, and memory for the longest sequences is held throughout.
        positions: The most tokens of a sequence.
        prefill_tokens: How many tokens a forward reads that computes prompts; see `PrefixCache`.
        own_masks: See below.

    Attributes:
        own_masks: Whether the model is told which keys rows have, (rows, keys), and makes its masks
            itself: some make the distances between tokens of that. It has to be found out whether
            the model needs it. Rows that do not go on are then read from the first token on.
        share_from: From how many common keys on steps read these once for all rows that have them;
            None: never. It has to be found out whether the model can; programs do not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Module,
        *,
        autocast: th.dtype | None = None,
        compiled: bool = False,
        positions: int = 0,
        prefill_tokens: int = PREFILL_TOKENS,
        own_masks: bool = False,
    ) -> None:
        super().__init__(model, (trunk_of(model), head), autocast, compiled)
        self.share_from: int | None = None
        self.own_masks = own_masks
        config = model.config.get_text_config()
        self._masks = LayerMasks(config)
        self._stateful = keeps_states(config)
        self._cache_name = cache_name(model)
        self._model = model
        self._positions = positions
        self._prefill_tokens = prefill_tokens
        self._key_values: dict[Hashable, KeyValues] = {}  # of programs

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        if self.compiled:  # programs were captured with the memory of all rows
            self.memories.pop("rollout", None)
        else:
            super().keep_rows(rows)

    def trunk(
        self,
        tokens: th.Tensor,
        positions: th.Tensor,
        mask: th.Tensor | None,
        cache: RowCache,
        shared: SharedPrefix | None = None,
    ) -> th.Tensor:
        """Return the last hidden states (n, q, hidden) of new tokens (n, q).

        Args:
            tokens: Token ids.
            positions: (n, q) their positions in their sequences.
            mask: Boolean (n, 1, q, k), which keys they see. None: those of the forward's own
                tokens up to themselves.
            cache: Where keys and values go and come from.
            shared: What the rows have in common.
        """
        told: ModelMask | None = None
        if mask is not None and self.own_masks:
            told = mask[:, 0, -1].long()
        elif mask is not None:
            told = self._masks.of(mask, positions, self._autocast or self._model.dtype)
        inputs = (tokens, positions, told, cache)
        if shared is not None:
            with using_attention(self._model.config, SHARED_ATTENTION):
                return self._run(*inputs, shared=shared)
        if not cache.allocated:  # a program would have to make room itself
            hidden = self._run(*inputs)
            if self._captures:
                cache.fix_addresses()
            return hidden
        if cache.has_every_row:
            return cast("th.Tensor", self.program("step", self._run)(*inputs))
        key = "prefill" if mask is None else "further prefill"
        return cast("th.Tensor", self.program(key, self._run, any_shape=True)(*inputs))

    @property
    def _captures(self) -> bool:
        """Whether programs are captured as graphs."""
        return self.compiled and self._model.device.type == "cuda"

    def _next(self, memory: PrefixCache, observation: Observation) -> th.Tensor:
        return memory.last_hidden(self.trunk, observation, self._model.device)

    def _fits(self, memory: PrefixCache, observation: Observation) -> bool:
        return memory.rows == len(observation["prompt"])

    def _remember(self, version: object, observation: Observation, scope: Scope) -> PrefixCache:
        rows = len(observation["prompt"])
        if self.compiled:  # programs go on with the memory that they were captured with
            key_values = self._key_values.setdefault((rows, scope), KeyValues())
            return PrefixCache(
                rows, version, self._prefill_tokens, key_values, self._positions, compiled=True
            )
        return PrefixCache(
            rows,
            version,
            self._prefill_tokens,
            share_from=self.share_from,
            own_masks=self.own_masks,
            stateful=self._stateful,
        )

    def _run(
        self,
        tokens: th.Tensor,
        positions: th.Tensor,
        mask: ModelMask | None,
        cache: RowCache,
        **options: Any,
    ) -> th.Tensor:
        with th.autocast(tokens.device.type, self._autocast, enabled=self._autocast is not None):
            output = self._trunk(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        return cast("th.Tensor", output.last_hidden_state).float()
