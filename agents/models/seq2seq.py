"""An encoder-decoder of `transformers` as a backbone: T5, BART, Marian, M2M100, ..."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from agents.decoding.prefix_cache import PREFILL_TOKENS
from agents.decoding.seq2seq import Seq2SeqDecoder
from agents.decoding.tokens import Observation, Scope, chunks
from agents.models.backbone import Capabilities
from agents.models.hugging_face import HuggingFaceBackbone
from agents.models.layout import Seq2SeqLayout, SequenceBatch
from agents.models.loading import ModelSpec
from agents.models.lora import AdapterSpec
from agents.models.output import WholeHead
from agents.models.probes import NO_STEPS, kind_of, realistic_weights, two_tokens, why_not
from agents.models.seq2seq_config import (
    HALVES,
    check_sizes,
    expert_capacity,
    limit_of,
    prefix_of,
    readable_tokens,
    warn_of_settings,
)

# Why models cannot go on from keys and values, or None, by their kind, once they were tried.
_TRIED: dict[Hashable, str | None] = {}


class Seq2SeqBackbone(HuggingFaceBackbone):
    """A `transformers` encoder-decoder: prompts are encoded, responses decoded.

    The decoder reads the model's start token, and a forced first token such as the language of a
    translation if the model has one, before the response; they are no actions.

    Args:
        model: A name or path that `AutoModelForSeq2SeqLM.from_pretrained` resolves, or a config,
            whose model is initialised at random. An adapter that `peft` has saved is trained on.
        vocab_size: How many tokens the tokenizer has.
        max_prompt: The most tokens of a prompt.
        max_response: The most tokens of a response.
        eos_token_id: The token that ends a turn.
        pad_token_id: The padding token.
        adapter: A LoRA adapter to train instead of the weights; see `agents.models.lora`.
        autocast: The lower precision that encoder and decoder compute in; see `CausalBackbone`.
        gradient_checkpointing: Whether to keep each layer's input only; see `CausalBackbone`.
        compiled: Whether rollouts run compiled programs; see `Seq2SeqDecoder`.
        prefill_tokens: How many tokens, padding included, a forward reads that computes prompts.
        init_kwargs: Further arguments of `from_pretrained`.

    Attributes:
        prefix: What the decoder reads before a response.
        never_said: Tokens that it must not emit: padding, with which many decoders start.

    Raises:
        ValueError: If the model cannot be loaded, or is too small for the budgets.
    """

    def __init__(
        self,
        model: ModelSpec,
        vocab_size: int,
        max_prompt: int,
        max_response: int,
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
        super().__init__(model, adapter, init_kwargs)
        self.prefix = prefix_of(self.model)
        self.layout, self.convention = Seq2SeqLayout(self.prefix), "encoder"
        own_pad = self.model.config.pad_token_id
        pads = {token for token in (pad_token_id, own_pad) if token is not None}
        self.never_said = tuple(sorted(pads - {eos_token_id}))
        self.max_response = max_response
        self.prefill_tokens = prefill_tokens
        check_sizes(self.model, vocab_size, max_prompt, max_response + len(self.prefix))
        self._longest = {half: limit_of(self.model, half)[0] for half in HALVES}
        warn_of_settings(self.model)
        self.readable = readable_tokens(self.model.get_encoder())
        decoder = cast("nn.Module", self.model.get_decoder())
        self._reads_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        self.num_logits = int(cast("Any", self.model.get_output_embeddings()).weight.shape[0])
        self.hidden_size = int(self.model.config.get_text_config(decoder=True).hidden_size)
        kind = kind_of(self.model), min(4, max_response)
        if kind not in _TRIED:
            with realistic_weights(self.model), th.no_grad():
                self._refuse()
                _TRIED[kind] = self._why_no_cache()
        reason = _TRIED[kind]
        capacity = expert_capacity(self.model)
        if capacity < max_response + len(self.prefix):
            reason = reason or (
                f"its experts read {capacity} tokens of a row, and others in what is read at once"
            )
        elif reason is None:
            self._longest["decoder"] = min(self._longest["decoder"], capacity)
        if reason is not None:
            warnings.warn(
                f"{type(self.model).__name__} cannot go on from the keys and values of rows of "
                f"different lengths ({reason}): each token of a rollout will cost its whole turn.",
                stacklevel=2,
            )
        self.capabilities = Capabilities(
            caches=reason,
            packs="each turn is a row of its own",
            compiles=_why_no_programs(reason, capacity),
        )
        self.finish(autocast, gradient_checkpointing, compiled)

    def longest_prompt(self, response: int) -> float:
        """Return the most tokens of a prompt; below 1: the response cannot be that long."""
        fits = response + len(self.prefix) <= self._longest["decoder"]
        return self._longest["encoder"] if fits else 0

    @property
    def device(self) -> th.device:
        """Where the model is."""
        return self.model.device

    @property
    def head(self) -> nn.Module:
        """What makes logits of hidden states: the output layer, and what is around it."""
        return WholeHead(self.model)

    def encode(self, tokens: th.Tensor, lengths: th.Tensor) -> th.Tensor:
        """Return what the encoder makes (n, width, hidden) of prompts, the same ones once.

        Args:
            tokens: (n, width) the prompts, padded on the right.
            lengths: (n,) how many tokens each of them has.
        """
        keys = th.cat([lengths[:, None].to(tokens.dtype), tokens], dim=1)
        distinct, where = th.unique(keys, dim=0, return_inverse=True)
        tokens, lengths = distinct[:, 1:], distinct[:, 0]
        with self._recomputing(), self._autocasting(tokens.device):
            output = self.model.get_encoder()(
                input_ids=tokens, attention_mask=_real(tokens, lengths)
            )
        return cast("th.Tensor", output.last_hidden_state)[where]

    def decode(
        self,
        tokens: th.Tensor,
        memory: th.Tensor,
        lengths: th.Tensor,
        positions: th.Tensor | None = None,
        mask: th.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        decoder: Callable[..., Any] | None = None,
    ) -> th.Tensor:
        """Return the decoder's last hidden states (n, q, hidden).

        Args:
            tokens: (n, q) what it reads.
            memory: (n, width, hidden) what was encoded.
            lengths: (n,) how much of that each row has.
            positions: (n, q) the tokens' positions, for a model that is told them. None: from the
                first on.
            mask: Boolean (n, 1, q, k), which keys they see. None: all up to themselves.
            cache: Where keys and values go and come from.
            decoder: What computes it, and knows positions that no model is told. None: the model's
                own decoder.
        """
        if mask is not None:
            dtype = self.autocast or self.model.dtype
            mask = mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, th.finfo(dtype).min)
        decoder = cast("nn.Module", self.model.get_decoder()) if decoder is None else decoder
        told = positions is not None and self._reads_positions
        options = {"position_ids": positions} if told else {}
        with self._recomputing(), self._autocasting(tokens.device):
            output = decoder(
                input_ids=tokens,
                attention_mask=mask,
                encoder_hidden_states=memory,
                encoder_attention_mask=_real(memory, lengths),
                past_key_values=cache,
                use_cache=cache is not None,
                **options,
            )
        return cast("th.Tensor", output.last_hidden_state).to(self.model.dtype)

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from, row by row."""
        if th.is_grad_enabled():
            self.clear_cache()  # An update needs the memory, and changes the weights.
        assert batch.source is not None and batch.source_lengths is not None
        encoded = self.encode(batch.source, batch.source_lengths)
        hidden = self.decode(batch.tokens, encoded, batch.source_lengths)
        return hidden[batch.action_positions]

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), all of it computed.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
        """
        sizes = (observation["prompt_length"] + observation["response_length"])[:, 0]
        rows = chunks(sizes + len(self.prefix), self.prefill_tokens)
        parts = [self._last_hidden(observation, some) for some in rows]
        back = np.argsort(np.concatenate(rows))
        return th.cat(parts)[th.as_tensor(back, device=self.device)]

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self.head(hidden))

    def next_hidden(self, observation: Observation, scope: Scope = "rollout") -> th.Tensor:
        """Return what `last_hidden` does, up to rounding, without gradients, from the cache."""
        if not self.decodes:
            with th.no_grad():
                return self.last_hidden(observation)
        return self.decoder.next_hidden(observation, scope)

    @property
    def decoder(self) -> Seq2SeqDecoder:
        """What rollouts run the model by."""
        if self._decoder is None:
            self._decoder = Seq2SeqDecoder(
                self.model,
                self.head,
                self,
                self.prefix,
                len(self.prefix) + self.max_response,
                self.prefill_tokens,
                self.autocast,
                self.compiled,
            )
        return cast("Seq2SeqDecoder", self._decoder)

    def generation_settings(self) -> dict[str, Any]:
        """Return what `generate` starts with, and what it must not say."""
        start, *forced = self.prefix
        return {
            "decoder_start_token_id": start,
            "forced_bos_token_id": forced[0] if forced else None,
            "suppress_tokens": list(self.never_said) or None,
        }

    def save_merged(self, folder: Path) -> None:
        """Write the whole model; a forced first token is a setting of `generate`."""
        config, settings = self.model.config, self.model.generation_config
        forced, config.forced_bos_token_id = config.forced_bos_token_id, None
        if settings is not None:
            settings.forced_bos_token_id = forced
        try:
            super().save_merged(folder)
        finally:
            config.forced_bos_token_id = forced

    def _last_hidden(self, observation: Observation, rows: npt.NDArray[np.intp]) -> th.Tensor:
        prompts, lengths = observation["prompt"][rows], observation["prompt_length"][rows, 0]
        said = observation["response_length"][rows, 0]
        prefix = np.tile(np.array(self.prefix, dtype=np.int64), (len(rows), 1))
        response = observation["response"][rows][:, : said.max()]
        arrays = (prompts[:, : lengths.max()], lengths, np.hstack([prefix, response]), said)
        source, sizes, tokens, count = (th.as_tensor(array, device=self.device) for array in arrays)
        encoded = self.encode(source, sizes)
        hidden = self.decode(tokens, encoded, sizes)
        last = len(self.prefix) - 1 + count
        return hidden[th.arange(len(rows), device=self.device), last]

    def _refuse(self) -> None:
        """Raise a ValueError if a row depends on others, or logits on more than hidden states."""
        name, lengths = type(self.model).__name__, [[4, 3], [2, 1], [1, 2]]
        random = np.random.default_rng(0)
        rows = self._tried(random, 3)
        rows |= {
            "prompt_length": np.array(lengths)[:, :1],
            "response_length": np.minimum(np.array(lengths)[:, 1:], self.max_response - 1),
        }
        one_by_one = [{k: v[i : i + 1] for k, v in rows.items()} for i in range(3)]
        alone = th.cat([self._last_hidden(row, np.arange(1)) for row in one_by_one])
        reason = why_not(partial(self._last_hidden, rows, np.arange(3)), alone)
        if reason is not None:
            raise ValueError(
                f"{name} computes a row otherwise when others are beside it ({reason}), which is "
                "not supported: choose another encoder-decoder (T5, BART, Marian, M2M100, ...)."
            )
        tokens = th.tensor([[*self.prefix, *rows["response"][0, :1].tolist()]])
        source = th.as_tensor(rows["prompt"][:1])
        expected = self.model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits[0]
        encoded = self.encode(source, th.tensor([source.shape[1]]))
        hidden = self.decode(tokens, encoded, th.tensor([source.shape[1]]))[0]
        reason = why_not(partial(self.logits, hidden), expected)
        if reason is not None:
            raise ValueError(
                f"{name} makes its logits of more than its last hidden states ({reason}), which is "
                "not supported: choose another encoder-decoder (T5, BART, Marian, M2M100, ...)."
            )

    def _tried(self, random: np.random.Generator, rows: int) -> dict[str, npt.NDArray[Any]]:
        """Return prompts and responses to try; in some models padding has no position."""
        tokens = two_tokens(self.model, self.never_said).numpy()
        return {
            "prompt": random.choice(tokens, (rows, 4)),
            "response": random.choice(tokens, (rows, self.max_response)),
        }

    def _why_no_cache(self) -> str | None:
        """Return why the model cannot go on from keys and values of rows of different lengths."""
        rows = 12
        most = max(0, min(3, self.max_response - 1))
        fixed = self._tried(np.random.default_rng(0), rows)
        fixed["prompt_length"] = np.resize([4, 2, 1], (rows, 1))
        reason = None
        for step in range(most + 1):
            # Some begin late: their rows are as long as others were before.
            said = np.maximum(0, step - np.resize([0, 1], (rows, 1)))
            observation = {**fixed, "response_length": said}
            ask = partial(self.decoder.next_hidden, observation, "rollout")
            reason = reason or why_not(ask, self.last_hidden(observation))
        return reason


def _real(tokens: th.Tensor, lengths: th.Tensor) -> th.Tensor:
    """Return where rows (n, width, ...) are no padding, as 1 and 0."""
    return (th.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()


def _why_no_programs(caches: str | None, capacity: float) -> str | None:
    """Return why steps are not compiled."""
    if caches is not None:
        return NO_STEPS
    return None if capacity == math.inf else "what its experts read depends on the tokens"
