"""Runs a model for rollouts: by prefix caches, and by a decode model with prepacked weights.

The decode model shares everything with the model but its linear layers, of which it has copies
(see `agents.decoding.prepacked`). It computes what the model computes, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers import PreTrainedModel

from agents.compat import cache_name, trunk_of, using_attention
from agents.decoding.copies import PREPACK_AFTER, Copies, Modules
from agents.decoding.layer_masks import LayerMasks, ModelMask, keeps_states
from agents.decoding.prefix_cache import PREFILL_TOKENS, PrefixCache
from agents.decoding.programs import Programs
from agents.decoding.row_cache import KeyValues, RowCache
from agents.decoding.shared_prefix import ATTENTION as SHARED_ATTENTION
from agents.decoding.shared_prefix import SharedPrefix
from agents.decoding.tokens import Observation, Scope
from agents.decoding.weights_version import WeightsVersion


class Decoder:
    """Runs a model for rollouts and predictions, and notices when its weights have changed.

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
        caches: What is remembered in each scope.
        compiled: See above.
        own_masks: Whether the model is told which keys rows have, (rows, keys), and makes its masks
            itself: some make the distances between tokens of that. It has to be found out whether
            the model needs it. Rows that do not go on are then read from the first token on.
        share_from: From how many common keys on steps read these once for all rows that have them;
            None: never. It has to be found out whether the model can; programs do not.
        prepacked: Whether the decode model is what runs.
        copies: The decode model.
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
        self.caches: dict[Scope, PrefixCache] = {}
        self.compiled = compiled
        self.share_from: int | None = None
        self.prepacked = False
        self.own_masks = own_masks
        config = model.config.get_text_config()
        self._masks = LayerMasks(config)
        self._stateful = keeps_states(config)
        self._cache_name = cache_name(model)
        self._model = model
        self._autocast = autocast
        self._positions = positions
        self._prefill_tokens = prefill_tokens
        self._steps = 0  # that a rollout will have, as far as is known
        self._weights_version = WeightsVersion(model)
        self._own: Modules = (trunk_of(model), head)
        self._trunk, self._head = self._own
        self._key_values: dict[Hashable, KeyValues] = {}  # of programs
        self._programs = Programs()
        self.copies = Copies(model, self._own, autocast, self._programs.clear)

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
        cache = self._cache(len(observation["prompt"]), scope)
        steps = max(cache.steps, self._steps if scope == "rollout" else 0)
        try:
            with th.inference_mode(not self.compiled), th.no_grad():
                if self.compiled or steps >= PREPACK_AFTER:
                    self.prepack(cache.weights)
                else:
                    self.use_original()
                hidden = cache.last_hidden(self.trunk, observation, self._model.device)
        except BaseException:  # an interrupt as well: half of what is remembered may be new
            self.caches.pop(scope, None)
            raise
        return hidden.clone()  # an ordinary tensor

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        cache = self.caches.get("rollout")
        if self.compiled:  # programs were captured with the memory of all rows
            self.caches.pop("rollout", None)
        elif cache is not None:
            del self.caches["rollout"]  # an exception would leave it half as it was
            with th.inference_mode():
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
        self._trunk, self._head = self.copies.of(version)
        self.prepacked = True

    def use_original(self) -> None:
        """Run by the model itself."""
        self._trunk, self._head = self._own
        self.prepacked = False

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
        return self.compiled and self._model.device.type == "cuda"

    def _look_closely(self) -> None:
        """Drop what is remembered if weights have changed in a way that their version misses."""
        if self._weights_version.missed_a_change():
            self.clear()

    def _cache(self, rows: int, scope: Scope) -> PrefixCache:
        """Return the cache at hand, or a new one if it is of other rows or weights."""
        version = self._weights_version()
        cache = self.caches.get(scope)
        if cache is not None and cache.weights != version:
            self.clear()
        elif cache is not None and cache.rows == rows:
            return cache
        del cache
        self.caches.pop(scope, None)  # its memory first
        if self.compiled:  # programs go on with the memory that they were captured with
            key_values = self._key_values.setdefault((rows, scope), KeyValues())
            made = PrefixCache(
                rows, version, self._prefill_tokens, key_values, self._positions, compiled=True
            )
        else:
            made = PrefixCache(
                rows,
                version,
                self._prefill_tokens,
                share_from=self.share_from,
                own_masks=self.own_masks,
                stateful=self._stateful,
            )
        self.caches[scope] = made
        return made

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
