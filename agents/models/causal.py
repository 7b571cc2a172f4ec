"""The language model behind a policy: how it is made, and what it computes for token sequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch as th
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.decoding.decoder import PACK_AFTER, Decoder
from agents.decoding.packing import ATTENTION, Packing, attending
from agents.decoding.prefix_cache import Observation, PrefixMemo, RowCache, join_tokens
from agents.models.backbone import Backbone, Scope
from agents.models.layout import CausalLayout, SequenceBatch
from agents.models.lora import Adapter, AdapterSpec

ModelSpec = str | Path | PretrainedConfig


def tiny_config(vocab_size: int, max_positions: int) -> LlamaConfig:
    """Return the embedded default: a Llama of about one million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        # As wide as a small model wants it: with 0.02, made for large ones, learning starts late.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
    )


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
    ) -> None:
        super().__init__()
        self.layout = CausalLayout()
        if isinstance(model, str) and model == "tiny":
            model = tiny_config(vocab_size, max_tokens)
            model.eos_token_id, model.pad_token_id = eos_token_id, None
        self.model = _load(model)
        self.model.eval()
        config = self.model.config.get_text_config()
        _check_sizes(config, self.model, vocab_size, max_tokens)
        self.hidden_size = config.hidden_size
        head = cast("th.nn.Linear", self.model.get_output_embeddings())
        self.num_logits = int(head.weight.shape[0])
        self.max_tokens = max_tokens
        self.memo: PrefixMemo | None = None  # of rollouts
        self._aside: PrefixMemo | None = None  # of predictions
        self._steps = 0  # that a rollout will have, as far as is known
        self._decoder: Decoder | None = None
        self.adapter = None if adapter is None else Adapter(self.model, adapter)
        # What is checked is the model in float32, by nobody's programs.
        self.autocast: th.dtype | None = None
        self.compiled = False
        self._checkpointed: list[GradientCheckpointingLayer] = []
        self._check_head()
        self.packs = self._can_pack()
        self.remembers = True
        self.remembers = self._can_remember()
        self.autocast, self.compiled, self._decoder = autocast, compiled, None
        if gradient_checkpointing:
            self._checkpoint_layers()

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.model.config

    def trunk(self, **inputs: Any) -> th.Tensor:
        """Return the last hidden states, (n, tokens, hidden)."""
        if th.is_grad_enabled():
            self.clear_cache()  # An update needs the memory, and changes the weights.
        for layer in self._checkpointed:
            # Their flag alone, not that of what is in them: dropout stays off (see `_recomputed`).
            layer.training = th.is_grad_enabled()
        device = inputs["input_ids"].device.type
        try:
            with th.autocast(device, self.autocast, enabled=self.autocast is not None):
                output = self.model.base_model(**inputs)
        finally:
            for layer in self._checkpointed:
                layer.training = False
        return cast("th.Tensor", output.last_hidden_state).float()

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from, row by row."""
        tokens, wanted = batch.tokens, batch.action_positions
        packing = Packing(wanted) if self.packs else None
        if packing is None or packing.is_full:
            return self.trunk(input_ids=tokens, use_cache=False)[wanted]
        with attending(self.model.config, ATTENTION):
            hidden = self.trunk(
                input_ids=packing.row(tokens),
                position_ids=packing.positions,
                use_cache=False,
                packing=packing,
            )
        return hidden[packing.row(wanted)]

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits of hidden states."""
        return cast("th.Tensor", self.model.get_output_embeddings()(hidden))

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), all of it computed.

        Args:
            observation: `prompt`, `prompt_length`, `response`, `response_length`, on the host.
        """
        rows = join_tokens(observation)
        tokens, lengths = (th.as_tensor(array, device=self.model.device) for array in rows)
        hidden = self.trunk(input_ids=tokens, use_cache=False)
        return hidden[th.arange(len(tokens), device=tokens.device), lengths - 1]

    def next_hidden(self, observation: Observation, scope: Scope = "rollout") -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden), without gradients.

        What is remembered of the last call's rows is used and renewed. It is forgotten when the
        weights or the number of rows have changed.

        Args:
            observation: See `last_hidden`, which gives the same, up to rounding.
            scope: "predict" leaves alone what a rollout remembers, and how it is rounded.
        """
        if not self.decodes:
            with th.no_grad():
                return self.last_hidden(observation)
        aside = scope == "predict"
        memo = self._memo(len(observation["prompt"]), aside)
        steps = max(memo.decoded, 0 if aside else self._steps)
        with th.inference_mode(not self.decoder.compiled), th.no_grad():
            if self.decoder.compiled or steps >= PACK_AFTER:
                self.decoder.prepack(memo.weights)
            else:
                self.decoder.use_original()
            hidden = memo.last_hidden(self._cached_forward, observation, self.model.device)
        return hidden.clone()  # an ordinary tensor

    def _memo(self, rows: int, aside: bool) -> PrefixMemo:
        """Return the memo at hand, or a new one if it is of other rows or weights."""
        version = self.decoder.weights_version()
        memo = self._aside if aside else self.memo
        if memo is not None and memo.weights != version:
            steps = self._steps
            self.clear_cache()
            self._steps = steps
        elif memo is not None and memo.rows == rows:
            return memo
        if aside:
            self._aside = None  # its memory first
            self._aside = memo = self.decoder.new_memo(rows, version, "aside")
        else:
            self.memo = None
            self.memo = memo = self.decoder.new_memo(rows, version)
        return memo

    @property
    def decodes(self) -> bool:
        """Whether the decoder runs now; what it remembers is of the model with its adapter."""
        return self.remembers and (self.adapter is None or self.adapter.enabled)

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
            self._decoder = Decoder(self.model, self.autocast, self.compiled, self.max_tokens)
        return self._decoder

    def start_rollout(self, steps: int) -> None:
        """Forget everything, and prepare for a rollout of so many steps."""
        self.clear_cache()
        self._steps = steps

    def clear_cache(self) -> None:
        """Drop what is remembered, and what rollouts hold of the weights."""
        self.memo = self._aside = None
        self._steps = 0
        if self._decoder is not None:
            self._decoder.forget()

    def _cached_forward(
        self, tokens: th.Tensor, positions: th.Tensor, mask: th.Tensor, cache: RowCache
    ) -> th.Tensor:
        # To be added to the scores: SDPA would make it of a boolean one in each layer anew, and
        # other attentions take no boolean one.
        dtype = self.autocast or self.model.dtype
        mask = mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, th.finfo(dtype).min)
        return self.decoder.trunk(tokens, positions, mask, cache)

    def _checkpoint_layers(self) -> None:
        if not self.model.supports_gradient_checkpointing:
            raise ValueError(
                f"{type(self.model).__name__} does not support gradient checkpointing: leave "
                "gradient_checkpointing out."
            )
        self._checkpointed = [
            layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)
        ]
        for layer in self._checkpointed:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(  # type: ignore[assignment]
                _recomputed, layer, self.model.config
            )

    @th.no_grad()
    def _check_head(self) -> None:
        tokens = th.arange(2)[None, :]
        expected = self.model(input_ids=tokens, use_cache=False).logits
        actual = self.logits(self.trunk(input_ids=tokens, use_cache=False))
        if not th.allclose(expected, actual, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the output layer, which is "
                "not supported: choose a model whose logits are a linear layer of its last hidden "
                "states (GPT-2, Llama, Qwen, Mistral, ...)."
            )

    def _can_remember(self) -> bool:
        """Return whether the model's layers can go on from keys and values of ragged rows."""
        # Long prompts grow by little, short ones by much; many, since a wrong row may by chance
        # differ by little.
        rows, random = 16, np.random.default_rng(0)
        fixed = {
            "prompt": random.integers(0, 2, (rows, 3)),
            "prompt_length": np.resize([3, 1], (rows, 1)),
            "response": random.integers(0, 2, (rows, 5)),
        }
        try:
            for lengths in ([0, 0], [2, 5]):
                observation = {**fixed, "response_length": np.resize(lengths, (rows, 1))}
                with th.no_grad():
                    expected = self.last_hidden(observation)
                if not th.allclose(self.next_hidden(observation), expected, rtol=1e-3, atol=1e-3):
                    break
            else:
                return True
        except Exception:  # whatever a model does that knows no such cache
            pass
        finally:
            self.clear_cache()
        warnings.warn(
            f"{type(self.model).__name__} cannot go on from the keys and values of rows of "
            "different lengths: each token of a rollout will cost its whole context.",
            stacklevel=3,
        )
        return False

    @th.no_grad()
    def _can_pack(self) -> bool:
        """Return whether the model's attention can be replaced and positions be given."""
        if self.model.config._attn_implementation != "sdpa":
            return False
        tokens = th.tensor([[0, 1, 0], [1, 1, 0]])
        wanted = th.tensor([[True, True, True], [True, True, False]])
        expected = self.trunk(input_ids=tokens, use_cache=False)[wanted]
        self.packs = True
        try:
            return th.allclose(
                self.hidden_states(SequenceBatch(tokens, wanted, wanted)),
                expected,
                rtol=1e-3,
                atol=1e-3,
            )
        except Exception:  # whatever a model does that knows nothing of it
            return False


def _recomputed(
    layer: th.nn.Module, config: PretrainedConfig, forward: Callable[..., Any], *inputs: Any
) -> Any:
    """Run a layer's forward, once more in the backward pass, and keep no more than its inputs."""
    # The flag has led here. Dropout that a layer applies by itself must not see it.
    layer.training = False
    implementation = config._attn_implementation

    def run(*inputs: Any) -> Any:
        with attending(config, implementation):
            return forward(*inputs)

    return checkpoint(run, *inputs, use_reentrant=False)


def _load(model: ModelSpec) -> PreTrainedModel:
    if isinstance(model, PretrainedConfig):
        return cast("PreTrainedModel", AutoModelForCausalLM.from_config(model, dtype=th.float32))
    if not isinstance(model, (str, Path)):
        raise TypeError(
            "model must be 'tiny', a name, a path or a config, "
            f"but it is a {type(model).__name__}. A model itself would be pickled into every "
            "checkpoint: save it with save_pretrained and pass the folder."
        )
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=th.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No causal language model could be loaded from {str(model)!r}. Expected 'tiny', a "
            "folder written by save_pretrained, or a hub id (needs a connection or a cached copy)."
        ) from error
    # They lie where the file had them. How a product is rounded may depend on the alignment, and a
    # resumed run has them in memory of its own.
    for tensor in chain(loaded.parameters(), loaded.buffers()):
        tensor.data = tensor.data.clone()
    return loaded


def _check_sizes(
    config: PretrainedConfig, model: PreTrainedModel, vocab_size: int, max_tokens: int
) -> None:
    embeddings = cast("th.nn.Embedding", model.get_input_embeddings())
    rows = embeddings.weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"The tokenizer has {vocab_size} tokens but the model's vocabulary only {rows}: use "
            "the model's own tokenizer (gym.make(..., tokenizer=...)), or a model of that size."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise ValueError(
            f"Prompt and response budgets add up to {max_tokens} tokens, but the model has only "
            f"{positions} positions: lower max_prompt_tokens or max_new_tokens."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and max_tokens > window:
        raise ValueError(
            f"The model attends to a sliding window of {window} tokens, but the budgets add up to "
            f"{max_tokens}: lower them, since only full attention is supported."
        )
