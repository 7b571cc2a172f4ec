"""A causal language model of `transformers` as a backbone: packed, cached, compiled, with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from transformers import PretrainedConfig

from agents.compat import trunk_of, using_attention
from agents.decoding.decoder import Decoder
from agents.decoding.packing import ATTENTION, Packing, ends
from agents.decoding.prefix_cache import PREFILL_TOKENS
from agents.decoding.shared_prefix import LEAST_KEYS
from agents.decoding.tokens import Observation, Scope, chunks, join_tokens
from agents.models.backbone import Backbone
from agents.models.checkpointing import checkpoint_layers, recomputing
from agents.models.layout import CausalLayout, SequenceBatch
from agents.models.loading import (
    ModelSpec,
    check_sizes,
    load_model,
    longest_sequence,
    rows_of,
    tiny_config,
)
from agents.models.lora import Adapter, AdapterSpec, adapter_folder
from agents.models.output import WholeHead
from agents.models.probes import probe


class CausalBackbone(Backbone):
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
    ) -> None:
        super().__init__()
        self.layout = CausalLayout()
        if isinstance(model, str) and model == "tiny":
            model = tiny_config(vocab_size, max_tokens)
            model.eos_token_id, model.pad_token_id = eos_token_id, None
        saved = adapter_folder(model) if isinstance(model, (str, Path)) else None
        if saved is not None and adapter is not None:
            raise ValueError(
                f"{str(model)!r} is an adapter, which is trained on: leave peft_config out, or "
                "merge it into its model (policy.save_pretrained(..., merge=True)) and give that."
            )
        source = model if saved is None else saved[1]
        self.model = load_model(source)
        self.model.eval()
        check_sizes(self.model, vocab_size, max_tokens, eos_token_id)
        self.max_tokens = max_tokens
        self.longest = max_tokens
        if not compiled:  # whose memory is as long as the budgets
            self.longest = max(max_tokens, longest_sequence(self.model.config.get_text_config())[0])
        self.prefill_tokens = prefill_tokens
        # How many tokens the model knows, if the tokenizer has more.
        self._known = rows if (rows := rows_of(self.model)) < vocab_size else None
        self._decoder: Decoder | None = None
        self.adapter = None
        if saved is not None or adapter is not None:
            name = None if isinstance(source, PretrainedConfig) else _absolute(source)
            spec = cast("AdapterSpec", adapter) if saved is None else saved[0]
            self.adapter = Adapter(self.model, spec, name)
        # What is probed is the model in float32, by nobody's programs.
        self.autocast: th.dtype | None = None
        self.compiled = False
        self._checkpointed: list[th.nn.Module] = []
        self.linear_head, self.own_masks = True, False
        with th.no_grad():
            first = self.trunk(input_ids=th.zeros(1, 1, dtype=th.long), use_cache=False)
        self.hidden_size = first.shape[-1]
        self.num_logits = int(cast("Any", self.model.get_output_embeddings()).weight.shape[0])
        self.capabilities = probe(self, max_tokens)
        self.autocast, self.compiled, self._decoder = autocast, compiled, None
        if gradient_checkpointing:
            self._checkpointed = checkpoint_layers(self.model)

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    def trunk(self, **inputs: Any) -> th.Tensor:
        """Return the last hidden states, (n, tokens, hidden)."""
        gradients = th.is_grad_enabled()
        if gradients:
            self.clear_cache()  # An update needs the memory, and changes the weights.
        device = inputs["input_ids"].device.type
        with (
            recomputing(self._checkpointed, gradients),
            th.autocast(device, self.autocast, enabled=self.autocast is not None),
        ):
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
    def decodes(self) -> bool:
        """Whether the decoder runs now; what it remembers is of the model with its own adapter."""
        return self.capabilities.caches is None and (self.adapter is None or self.adapter.in_place)

    def next_logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states, by what rollouts run the head by."""
        return self.decoder.head(hidden) if self.decodes else self.logits(hidden)

    def program(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of hidden states as rollouts run it, compiled if that is wanted."""
        return self.decoder.program(key, function) if self.decodes else function

    def save_pretrained(self, folder: Path) -> None:
        """Write the model; of one that can be loaded from elsewhere, its adapter alone."""
        if self.adapter is None:
            self.model.save_pretrained(folder)
        elif self.adapter.base is None:
            self.adapter.merged().save_pretrained(folder)
        else:
            self.adapter.save_pretrained(folder)

    def merge_adapter(self) -> None:
        """Add the adapter, if there is one, to the weights, which are all trained from now on."""
        if self.adapter is not None:
            self.model, self.adapter, self._decoder = self.adapter.merge(), None, None
            self.model.requires_grad_(True)

    @property
    def decoder(self) -> Decoder:
        """What rollouts run the model by."""
        if self._decoder is None:
            self._decoder = Decoder(
                self.model,
                self.head,
                autocast=self.autocast,
                compiled=self.compiled,
                positions=self.max_tokens,
                prefill_tokens=self.prefill_tokens,
                own_masks=self.own_masks,
            )
            if self.capabilities.shares is None:
                self._decoder.share_from = LEAST_KEYS
        return self._decoder

    def start_rollout(self, steps: int) -> None:
        """Drop what is remembered, and prepare for a rollout of so many steps."""
        self.decoder.start_rollout(steps)

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these of the rollout's rows, in this order, at the cost of a step each."""
        self.decoder.keep_rows(rows)

    def clear_cache(self) -> None:
        """Let all memory of rollouts go but that of compiled programs."""
        if self._decoder is not None:
            self._decoder.clear()

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


def _absolute(model: str | Path) -> str:
    """Return a name, or a path that is the same from everywhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)
