"""How tokens become the sequences that a model reads: for buffer, update, reference, warm start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch as th

Tokens = npt.NDArray[Any]

# The label of tokens that are read and not learned, as in `transformers`.
IGNORED = -100


class Turn(NamedTuple):
    """A turn of an episode: what is read, then what is emitted.

    Args:
        context: (k,) the tokens before the actions that no earlier turn of the sequence holds.
        actions: (n,) the tokens emitted.
        begun: How many tokens at the end of the context are of the response already: a rollout
            may begin in the middle of a turn.
    """

    context: Tokens
    actions: Tokens
    begun: int = 0


class Row(NamedTuple):
    """A sequence as its model reads it; (tokens,) each, the last action left out.

    Args:
        tokens: Token ids.
        action_positions: Where the hidden state is that an action was chosen from.
        turn_starts: Where the hidden state is that the first token of a response was chosen from.
        source: What an encoder reads. None: there is none.
    """

    tokens: npt.NDArray[np.int32]
    action_positions: npt.NDArray[np.bool_]
    turn_starts: npt.NDArray[np.bool_]
    source: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences side by side, padded on the right; (sequences, width) each.

    Args:
        tokens: Token ids; what is behind a row's last action position is not read.
        action_positions: Boolean, somewhere true in each row; see `Row`. Whatever is computed for
            each action is flat, row by row.
        turn_starts: Boolean; see `Row`.
        source: (sequences, source width) token ids that an encoder reads, padded on the right.
        source_lengths: (sequences,) how many they are.
    """

    tokens: th.Tensor
    action_positions: th.Tensor
    turn_starts: th.Tensor
    source: th.Tensor | None = None
    source_lengths: th.Tensor | None = None

    def tensors(self) -> dict[str, th.Tensor]:
        """Return what there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class SequenceLayout(Protocol):
    """Decides how the turns of an episode become the sequences that a model reads."""

    def continues(self, sequence: Sequence[Turn], context: Tokens) -> bool:
        """Return whether a turn that reads `context` goes on with a sequence of turns."""
        ...

    def row(self, sequence: Sequence[Turn]) -> Row:
        """Return a sequence as the model reads it."""
        ...

    def collate(self, rows: Sequence[Row], pad: int, device: th.device | str) -> SequenceBatch:
        """Return rows as a batch on a device, padded with the id `pad`."""
        ...

    def features(self, sequence: Sequence[Turn]) -> dict[str, Tokens]:
        """Return a sequence as its model's own `forward` reads and learns it, (tokens,) each.

        `labels` are `IGNORED` but for the actions.
        """
        ...


class CausalLayout:
    """The layout of a causal model: the turns of an episode join into one row.

    A turn goes on with a sequence if its context begins with all that the sequence holds.
    """

    def continues(self, sequence: Sequence[Turn], context: Tokens) -> bool:
        """Return whether `context` begins with all tokens of the sequence, and has more."""
        before = join(sequence)
        return len(context) > len(before) and np.array_equal(context[: len(before)], before)

    def row(self, sequence: Sequence[Turn]) -> Row:
        """Return all turns, one behind the other; the last action is predicted and never read."""
        tokens = join(sequence)[:-1].astype(np.int32)
        positions, starts = np.zeros((2, len(tokens)), dtype=np.bool_)
        at = 0
        for context, actions, begun in sequence:
            at += len(context)
            positions[at - 1 : at - 1 + len(actions)] = True
            starts[at - 1 - begun] = True
            at += len(actions)
        return Row(tokens, positions, starts)

    def collate(self, rows: Sequence[Row], pad: int, device: th.device | str) -> SequenceBatch:
        """Return the rows, each padded to the longest one."""
        return SequenceBatch(
            *(
                th.as_tensor(_pad([cast("Tokens", row[i]) for row in rows], fill), device=device)
                for i, fill in enumerate((pad, False, False))
            )
        )

    def features(self, sequence: Sequence[Turn]) -> dict[str, Tokens]:
        """Return all turns, one behind the other, and what of them is learned."""
        labels = [
            piece
            for context, actions, _ in sequence
            for piece in (np.full_like(context, IGNORED), actions)
        ]
        return {"input_ids": join(sequence), "labels": np.concatenate(labels)}


class Seq2SeqLayout:
    """The layout of an encoder-decoder: each turn is a sequence of its own.

    The encoder reads all that was said before the response, the decoder `prefix` and the response.

    Args:
        prefix: The tokens that the decoder reads before a response.
    """

    def __init__(self, prefix: Sequence[int]) -> None:
        self.prefix = np.array(prefix, dtype=np.int32)

    def continues(self, sequence: Sequence[Turn], context: Tokens) -> bool:
        """Return False."""
        return False

    def row(self, sequence: Sequence[Turn]) -> Row:
        """Return a turn; the last action is predicted and never read."""
        ((context, actions, begun),) = sequence
        source, said = np.split(context.astype(np.int32), [len(context) - begun])
        tokens = np.concatenate([self.prefix, said, actions])[:-1].astype(np.int32)
        positions, starts = np.zeros((2, len(tokens)), dtype=np.bool_)
        positions[len(tokens) - len(actions) :] = True
        starts[len(self.prefix) - 1] = True
        return Row(tokens, positions, starts, source)

    def collate(self, rows: Sequence[Row], pad: int, device: th.device | str) -> SequenceBatch:
        """Return the rows, each padded to the longest one; likewise what the encoder reads."""
        sources = [cast("Tokens", row.source) for row in rows]
        lengths = np.array([len(source) for source in sources])
        return replace(
            CausalLayout().collate(rows, pad, device),
            source=th.as_tensor(_pad(sources, pad), device=device),
            source_lengths=th.as_tensor(lengths, device=device),
        )

    def features(self, sequence: Sequence[Turn]) -> dict[str, Tokens]:
        """Return what the encoder reads, what the decoder reads, and what is learned."""
        row = self.row(sequence)
        labels = np.full(len(row.tokens), IGNORED, dtype=np.int64)
        labels[row.action_positions] = sequence[0].actions
        source = cast("Tokens", row.source)
        return {"input_ids": source, "decoder_input_ids": row.tokens, "labels": labels}


def _pad(rows: Sequence[Tokens], fill: int | bool) -> Tokens:
    """Return arrays (tokens,) as one, each padded on the right to the longest; int64 or boolean."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max())[None] < lengths[:, None]
    padded = np.full(real.shape, fill, dtype=np.bool_ if isinstance(fill, bool) else np.int64)
    padded[real] = np.concatenate(rows)
    return padded


def sequences_of(
    layout: SequenceLayout, turns: Iterable[tuple[Tokens, Tokens]]
) -> list[list[Turn]]:
    """Return an episode's turns as the sequences that a model reads.

    Args:
        layout: Whether a turn goes on with a sequence.
        turns: Prompt and response of each turn; a prompt holds the whole conversation so far.
    """
    sequences: list[list[Turn]] = []
    for prompt, response in turns:
        if sequences and layout.continues(sequences[-1], prompt):
            sequences[-1].append(Turn(prompt[len(join(sequences[-1])) :], response))
        else:
            sequences.append([Turn(prompt, response)])
    return sequences


def join(sequence: Sequence[Turn]) -> Tokens:
    """Return the tokens of turns, one turn behind the other."""
    return np.concatenate([piece for turn in sequence for piece in (turn.context, turn.actions)])
