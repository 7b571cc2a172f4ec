"""A causal language model of `transformers` as a backbone: packed, cached, compiled, with LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th

from agents.compat import trunk_of, using_attention
from agents.decoding.decoder import Decoder
from agents.decoding.packing import ATTENTION, Packing, ends
from agents.decoding.prefix_cache import PREFILL_TOKENS
from agents.decoding.shared_prefix import LEAST_KEYS
from agents.decoding.tokens import Observation, Scope, chunks, join_tokens
from agents.models.hugging_face import HuggingFaceBackbone
from agents.models.layout import CausalLayout, SequenceBatch
from agents.models.loading import (
    ModelSpec,
    check_sizes,
    longest_sequence,
    rows_of,
    tiny_config,
)
from agents.models.lora import AdapterSpec
from agents.models.output import WholeHead
from agents.models.probes import probe


class CausalBackbone(HuggingFaceBackbone):
    """A `transformers` causal language model, seen as trunk and head.

    Args:
        model: "tiny", a name or path that `AutoModelForCausalLM.from_pretrained` resolves, or a
            config, whose model is initialised at random. An adapter that `peft` has saved is
            trained on.
        vocab_size: How many tokens the tokenizer has.
        max_tokens: The longest sequence that the model will see, in tokens.
        eos_token_id: The token that ends a turn; set in a new model's generation settings.
        pad_token_id: The padding token; likewise.
        adapter: A LoRA adapter to train instead of the weights; see `agents.models.lora`.
        autocast: The lower precision that the trunk computes in, such as `torch.bfloat16`. The
            weights and everything from the last hidden states on stay in float32.
        gradient_checkpointing: Whether to keep each layer's input only and to compute the rest
            once more in the backward pass: less memory, a third more computation.
        compiled: Whether rollouts run compiled programs; see `agents.decoding.decoder.Decoder`.
        prefill_tokens: How many tokens, padding included, a forward reads that computes the
            hidden states of observations.
        init_kwargs: Further arguments of `from_pretrained`.

    Attributes:
        longest: The most tokens that it can read.

    Raises:
        ValueError: If the model cannot be loaded, its vocabulary or positions are too small, it
            does something that trunk and head alone do not reproduce, or it is an adapter and
            another one is to be trained; in use, if it is to read a token that it lacks.
    """

    def __init__(
        self,
        model: ModelSpec,
        vocab_size: int,
        max_tokens: int,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        *,
        adapter: AdapterSpec | None = None,
        autocast: th.dtype | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        prefill_tokens: int = PREFILL_TOKENS,
        init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str) and model == "tiny":
            model = tiny_config(vocab_size, max_tokens)
            model.eos_token_id, model.pad_token_id = eos_token_id, None
        super().__init__(model, adapter, init_kwargs)
        self.layout, self.convention = CausalLayout(), "causal"
        check_sizes(self.model, vocab_size, max_tokens, eos_token_id)
        self.max_tokens = max_tokens
        self.longest: float = max_tokens
        if not compiled:  # whose memory is as long as the budgets
            self.longest = max(max_tokens, longest_sequence(self.model.config.get_text_config())[0])
        self.prefill_tokens = prefill_tokens
        # How many tokens the model knows, if the tokenizer has more.
        self._known = rows if (rows := rows_of(self.model)) < vocab_size else None
        self.linear_head, self.own_masks = True, False
        with th.no_grad():
            first = self.trunk(input_ids=th.zeros(1, 1, dtype=th.long), use_cache=False)
        self.hidden_size = first.shape[-1]
        self.num_logits = int(cast("Any", self.model.get_output_embeddings()).weight.shape[0])
        self.capabilities = probe(self, max_tokens)
        self.finish(autocast, gradient_checkpointing, compiled)

    def longest_prompt(self, response: int) -> float:
        """Return the most tokens of a prompt before a response of some tokens; below 1: none."""
        return self.longest - response

    def trunk(self, **inputs: Any) -> th.Tensor:
        """Return the last hidden states, (n, tokens, hidden)."""
        if th.is_grad_enabled():
            self.clear_cache()  # An update needs the memory, and changes the weights.
        with self._recomputing(), self._autocasting(inputs["input_ids"].device):
            output = trunk_of(self.model)(**inputs)
        return cast("th.Tensor", output.last_hidden_state).float()

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from, row by row."""
        if self.capabilities.packs is not None:
            return self.padded(batch)
        return self.packed(batch, share=self.capabilities.shares is None)

    def padded(self, batch: SequenceBatch) -> th.Tensor:
        """Return what `hidden_states` does, with padding."""
        tokens = self._readable(batch.tokens, ends(batch.action_positions))
        return self.trunk(input_ids=tokens, use_cache=False)[batch.action_positions]

    def packed(self, batch: SequenceBatch, share: bool = True) -> th.Tensor:
        """Return what `hidden_states` does, without padding; see `agents.decoding.packing`.

        Args:
            batch: The sequences.
            share: Whether prefixes that they share are computed once.
        """
        packing = Packing(batch.action_positions, batch.tokens if share else None)
        if packing.is_full:
            return self.padded(batch)
        tokens = packing.row(batch.tokens)
        with using_attention(self.model.config, ATTENTION):
            hidden = self.trunk(
                input_ids=self._readable(tokens),
                position_ids=packing.positions,
                use_cache=False,
                packing=packing,
            )
        return hidden[0].index_select(0, packing.actions)

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self.head(hidden))

    @property
    def head(self) -> th.nn.Module:
        """What makes logits of hidden states: the output layer, and what is behind it."""
        return self.model.get_output_embeddings() if self.linear_head else WholeHead(self.model)

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), all of it computed.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
        """
        tokens, lengths = join_tokens(observation)
        rows = chunks(lengths, self.prefill_tokens)
        parts = [self._last_hidden(tokens[some], lengths[some]) for some in rows]
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(rows))
        return th.cat(parts)[th.as_tensor(back, device=self.model.device)]

    def next_hidden(self, observation: Observation, scope: Scope = "rollout") -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), without gradients.

        Args:
            observation: See `last_hidden`, which gives the same, up to rounding.
            scope: "predict" leaves alone what a rollout remembers, and how it is rounded.
        """
        if not self.decodes:
            with th.no_grad():
                return self.last_hidden(observation)
        if self._known is not None:
            for row, length in zip(*join_tokens(observation), strict=True):
                self._readable(th.from_numpy(row[:length]))
        return self.decoder.next_hidden(observation, scope)

    @property
    def decoder(self) -> Decoder:
        """What rollouts run the model by."""
        if self._decoder is None:
            decoder = Decoder(
                self.model,
                self.head,
                autocast=self.autocast,
                compiled=self.compiled,
                positions=self.max_tokens,
                prefill_tokens=self.prefill_tokens,
                own_masks=self.own_masks,
            )
            if self.capabilities.shares is None:
                decoder.share_from = LEAST_KEYS
            self._decoder = decoder
        return cast("Decoder", self._decoder)

    def _last_hidden(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> th.Tensor:
        rows = tokens[:, : int(lengths.max())], lengths - 1
        inputs, last = (th.as_tensor(array, device=self.model.device) for array in rows)
        real = th.arange(inputs.shape[1], device=inputs.device) <= last[:, None]
        hidden = self.trunk(input_ids=self._readable(inputs, real), use_cache=False)
        return hidden[th.arange(len(inputs), device=inputs.device), last]

    def _readable(self, tokens: th.Tensor, real: th.Tensor | None = None) -> th.Tensor:
        """Return tokens that the model can read, of padding that it lacks some other token.

        Args:
            tokens: Token ids.
            real: Where they are no padding. None: everywhere.

        Raises:
            ValueError: If the model lacks one that is no padding.
        """
        if self._known is None:
            return tokens
        if real is not None:
            tokens = tokens.where(real, 0)
        if int(tokens.max()) >= self._known:
            raise ValueError(
                f"The model has {self._known} tokens, but it is to read the token "
                f"{int(tokens.max())}: use the model's own tokenizer (gym.make(..., "
                "tokenizer=...)), or resize the model (model.resize_token_embeddings)."
            )
        return tokens
