"""Text in, text out: responses to prompts that are no environment's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch as th
from gymnasium import spaces

from textenvs.envs.prompts import NO_TEMPLATE
from textenvs.text.codec import TextCodec, TokenIds
from textenvs.text.messages import Message, are_messages, check_messages
from textenvs.text.special import in_texts

if TYPE_CHECKING:
    from stable_baselines3.common.type_aliases import PyTorchObs

    from agents.policies.base import BackbonePolicy


def generate(
    policy: BackbonePolicy,
    codec: TextCodec,
    texts: Sequence[str | Sequence[Message]],
    max_new_tokens: int | None = None,
    deterministic: bool = False,
    batch_size: int = 64,
) -> list[str]:
    """Return a policy's responses to prompts, under its own sampling and constraint.

    Args:
        policy: The policy.
        codec: What makes tokens of text and text of tokens.
        texts: The prompts, which are text alone, as users' texts are, or lists of messages. Of
            those that are too long the beginning is cut off, with a warning.
        max_new_tokens: How many tokens a response may have, EOS included. None: as many as in the
            policy's environments.
        deterministic: Whether to take the most likely token each time.
        batch_size: How many prompts to answer at a time.

    Raises:
        TypeError: If a prompt is neither text nor messages.
        ValueError: If there are to be more tokens than the model can read, or less than 1, or
            messages where there is no chat template.
    """
    for text in texts:
        if not isinstance(text, str) and not are_messages(text):
            raise TypeError(
                "A prompt must be a text, or a list of messages where there is a chat template, "
                f"but one is a {type(text).__name__}: {text}."
            )
    budgets = [_budget(policy, key) for key in ("prompt", "response")]
    wanted = budgets[1] if max_new_tokens is None else max_new_tokens
    room = policy.backbone.longest_prompt(wanted)
    if room is None:
        room = sum(budgets) - wanted
    if wanted < 1 or room < 1:
        raise ValueError(
            "max_new_tokens must be at least 1, and leave room for a prompt in what the model can "
            f"read, but it is {wanted}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
    prompts = _fitting(codec, texts, room)
    policy.set_training_mode(False)
    responses = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        responses += _respond(policy, codec, some, wanted, deterministic)
    return [codec.decode_response(response) for response in responses]


@th.no_grad()
def _respond(
    policy: BackbonePolicy,
    codec: TextCodec,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
    deterministic: bool,
) -> list[TokenIds]:
    """Return the tokens of a response to each prompt."""
    lengths = np.array([[len(prompt)] for prompt in prompts])
    observation = {
        "prompt": np.full((len(prompts), int(lengths.max())), codec.pad_token_id),
        "prompt_length": lengths,
        "response": np.full((len(prompts), max_new_tokens), codec.pad_token_id),
        "response_length": np.zeros_like(lengths),
    }
    for row, prompt in zip(observation["prompt"], prompts, strict=True):
        row[: len(prompt)] = prompt
    said: list[list[int]] = [[] for _ in prompts]
    live = np.arange(len(prompts))
    for step in range(max_new_tokens):
        distribution = policy.get_distribution(cast("PyTorchObs", observation))
        tokens: Any = distribution.get_actions(deterministic).cpu().numpy()
        for row in live:
            said[row].append(int(tokens[row]))
        # A row that is over stays what it was: behind its end nothing may be allowed.
        live = np.array([row for row in live if not codec.has_stopped(np.array(said[row]))], int)
        if not len(live):
            break
        observation["response"][live, step] = tokens[live]
        observation["response_length"][live] = step + 1
    return [np.array(tokens, dtype=np.int64) for tokens in said]


def _fitting(
    codec: TextCodec, texts: Sequence[str | Sequence[Message]], longest: float
) -> list[TokenIds]:
    """Return prompts as tokens, none of more than `longest`; a special token in front is kept."""
    prompts = [codec.encode_prompt(_rendered(codec, text)) for text in texts]
    long = [i for i, prompt in enumerate(prompts) if len(prompt) > longest]
    if long:
        warnings.warn(
            f"{len(long)} of {len(prompts)} prompts have up to "
            f"{max(len(prompts[i]) for i in long)} tokens, more than the {longest} that leave room "
            "for a response: their beginnings are cut off.",
            stacklevel=4,
        )
    for i in long:
        special = int(prompts[i][0] in codec.tokenizer.all_special_ids)
        rest = len(prompts[i]) - int(longest) + special
        prompts[i] = np.concatenate([prompts[i][:special], prompts[i][rest:]])
    return prompts


def _rendered(codec: TextCodec, prompt: str | Sequence[Message]) -> str:
    """Return a user's text, or a conversation, as the model reads it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = in_texts(check_messages(messages), codec.as_text)
    if codec.chat is not None:
        return codec.chat.prompt(codec.begun(said))
    if isinstance(prompt, str):
        return codec.as_text(prompt)
    raise ValueError(NO_TEMPLATE)


def _budget(policy: BackbonePolicy, key: str) -> int:
    space = cast("spaces.Dict", policy.observation_space)[key]
    return int(cast("spaces.Box", space).shape[0])
