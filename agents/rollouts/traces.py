"""Per-token records of a few episodes of each rollout, in a file that grows along with training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback
from transformers import PreTrainedTokenizerBase

from agents.files import json_line, read_jsonl, write_jsonl
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sequences import Segment, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


class TraceCallback(BaseCallback):
    """Appends a few episodes of each rollout to a JSONL file, token by token.

    It reads the rollout buffer when the rollout is over and changes nothing: a traced run is the
    untraced one. With several ranks, give it to one of them.

    Args:
        path: The file; a line an episode, see `trace`.
        episodes: How many episodes of each rollout, evenly spread over its sequences. At least 1.
    """

    def __init__(self, path: str | Path, episodes: int = 4) -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, but it is {episodes}.")
        super().__init__()
        self.path = Path(path)
        self.episodes = episodes
        self._terms: dict[tuple[int, int], Mapping[str, float]] = {}

    def _init_callback(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, SequenceRolloutBuffer):
            raise TypeError(
                "Traces need a SequenceRolloutBuffer, which TransformerPolicy has, but the agent's "
                f"is a {type(buffer).__name__}."
            )

    def _on_rollout_start(self) -> None:
        self._terms.clear()

    def _on_step(self) -> bool:
        buffer: SequenceRolloutBuffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        for slot, info in enumerate(self.locals["infos"]):
            if "reward_terms" in info:  # Kept as it is: slow ones are filled in later.
                self._terms[int(buffer.lengths[slot]), slot] = info["reward_terms"]
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        buffer: SequenceRolloutBuffer = model.rollout_buffer
        policy = model.policy
        # Columns that mean nothing here are left out.
        absent = {"ref_log_probs"} if getattr(model, "kl_coef", 0.0) <= 0 else set()
        absent |= {"values"} if policy.value_head is None else set()
        lines, ends = [], buffer.episode_ends
        for index in evenly_spread(len(buffer.sequences), self.episodes):
            sequence = buffer.sequences[index]
            record = trace(buffer, sequence, policy.tokenizer, self._terms, absent)
            last = sequence.segments[-1].stop - 1
            finished = bool(ends[last, sequence.env])
            head = {"num_timesteps": model.num_timesteps, "slot": sequence.env}
            lines.append(json_line({**head, "finished": finished, **record}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def trace(
    buffer: SequenceRolloutBuffer,
    sequence: Sequence,
    tokenizer: PreTrainedTokenizerBase | None = None,
    terms: Mapping[tuple[int, int], Mapping[str, float]] | None = None,
    absent: set[str] | frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return what a rollout buffer knows about an episode, as plain data.

    This is all that traces read of a buffer.

    Args:
        buffer: One that is full, with advantages.
        sequence: One of its sequences.
        tokenizer: None: texts are None.
        terms: The reward terms of turns, by the step and slot of their last token.
        absent: Which of `ref_log_probs` and `values` the buffer does not really have.

    Returns:
        `from_start`: whether the episode began in this rollout, and `turns`: for each turn the
        prompt that came before it, and lists with an entry for each of its tokens.
    """
    start = sequence.segments[0].start
    return {
        "from_start": bool(buffer.episode_starts[start, sequence.env]),
        "turns": [
            _turn(buffer, sequence.env, segment, tokenizer, terms or {}, absent)
            for segment in sequence.segments
        ],
    }


def _turn(
    buffer: SequenceRolloutBuffer,
    slot: int,
    segment: Segment,
    tokenizer: PreTrainedTokenizerBase | None,
    terms: Mapping[tuple[int, int], Mapping[str, float]],
    absent: set[str] | frozenset[str],
) -> dict[str, Any]:
    steps = slice(segment.start, segment.stop)
    prompt, tokens = segment.context.tolist(), buffer.actions[steps, slot].tolist()
    columns = {
        "log_probs": buffer.log_probs,
        "ref_log_probs": buffer.ref_log_probs,
        "values": buffer.values,
        "advantages": buffer.advantages,
        "rewards": buffer.rewards,
    }
    paid = terms.get((segment.stop - 1, slot))
    return {
        "prompt": None if tokenizer is None else _decode(tokenizer, prompt),
        "prompt_tokens": prompt,
        "tokens": tokens,
        "pieces": None if tokenizer is None else text_pieces(tokenizer, tokens),
        **{
            name: None if name in absent else _numbers(column[steps, slot])
            for name, column in columns.items()
        },
        "reward_terms": None if paid is None else {k: float(v) for k, v in paid.items()},
    }


def evenly_spread(total: int, count: int) -> list[int]:
    """Return at most `count` of `total` indices, the middles of equal parts."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Return each token's part of the text that the tokens are together, special tokens included.

    A character that several tokens share belongs to the last of them.
    """
    pieces, shown = [], ""
    for stop in range(1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[:stop])
        if text.endswith(REPLACEMENT) and stop < len(tokens):
            text = shown
        pieces.append(text[len(shown) :])
        shown = text
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def drop_traces(path: Path, last: int) -> None:
    """Drop what came after a checkpoint, and a line that a kill cut off.

    Args:
        path: The file, if there is one.
        last: The checkpoint's number of time steps.
    """
    if path.is_file():
        write_jsonl(path, (line for line in read_jsonl(path) if line["num_timesteps"] <= last))


def _numbers(values: npt.NDArray[np.float32]) -> list[float]:
    """Return numbers that are as short in JSON as float32 allows."""
    return [float(str(value)) for value in values]
