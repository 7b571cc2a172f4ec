"""Keys and values that a causal model has already computed, remembered by token prefixes.

The cache never decides what a policy answers, only how much of it has to be computed: rows whose
tokens start with remembered ones cost the rest, any other row is computed afresh. What is compared
is compared on the host, so that a device is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
import torch as th

from agents.decoding.row_cache import KeyValues, RowCache
from agents.decoding.shared_prefix import SharedPrefix
from agents.decoding.tokens import (
    Observation,
    Tokens,
    chunks,
    join_tokens,
    last_tokens,
    lengths_of,
    versions_of,
)

# Positions are allocated and compiled steps attend in multiples of this many.
ALLOCATION_STEP = 64
# Tokens of a forward that reads prompts, padding included: few forwards, and no array that grows
# with the number of prompts.
PREFILL_TOKENS = 2**14
# Numbers of a mask of such a forward, which has as many for each token as the longest row is long.
MASK_NUMBERS = 2**24

# Runs the model: (input_ids, position_ids, which keys are seen, cache, what rows have in common) ->
# hidden states (n, q, hidden). Without a mask, a token sees the forward's own tokens up to itself.
Forward = Callable[
    [th.Tensor, th.Tensor, th.Tensor | None, RowCache, SharedPrefix | None], th.Tensor
]


class PrefixCache:
    """Computes the last hidden state of each row of tokens, remembering keys and values.

    Args:
        rows: How many rows there are; row i is compared with what row i held before.
        weights: What the remembered keys and values were computed with (see `WeightsVersion`).
        prefill_tokens: How many tokens to read in one forward, padding included.
        key_values: Where keys and values go. None: to new memory.
        capacity: The positions to make room for at once. 0: it grows with the rows.
        compiled: Whether the model is compiled, so that shapes have to be few.
        share_from: From how many keys on a step reads once what rows have in common. None: never.
        own_masks: Whether the model makes its masks itself; see `Decoder`.
        stateful: Whether layers remember states, which are of all that was read: rows that do not
            go on are read from the first token on, and without padding.

    Attributes:
        steps: How many steps it has computed.
        shared: What all rows have in common with others since they began together, or None.
    """

    def __init__(
        self,
        rows: int,
        weights: object,
        prefill_tokens: int = PREFILL_TOKENS,
        key_values: KeyValues | None = None,
        capacity: int = 0,
        compiled: bool = False,
        share_from: int | None = None,
        own_masks: bool = False,
        stateful: bool = False,
    ) -> None:
        self.rows = rows
        self.weights = weights
        self.key_values = KeyValues() if key_values is None else key_values
        self.steps = 0
        self.shared: SharedPrefix | None = None
        self._share_from = share_from
        self._prefill_tokens = prefill_tokens
        self._compiled = compiled
        self._own_masks = own_masks
        self._stateful = stateful
        self._capacity = _rounded(capacity + 1, ALLOCATION_STEP)
        self._seen: dict[str, Tokens] = {}
        self._versions: Tokens | None = None

    def last_hidden(
        self, forward: Forward, observation: Observation, device: th.device
    ) -> th.Tensor:
        """Return the hidden state at each row's last token.

        After an exception the cache must not be used any more.

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
        self.key_values.reserve(self.rows, self._capacity)
        others = np.flatnonzero(~self._going_on(observation))
        if len(others):
            self.shared = None
            sources = self._prefill(forward, observation, others, device)
            common = int(lengths.min()) - 1
            if len(others) == self.rows and self._share_from and common >= self._share_from:
                self.shared = SharedPrefix.of(self.key_values, sources, common)
        tokens_and_positions = np.stack([last_tokens(observation), lengths - 1])
        token, position = th.as_tensor(tokens_and_positions, device=device)[:, :, None]
        width = min(_rounded(longest, ALLOCATION_STEP if self._compiled else 1), self._capacity)
        mask = th.arange(width, device=device)[None, :] <= position
        first = 0 if self.shared is None else self.shared.length
        shape = self.rows, self._capacity
        cache = RowCache(self.key_values, shape, None, position, width, first, self._own_masks)
        hidden = forward(token, position, mask[:, None, None, :], cache, self.shared)
        self.steps += 1
        self._remember(observation, others)
        return hidden[:, 0]

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Go on with these rows (n,) alone, in this order, and let the memory of the others go."""
        self.rows = len(rows)
        self.key_values.keep_rows(th.as_tensor(rows))
        self.shared = None if self.shared is None else self.shared.kept(rows)
        self._seen = {key: seen[rows] for key, seen in self._seen.items()}
        self._versions = None if self._versions is None else self._versions[rows]

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
        versions = versions_of(new)
        if versions is not None and self._versions is not None:
            going_on &= versions == self._versions
            return going_on
        for key in ("prompt", "response"):
            if not np.array_equal(old[key], new[key]):
                going_on &= (old[key] == new[key]).all(axis=1)
        return going_on

    def _prefill(
        self, forward: Forward, observation: Observation, rows: Tokens, device: th.device
    ) -> npt.NDArray[np.intp]:
        """Compute what is missing before the last token of some rows, in few forwards.

        Returns:
            (n,) which of these rows each of them is a copy of; itself, if it is none.
        """
        tokens, lengths = join_tokens(observation, rows)
        until = lengths - 1
        known = np.zeros_like(until)
        if self._stateful:
            self.key_values.clear_states(th.as_tensor(rows))
        elif not self._own_masks:
            known = np.minimum(self._known(tokens, lengths, rows), until)
        if _mask_numbers(known, until) > MASK_NUMBERS:
            known[known < until // 2] = 0  # to read a little twice takes less than a mask
        copies = _copies(tokens, known, until)
        known[list(copies)] = until[list(copies)]
        for some in self._forwards(known, until):
            if self._compiled and len(some) == 1:
                some = np.repeat(some, 2)  # compilers take a single row for a case of its own
            self._read(forward, rows[some], tokens[some], known[some], lengths[some] - 1, device)
        if copies:
            of, to = rows[list(copies.values())], rows[list(copies)]
            self.key_values.copy_rows(th.as_tensor(of), th.as_tensor(to), int(until.max()))
        return np.array([copies.get(i, i) for i in range(len(rows))], dtype=np.intp)

    def _forwards(self, known: Tokens, until: Tokens) -> Iterator[npt.NDArray[np.intp]]:
        """Yield which rows, known and wanted up to these tokens, are read in one forward."""
        missing = until - known
        some = np.flatnonzero(missing)
        groups = [some]
        if self._stateful:
            groups = [some[missing[some] == length] for length in np.unique(missing[some])]
        too_much = len(some) * int(missing.max()) > self._prefill_tokens
        too_much |= _mask_numbers(known[some], until[some]) > MASK_NUMBERS
        if not self._stateful and known.any() and too_much:
            # Rows of which nothing is known need no mask.
            groups = [some[known[some] == 0], some[known[some] > 0]]
        for group in groups:
            limit = self._prefill_tokens
            if known[group].any():
                limit = min(limit, MASK_NUMBERS // int(until[group].max()))
            for chunk in chunks(missing[group], limit):
                yield group[chunk]

    def _read(
        self,
        forward: Forward,
        rows: Tokens,
        tokens: Tokens,
        known: Tokens,
        until: Tokens,
        device: th.device,
    ) -> None:
        """Compute keys and values of some rows' tokens from the known ones on, in one forward."""
        positions = known[:, None] + np.arange(int((until - known).max()))
        real = positions < until[:, None]
        read = np.where(real, positions, known[:, None])
        write = np.where(real, positions, self._capacity - 1)
        inputs = np.stack([np.take_along_axis(tokens, read, 1), read, write])
        token, position, target = th.as_tensor(inputs, device=device)
        width, mask = 0, None
        # Keys of a fresh prefill are in the order of its own tokens, and padding is behind them.
        if known.any():
            width = int(until.max())
            mask = (th.arange(width, device=device) <= position[:, :, None])[:, None]
        where = th.as_tensor(rows, device=device)
        cache = RowCache(self.key_values, (self.rows, self._capacity), where, target, width)
        forward(token, position, mask, cache, None)

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
        versions = versions_of(observation)
        self._versions = None if versions is None else versions.copy()
        if len(others) == self.rows:
            self._seen = {key: np.array(values) for key, values in observation.items()}
            return
        for key, seen in self._seen.items():
            if key.endswith("length"):
                seen[:] = observation[key]
            elif len(others):
                seen[others] = observation[key][others]


def _copies(tokens: Tokens, known: Tokens, until: Tokens) -> dict[int, int]:
    """Return which rows are to be copied, and from which: the one of the same that knows most."""
    sources: dict[bytes, int] = {}
    copies = {}
    for row in np.argsort(-known, kind="stable").tolist():
        source = sources.setdefault(tokens[row, : until[row]].tobytes(), row)
        if source != row and known[row] < until[row]:
            copies[row] = source
    return copies


def _mask_numbers(known: Tokens, until: Tokens) -> int:
    """Return how many numbers the mask has of a forward for rows, or 0: they need none."""
    if not known.any():
        return 0
    return len(known) * int((until - known).max()) * int(until.max())


def _rounded(value: int, step: int) -> int:
    """Return the least multiple of `step` that is not less."""
    return -(-value // step) * step
