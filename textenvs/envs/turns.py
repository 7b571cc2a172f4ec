"""A turn's tokens: what may be said, and what happens when the last one has been said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from textenvs.envs.encoding import EncodedTask
from textenvs.envs.prompts import render_reply
from textenvs.envs.slots import Slots
from textenvs.task import Transcript, Turn
from textenvs.text.codec import TextCodec, TokenIds

_TRUNCATED = (
    "A conversation no longer fits max_prompt_tokens={}, so its episode is truncated: raise "
    "max_prompt_tokens, or, where that is not given, reply_tokens."
)


def check_ids(tokens: TokenIds, codec: TextCodec) -> None:
    """Check that actions are ids of the vocabulary.

    Raises:
        ValueError: If one is no token id.
    """
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= codec.vocabulary_size):
        raise ValueError(
            f"Actions must be token ids in [0, {codec.vocabulary_size}), but they range from "
            f"{tokens.min()} to {tokens.max()}."
        )


def rests_of_turns(
    encoded: EncodedTask,
    slots: Slots,
    chosen: Sequence[int],
    responses: Sequence[Sequence[int] | TokenIds],
) -> list[TokenIds]:
    """Return the responses of some slots as arrays, if each is the rest of a turn.

    Raises:
        ValueError: If one is not, or there is not one for each slot, or a slot comes twice.
    """
    if len(set(chosen)) < len(chosen) or len(chosen) != len(responses):
        raise ValueError(
            "respond expects one response for each of its slots, each of them once, but got "
            f"{len(responses)} responses for the slots {list(chosen)}."
        )
    pairs = zip(chosen, responses, strict=True)
    return [_rest_of_turn(encoded, slots, slot, response) for slot, response in pairs]


def _rest_of_turn(
    encoded: EncodedTask, slots: Slots, slot: int, response: Sequence[int] | TokenIds
) -> TokenIds:
    """Return a response as an array, if it ends a slot's turn and does not go beyond it.

    Raises:
        ValueError: If there are tokens after a stop token or beyond the budget, or neither is
            reached, or the slot's episode is over, or it is no list of token ids.
    """
    tokens = np.asarray(response)
    if tokens.ndim != 1 or not (tokens.size == 0 or np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            f"The response for slot {slot} must be a list of token ids, but it is {response!r}."
        )
    if not slots.turns[slot] or slots.turns[slot][-1].role != "user":
        raise ValueError(f"Slot {slot} has nothing to respond to: reset it first.")
    check_ids(tokens, encoded.codec)
    left = encoded.max_new_tokens - int(slots.response_lengths[slot])
    if len(tokens) > left:
        raise ValueError(
            f"The response for slot {slot} has {len(tokens)} tokens, but only {left} are left of "
            f"max_new_tokens={encoded.max_new_tokens}: cut it off there."
        )
    said = slots.response(slot)
    stop = encoded.codec.stop_position(np.concatenate([said, tokens.astype(np.int64)]))
    if stop is not None and stop + 1 < len(said) + len(tokens):
        raise ValueError(
            f"The response for slot {slot} has tokens after the stop token at position "
            f"{stop - len(said)}: cut it off behind that."
        )
    if stop is None and len(tokens) < left:
        codec = encoded.codec
        raise ValueError(
            f"The response for slot {slot} neither ends with a stop token {codec.stop_token_ids} "
            + (f"or text {codec.stop_strings} " if codec.stop_strings else "")
            + f"nor fills the budget: it has {len(tokens)} tokens, and {left} are left. Complete "
            "it, or use step() for single tokens."
        )
    return tokens.astype(np.int64)


def end_turn(encoded: EncodedTask, slots: Slots, slot: int, rng: np.random.Generator) -> Transcript:
    """Decode a slot's finished response and let the user reply.

    If the conversation goes on, the slot's prompt becomes the old one, the response token by token
    as it was emitted, and the reply. If that does not fit the prompt budget, the episode is
    truncated.

    Args:
        encoded: The task and its budgets.
        slots: All slots.
        slot: The one whose turn has ended.
        rng: The slot's generator, for the user.
    """
    task, codec, tokens = encoded.task, encoded.codec, slots.response(slot)
    example = encoded.examples[slots.examples[slot]]
    response, raw = codec.decode_turn(tokens)
    turns = (*slots.turns[slot], Turn("agent", response))
    slots.turns[slot] = turns
    transcript = Transcript(
        example,
        turns,
        len(tokens),
        stopped=codec.has_stopped(tokens),
        final=False,
        references=tuple(codec.given_back(text) for text in example.references),
        raw_response=raw,
    )
    truncated = False
    if len(transcript.responses) < task.max_turns:
        reply = task.reply(transcript, rng)
        if reply is not None:
            text = render_reply(task, codec, example, turns, reply)
            added = codec.behind_turn(tokens, text)
            continuation = np.concatenate([slots.prompt(slot), tokens, added])
            if len(continuation) <= encoded.max_prompt_tokens:
                slots.turns[slot] = (*turns, Turn("user", reply))
                slots.set_prompt(slot, continuation)
                return transcript
            truncated = True
            warnings.warn(_TRUNCATED.format(encoded.max_prompt_tokens), stacklevel=2)
    return replace(transcript, final=True, truncated=truncated)


def copy_info(info: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a turn's info, in which scores can be changed."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in info.items()}
