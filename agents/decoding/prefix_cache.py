"""Keys and values that a causal model has already computed, kept as a memo of token prefixes.

The memo never decides what a policy answers, only how much of it has to be computed: rows whose
tokens start with remembered ones cost the rest, any other row is computed afresh. What is compared
is compared on the host, so that a device is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch as th
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.cache_utils import Cache

# Positions are allocated and compiled steps attend in multiples of this many.
ALLOCATION_STEP = 64

Tokens = npt.NDArray[np.int64]
Observation = Mapping[str, Tokens]


@dataclass
class Store:
    """Keys and values of all layers, (rows, heads, positions, head size) each."""

    keys: list[th.Tensor] = field(default_factory=list)
    values: list[th.Tensor] = field(default_factory=list)

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for so many rows and positions, and keep what is there."""
        for layers in (self.keys, self.values):
            for i, old in enumerate(layers):
                if old.shape[2] < positions:
                    layers[i] = old.new_zeros(rows, old.shape[1], positions, old.shape[3])
                    layers[i][:, :, : old.shape[2]] = old


class RowCache(Cache):
    """A store as one forward of a `transformers` model sees it: rows have lengths of their own.

    New keys are written to positions chosen row by row; which of a row's keys a query may see is
    up to the attention mask.

    Args:
        store: What is written to and read from.
        shape: The rows and positions to make a store with that is empty yet.
        rows: (n,) the rows that the forward is about; None: all of them, in order.
        positions: (n, q) where each row's new keys go.
        width: How many positions, from the first on, are attended to. 0: only the keys that the
            forward brings itself.
    """

    def __init__(
        self,
        store: Store,
        shape: tuple[int, int],
        rows: th.Tensor | None,
        positions: th.Tensor,
        width: int,
    ) -> None:
        # The parent's layers grow by appending, which ragged rows cannot.
        self.layers = []
        self._store = store
        self._shape = shape
        self._positions = positions
        self._width = width
        self._rows = rows
        every = th.arange(len(positions), device=positions.device) if rows is None else rows
        self._at = every[:, None]

    def update(
        self, key_states: th.Tensor, value_states: th.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """Store new keys and values, (n, heads, q, head size), and return those to attend to."""
        keys = self._write(self._store.keys, layer_idx, key_states)
        values = self._write(self._store.values, layer_idx, value_states)
        return keys, values

    @property
    def allocated(self) -> bool:
        """Whether there is a store already."""
        return bool(self._store.keys)

    def stay(self) -> None:
        """Promise that the store stays where it is: a captured graph writes to it."""
        for tensor in (*self._store.keys, *self._store.values):
            th._dynamo.mark_static_address(tensor, guard=False)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given explicitly."""
        return 0

    def _write(self, layers: list[th.Tensor], layer: int, new: th.Tensor) -> th.Tensor:
        if th.is_autocast_enabled(new.device.type):
            # Rotary embeddings give float32, which attention would convert at every step.
            new = new.to(th.get_autocast_dtype(new.device.type))
        if layer == len(layers):
            rows, positions = self._shape
            layers.append(new.new_zeros(rows, new.shape[1], positions, new.shape[3]))
        store = layers[layer]
        store[self._at, :, self._positions] = new.transpose(1, 2)
        if not self._width:
            return new
        return (store if self._rows is None else store[self._rows])[:, :, : self._width]


# Runs the model: (input_ids, position_ids, attention mask, cache) -> hidden states (n, q, hidden).
Forward = Callable[[th.Tensor, th.Tensor, th.Tensor, RowCache], th.Tensor]


class PrefixMemo:
    """Computes the last hidden state of each row of tokens, remembering keys and values.

    Args:
        rows: How many rows there are; row i is compared with what row i held before.
        weights: What the remembered keys and values were computed with (see `WeightsVersion`).
        store: Where keys and values go. None: into a new one.
        capacity: The positions to make room for at once. 0: it grows with the rows.
        step: Attend to a multiple of so many positions, so that shapes are few.
    """

    def __init__(
        self,
        rows: int,
        weights: object,
        store: Store | None = None,
        capacity: int = 0,
        step: int = 1,
    ) -> None:
        self.rows = rows
        self.weights = weights
        self.store = Store() if store is None else store
        self.decoded = 0  # steps so far
        self._step = step
        self._capacity = _rounded(capacity + 1, ALLOCATION_STEP)
        self._seen: dict[str, Tokens] = {}

    def last_hidden(
        self, forward: Forward, observation: Observation, device: th.device
    ) -> th.Tensor:
        """Return the hidden state at each row's last token.

        Args:
            forward: The model.
            observation: `prompt`, `prompt_length`, `response` and `response_length` of each row,
                on the host; a row has at least one token.
            device: Where the model is.

        Returns:
            (rows, hidden)
        """
        lengths = lengths_of(observation)
        longest = int(lengths.max())
        # One position more than the longest row: what padding writes lands there.
        self._capacity = max(self._capacity, _rounded(longest + 1, ALLOCATION_STEP))
        self.store.reserve(self.rows, self._capacity)
        others = np.flatnonzero(~self._going_on(observation))
        if len(others):
            self._prefill(forward, observation, others, device)
        tokens_and_positions = np.stack([_last_tokens(observation), lengths - 1])
        token, position = th.as_tensor(tokens_and_positions, device=device)[:, :, None]
        width = min(_rounded(longest, self._step), self._capacity)
        mask = th.arange(width, device=device)[None, :] <= position
        cache = RowCache(self.store, (self.rows, self._capacity), None, position, width)
        hidden = forward(token, position, mask[:, None, None, :], cache)
        self.decoded += 1
        self._remember(observation, others)
        return hidden[:, 0]

    def _going_on(self, new: Observation) -> npt.NDArray[np.bool_]:
        """Return which rows are the remembered ones and one more token of the response."""
        old = self._seen
        if not old or any(old[key].shape != new[key].shape for key in old):
            return np.zeros(self.rows, dtype=np.bool_)
        going_on: npt.NDArray[np.bool_] = (
            (new["prompt_length"] == old["prompt_length"])
            & (new["response_length"] == old["response_length"] + 1)
        )[:, 0]
        rows = np.flatnonzero(going_on)
        last = new["response_length"][rows, 0] - 1
        # Where it is not true, this is behind what is remembered.
        old["response"][rows, last] = new["response"][rows, last]
        for key in ("prompt", "response"):
            if not np.array_equal(old[key], new[key]):
                going_on &= (old[key] == new[key]).all(axis=1)
        return going_on

    def _prefill(
        self, forward: Forward, observation: Observation, rows: Tokens, device: th.device
    ) -> None:
        """Compute what is missing before the last token of some rows, all in one forward."""
        tokens, lengths = join_tokens(observation, rows)
        known = np.minimum(self._known(tokens, lengths, rows), lengths - 1)
        missing = lengths - 1 - known
        some = np.flatnonzero(missing)
        if not len(some):
            return
        if len(some) == 1:
            some = np.repeat(some, 2)  # compilers take a single row for a case of its own
        rows, tokens, known, missing = rows[some], tokens[some], known[some], missing[some]
        steps = np.arange(int(missing.max()))[None, :]
        real = steps < missing[:, None]
        positions = known[:, None] + steps
        read = np.where(real, positions, known[:, None])
        write = np.where(real, positions, self._capacity - 1)
        fresh = not known.any()
        width = 0 if fresh else int((known + missing).max())
        inputs = np.stack([np.take_along_axis(tokens, read, 1), read, write])
        token, position, target = th.as_tensor(inputs, device=device)
        where = th.as_tensor(rows, device=device)
        cache = RowCache(self.store, (self.rows, self._capacity), where, target, width)
        # Keys of a fresh prefill are in the order of its own steps, which padding shares.
        keys = th.arange(width or token.shape[1], device=device)
        until = keys.expand_as(token) if fresh else position
        forward(token, position, (keys <= until[:, :, None])[:, None], cache)

    def _known(self, tokens: Tokens, lengths: Tokens, rows: Tokens) -> Tokens:
        """Return how many of some rows' tokens are the remembered ones, from the start on."""
        if not self._seen:
            return np.zeros_like(lengths)
        old, old_lengths = join_tokens(self._seen, rows)
        width = min(tokens.shape[1], old.shape[1])
        same = np.logical_and.accumulate(tokens[:, :width] == old[:, :width], axis=1)
        return cast("Tokens", np.minimum(same.sum(axis=1), old_lengths))

    def _remember(self, observation: Observation, others: Tokens) -> None:
        """Keep what was seen; of rows that go on, the new token has been kept already."""
        if len(others) == self.rows:
            self._seen = {key: np.array(values) for key, values in observation.items()}
            return
        for key, seen in self._seen.items():
            if key.endswith("length"):
                seen[:] = observation[key]
            elif len(others):
                seen[others] = observation[key][others]


def lengths_of(observation: Observation) -> Tokens:
    """Return how many tokens each row has, prompt and response together."""
    return (observation["prompt_length"] + observation["response_length"])[:, 0]


def join_tokens(observation: Observation, rows: Any = slice(None)) -> tuple[Tokens, Tokens]:
    """Return prompt and response as one right-padded row of tokens, and the rows' lengths.

    Args:
        observation: A batch of observations of a text environment, on the host.
        rows: Which of them.

    Returns:
        (n, width) with the width of the longest row, and (n,).
    """
    prompt, response = observation["prompt"][rows], observation["response"][rows]
    prompt_length, lengths = observation["prompt_length"][rows], lengths_of(observation)[rows]
    index = np.arange(int(lengths.max()))[None, :]
    from_prompt = prompt[:, np.minimum(index[0], prompt.shape[1] - 1)]
    behind = np.clip(index - prompt_length, 0, response.shape[1] - 1)
    tokens = np.where(index < prompt_length, from_prompt, np.take_along_axis(response, behind, 1))
    return tokens, lengths


def _last_tokens(observation: Observation) -> Tokens:
    prompt_last, response_last = (
        observation[f"{key}_length"][:, 0] - 1 for key in ("prompt", "response")
    )
    rows = np.arange(len(prompt_last))
    # Where a length is 0, the index is -1 and finds something that is not used.
    from_prompt, from_response = (
        observation["prompt"][rows, prompt_last],
        observation["response"][rows, response_last],
    )
    return np.where(response_last < 0, from_prompt, from_response)


def _rounded(value: int, step: int) -> int:
    """Return the least multiple of `step` that is not less."""
    return -(-value // step) * step


# How many steps optimizers have taken: PyTorch keeps no count of what fused ones change in place.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class WeightsVersion:
    """Tells whether a module's weights are still the same.

    Args:
        module: The module; its submodules must stay, their parameters may be replaced.
    """

    def __init__(self, module: th.nn.Module) -> None:
        self._places = [
            (part._parameters, name) for part in module.modules() for name in part._parameters
        ]

    def __call__(self) -> object:
        """Return something that differs after a parameter was replaced or changed in place.

        PyTorch does not count changes through `.data`.
        """
        weights = [parameters[name] for parameters, name in self._places]
        return _optimizer_steps, [(w.data_ptr(), w._version) for w in weights if w is not None]
