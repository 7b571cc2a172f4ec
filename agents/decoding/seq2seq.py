"""Steps of an encoder-decoder: each prompt is encoded once, each token goes through once.

All rows write the keys of a step to one column, so that a row's own columns begin where its turn
did: attention by relative distance needs nothing else, and positions that are embedded are those
of each row (`RowPositions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from agents.compat import children_of, with_children
from agents.decoding.columns import ColumnCache, RowMemory
from agents.decoding.step_decoder import StepDecoder
from agents.decoding.tokens import Observation, Scope, Tokens, chunks

# Compiled steps attend to columns in multiples of this many.
COLUMNS = 32


class EncoderDecoder(Protocol):
    """The two halves of a model that are asked."""

    @property
    def device(self) -> th.device:
        """Where they are."""
        ...

    def encode(self, tokens: th.Tensor, lengths: th.Tensor) -> th.Tensor:
        """Return what the encoder makes (n, width, hidden) of prompts, the same ones once."""
        ...

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
        """Return the decoder's last hidden states (n, q, hidden)."""
        ...


class RowPositions(nn.Module):
    """Embeds positions that differ from row to row, where a model counts them itself.

    Args:
        embedding: The model's own layer, which is given token ids (or their shape) first.
        count: How many positions there are.

    Attributes:
        positions: (n, q) the positions to embed.
    """

    positions: th.Tensor

    def __init__(self, embedding: nn.Module, count: int) -> None:
        super().__init__()
        self.embedding = embedding
        self._count = count

    def forward(self, tokens: Any, *args: Any, **kwargs: Any) -> th.Tensor:
        """Return the embeddings (n, q, hidden)."""
        first: Any = th.Size((1, self._count))
        if isinstance(tokens, th.Tensor):
            # Some layers know padding by its id, and do not count it.
            some = int(getattr(self.embedding, "padding_idx", 0) == 0)
            first = tokens.new_full((1, self._count), some)
        table = self.embedding(first)
        return cast("th.Tensor", table.reshape(self._count, -1)[self.positions])


class Seq2SeqDecoder(StepDecoder[RowMemory]):
    """Runs an encoder-decoder for rollouts and predictions.

    Args:
        model: The model.
        head: What makes logits of its hidden states.
        halves: What computes these.
        prefix: The tokens that the decoder reads before a response.
        longest: The most tokens that the decoder reads, with those, as far as is known.
        prefill_tokens: How many tokens a forward reads that computes prompts.
        autocast: The precision that the decoder computes in. None: the model's own.
        compiled: Whether `torch.compile` makes a program of each step; on a GPU, too, it is no
            captured graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: nn.Module,
        halves: EncoderDecoder,
        prefix: Sequence[int],
        longest: int,
        prefill_tokens: int,
        autocast: th.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        own = cast("nn.Module", model.get_decoder()), head
        super().__init__(model, own, autocast, compiled)
        self._longest = longest
        self._placed: nn.Module | None = None
        self._halves = (halves,)  # no copy of a model copies it with this
        self._prefix = np.array(prefix, dtype=np.int64)
        self._prefill_tokens = prefill_tokens
        self.use_original()

    def _use(self, trunk: nn.Module, head: nn.Module) -> None:
        """Run by these modules; positions are embedded row by row where the trunk embeds any."""
        self._head = head
        if self._placed is trunk:
            return
        self._placed, self._trunk, self._positions = trunk, trunk, None
        children = children_of(trunk)
        layer = children.get("embed_positions")
        if layer is not None:  # otherwise it knows distances alone
            self._positions = RowPositions(layer, self._longest)
            self._trunk = with_children(trunk, {**children, "embed_positions": self._positions})

    def _next(self, memory: RowMemory, observation: Observation) -> th.Tensor:
        hidden = self._hidden(memory, observation)
        memory.steps += 1
        memory.seen = {key: np.array(values) for key, values in observation.items()}
        return hidden

    def _hidden(self, memory: RowMemory, observation: Observation) -> th.Tensor:
        goes_on = memory.goes_on(observation)
        memory.advance()
        new = np.flatnonzero(~goes_on)
        filled = self._fill(memory, observation, new) if len(new) else None
        if filled is not None and len(new) == memory.rows:
            return filled
        hidden = self._step(memory, observation)
        if filled is not None:
            hidden[th.as_tensor(new, device=hidden.device)] = filled
        return hidden

    def _fill(
        self, memory: RowMemory, observation: Observation, rows: npt.NDArray[np.intp]
    ) -> th.Tensor:
        """Encode prompts, and read what was said to them; return the last hidden states."""
        sizes = observation["prompt_length"][rows, 0] + memory.longest
        found: dict[int, th.Tensor] = {}
        for some in chunks(sizes, self._prefill_tokens):
            hidden = self._fill_some(memory, observation, rows[some])
            found.update(zip(some.tolist(), hidden, strict=True))
        return th.stack([found[i] for i in range(len(rows))])

    def _fill_some(
        self, memory: RowMemory, observation: Observation, rows: npt.NDArray[np.intp]
    ) -> th.Tensor:
        device = self._device
        prompts, lengths = observation["prompt"][rows], observation["prompt_length"][rows, 0]
        source = th.as_tensor(prompts[:, : lengths.max()], device=device)
        source_lengths = th.as_tensor(lengths, device=device)
        encoded = self._halves[0].encode(source, source_lengths)
        tokens, starts = _left_padded(self._prefix, observation, rows)
        width = tokens.shape[1]
        columns = np.arange(width)
        seen = (columns <= columns[:, None]) & (columns >= starts[:, None, None])
        # Padding, too, sees something: models that attend in float32 make NaN of no key at all.
        seen |= columns == columns[:, None]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden = self._decode(
            tokens, encoded, source_lengths, columns - starts[:, None], seen[:, None], cache
        )
        memory.store(rows, cache, lengths)
        memory.starts[rows] = memory.column - width + 1 + starts
        return hidden[:, -1]

    def _step(self, memory: RowMemory, observation: Observation) -> th.Tensor:
        """Read each row's last token, and return the hidden states."""
        device, every = self._device, np.arange(memory.rows)
        said = observation["response_length"][:, 0]
        tokens = np.where(said > 0, observation["response"][every, said - 1], self._prefix[-1])
        first, end = int(memory.starts.min()), memory.column + 1
        column: int | th.Tensor = memory.column - first
        if self.compiled:
            first -= first % COLUMNS
            end = min(memory.capacity, end + -end % COLUMNS)
            column = th.tensor([memory.column - first], device=device)
        columns = np.arange(first, end)
        seen = (columns >= memory.starts[:, None]) & (columns <= memory.column)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        keys, values = (
            [layer[:, :, first:end] for layer in held] for held in (memory.keys, memory.values)
        )
        cache.self_attention_cache = cast("Any", ColumnCache(keys, values, column))
        cache.cross_attention_cache = memory.cross
        cache.is_updated = dict.fromkeys(range(len(memory.keys)), True)
        width = memory.cross.layers[0].keys.shape[2]  # type: ignore[union-attr]
        # Its keys and values are there already: only its shape is asked for.
        encoded = th.empty(1, device=device).expand(memory.rows, width, 1)
        positions = memory.column - memory.starts[:, None]
        lengths = th.as_tensor(memory.sources, device=device)
        seen = seen[:, None, None]
        program = self.program("step", self._trunk)
        hidden = self._decode(tokens[:, None], encoded, lengths, positions, seen, cache, program)
        return hidden[:, -1]

    def _decode(
        self,
        tokens: Tokens,
        encoded: th.Tensor,
        lengths: th.Tensor,
        positions: Tokens,
        seen: npt.NDArray[np.bool_],
        cache: EncoderDecoderCache,
        decoder: Callable[..., Any] | None = None,
    ) -> th.Tensor:
        """Return the hidden states (n, q, hidden) of tokens (n, q) at positions (n, q).

        Args:
            tokens: The tokens.
            encoded: What the encoder made of prompts.
            lengths: (n,) how much of that each row has.
            positions: Below 0 where there is none.
            seen: (n, 1, q, k) which keys they see.
            cache: Where keys and values go and come from.
            decoder: What computes it. None: the trunk.
        """
        read, at, mask = (
            th.as_tensor(array, device=self._device)
            for array in (tokens, np.maximum(0, positions), seen)
        )
        if self._positions is not None:
            self._positions.positions = at
        halves = self._halves[0]
        return halves.decode(read, encoded, lengths, at, mask, cache, decoder or self._trunk)

    @property
    def _device(self) -> th.device:
        return self._halves[0].device

    def _fits(self, memory: RowMemory, observation: Observation) -> bool:
        rows, budget = observation["response"].shape
        return (memory.rows, memory.longest) == (rows, len(self._prefix) + budget)

    def _remember(self, version: object, observation: Observation, scope: Scope) -> RowMemory:
        rows, budget = observation["response"].shape
        longest = len(self._prefix) + budget
        if longest > self._longest:  # than in training
            self._longest, self._placed = longest, None
            self._programs.clear()
        start = longest - 1  # what the first rows have said already comes before
        starts, sources = np.full(rows, start), np.zeros(rows, dtype=np.int64)
        return RowMemory(version, rows, longest, start, starts, sources)


def _left_padded(
    prefix: Tokens, observation: Observation, rows: npt.NDArray[np.intp]
) -> tuple[Tokens, Tokens]:
    """Return what the decoder reads (n, width), and in which column each row begins (n,)."""
    said = observation["response_length"][rows, 0]
    width = len(prefix) + int(said.max())
    starts = width - len(prefix) - said
    tokens = np.full((len(rows), width), prefix[0], dtype=np.int64)
    for row, (start, count, response) in enumerate(
        zip(starts, said, observation["response"][rows], strict=True)
    ):
        tokens[row, start:] = np.concatenate([prefix, response[:count]])
    return tokens, starts
