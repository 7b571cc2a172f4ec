"""A causal language model of `transformers` as a backbone: packed, cached, compiled, with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from transformers import PretrainedConfig

from agents.compat import using_attention
from agents.decoding.decoder import Decoder
from agents.decoding.packing import ATTENTION, Packing
from agents.decoding.prefix_cache import PREFILL_TOKENS
from agents.decoding.tokens import Observation, Scope, chunks, join_tokens
from agents.models.backbone import Backbone
from agents.models.checkpointing import checkpoint_layers, recomputing
from agents.models.layout import CausalLayout, SequenceBatch
from agents.models.loading import ModelSpec, check_sizes, load_model, tiny_config
from agents.models.lora import Adapter, AdapterSpec
from agents.models.probes import probe


class CausalBackbone(Backbone):
    """A `transformers` causal language model, seen as trunk and head.

    Args:
        model: "tiny", a name or path that `AutoModelForCausalLM.from_pretrained` resolves, or a
            config, whose model is initialised at random.
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
        ValueError: If the model cannot be loaded, its vocabulary or positions are too small, or it
            does something that trunk and head alone do not reproduce.
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
        self.model = load_model(model)
        self.model.eval()
        check_sizes(self.model, vocab_size, max_tokens)
        self.hidden_size = self.model.config.get_text_config().hidden_size
        head = cast("th.nn.Linear", self.model.get_output_embeddings())
        self.num_logits = int(head.weight.shape[0])
        self.max_tokens = max_tokens
        self.prefill_tokens = prefill_tokens
        self._decoder: Decoder | None = None
        self.adapter = None if adapter is None else Adapter(self.model, adapter)
        # What is probed is the model in float32, by nobody's programs.
        self.autocast: th.dtype | None = None
        self.compiled = False
        self._checkpointed: list[th.nn.Module] = []
        self.capabilities = probe(self)
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
            output = self.model.base_model(**inputs)
        return cast("th.Tensor", output.last_hidden_state).float()

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from, row by row."""
        packs = self.capabilities.packs is None
        return self.packed(batch) if packs else self.padded(batch)

    def padded(self, batch: SequenceBatch) -> th.Tensor:
        """Return what `hidden_states` does, with padding."""
        return self.trunk(input_ids=batch.tokens, use_cache=False)[batch.action_positions]

    def packed(self, batch: SequenceBatch) -> th.Tensor:
        """Return what `hidden_states` does, without padding; see `agents.decoding.packing`."""
        packing = Packing(batch.action_positions)
        if packing.is_full:
            return self.padded(batch)
        with using_attention(self.model.config, ATTENTION):
            hidden = self.trunk(
                input_ids=packing.row(batch.tokens),
                position_ids=packing.positions,
                use_cache=False,
                packing=packing,
            )
        return hidden[packing.row(batch.action_positions)]

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self.model.get_output_embeddings()(hidden))

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
        return self.decoder.next_hidden(observation, scope)

    @property
    def decodes(self) -> bool:
        """Whether the decoder runs now; what it remembers is of the model with its adapter."""
        return self.capabilities.caches is None and (self.adapter is None or self.adapter.enabled)

    def next_logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states, by what rollouts run the head by."""
        return self.decoder.head(hidden) if self.decodes else self.logits(hidden)

    def program(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of hidden states as rollouts run it, compiled if that is wanted."""
        return self.decoder.program(key, function) if self.decodes else function

    def save_pretrained(self, folder: Path) -> None:
        """Write the model, with an adapter added to its weights."""
        model = self.model if self.adapter is None else self.adapter.merged()
        model.save_pretrained(folder)

    @property
    def decoder(self) -> Decoder:
        """What rollouts run the model by."""
        if self._decoder is None:
            self._decoder = Decoder(
                self.model, self.autocast, self.compiled, self.max_tokens, self.prefill_tokens
            )
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
        hidden = self.trunk(input_ids=inputs, use_cache=False)
        return hidden[th.arange(len(inputs), device=inputs.device), last]
