"""A task's examples as token ids, and the budgets and spaces that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from textenvs.data.sources import load_examples, splits_of
from textenvs.rewards import RewardTerm, check_example, check_references
from textenvs.spaces import TokenSpace
from textenvs.task import Example, Task
from textenvs.text.codec import TextCodec, TokenIds

# How long a user's reply is taken to be where a dialogue's prompt budget is not given, in tokens.
REPLY_TOKENS = 32


@dataclass(frozen=True)
class EncodedTask:
    """What all engines of an environment share, whatever their number of slots.

    Args:
        task: The task.
        codec: How its texts become tokens.
        split: The split that the examples are of.
        examples: The examples.
        prompts: The token ids of each example's prompt, none longer than `max_prompt_tokens`.
        max_prompt_tokens: The prompt budget in tokens.
        max_new_tokens: The response budget of a turn in tokens.
        allowed_tokens: The ids that responses are made of. None: all.
    """

    task: Task
    codec: TextCodec
    split: str
    examples: Sequence[Example]
    prompts: Sequence[TokenIds]
    max_prompt_tokens: int
    max_new_tokens: int
    allowed_tokens: frozenset[int] | None

    @cached_property
    def action_space(self) -> TokenSpace:
        """The next token."""
        codec = self.codec
        return TokenSpace(
            codec.vocabulary_size, codec.eos_token_id, codec.pad_token_id, self.allowed_tokens
        )

    @cached_property
    def observation_space(self) -> spaces.Dict:
        """Prompt and response with their lengths; see `TextEnv`."""
        last = self.codec.vocabulary_size - 1
        return spaces.Dict(
            {
                "prompt": spaces.Box(0, last, (self.max_prompt_tokens,), np.int64),
                "prompt_length": spaces.Box(0, self.max_prompt_tokens, (1,), np.int64),
                "response": spaces.Box(0, last, (self.max_new_tokens,), np.int64),
                "response_length": spaces.Box(0, self.max_new_tokens, (1,), np.int64),
            }
        )

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Budgets, number of examples, and a hash of prompts (as tokens) and references."""
        digest = hashlib.sha256()
        for example, prompt in zip(self.examples, self.prompts, strict=True):
            digest.update(prompt.tobytes() + repr(example.references).encode())
        return {
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "examples": len(self.examples),
            "digest": digest.hexdigest()[:16],
        }


def encode_task(
    task: Task,
    codec: TextCodec,
    *,
    dataset: Any = None,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    truncate_prompt: Literal["left", "right"] | None = None,
    terms: Sequence[RewardTerm] = (),
) -> EncodedTask:
    """Load a split's examples, encode them, and choose the budgets.

    Args:
        task: The task.
        codec: How its texts become tokens.
        dataset: None (the task's own data) or what `load_examples` takes.
        fields: Which columns of the dataset hold `prompt`, `references`, ...
        split: "train", "validation", "test", or a part such as "train[:90%]".
        max_prompt_tokens: The prompt budget. None: the task's, else as long as the longest prompt
            of any split, so that one agent fits them all.
        max_new_tokens: The response budget of a turn. None: the longest choice's length if the
            task has choices, else the task's budget.
        truncate_prompt: Which side of a prompt over the budget to cut off. None: raise an error.
        terms: What is to score the responses: each example must have what they need.

    Raises:
        ValueError: If a budget is no positive integer, or too small for a prompt or a choice, or
            the examples cannot be loaded, or one cannot be scored.
    """
    if truncate_prompt not in (None, "left", "right"):
        raise ValueError(
            f"truncate_prompt must be None, 'left' or 'right', but it is {truncate_prompt!r}."
        )
    # A task's own examples are its author's: only what a user's reward asks of them is checked.
    check = partial(check_references, terms)
    if dataset is not None:
        check = partial(check_example, task, terms)
    examples = load_examples(task, dataset, fields, split, check)
    choices = _choice_tokens(task, codec, examples)
    new_tokens: int = _budget(
        "max_new_tokens",
        max_new_tokens,
        max(map(len, choices)) if choices else task.max_new_tokens,
    )
    allowed = _allowed_tokens(task, codec, choices, new_tokens)
    size: int | None = _budget("max_prompt_tokens", max_prompt_tokens, task.max_prompt_tokens)
    if size is None:
        splits = [examples, *_other_splits(task, dataset, fields, split)]
        size = _natural_budget(task, codec, splits, new_tokens)
    prompts = _fitting_prompts(task, codec, examples, size, truncate_prompt)
    return EncodedTask(task, codec, split, examples, prompts, size, new_tokens, allowed)


def _budget(name: str, given: int | None, default: Any) -> Any:
    """Return a token budget, or the default if none is given."""
    if given is None:
        return default
    if not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"{name} must be a positive integer, but it is {given!r}.")
    return int(given)


def _texts(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(task.prompt(example) for example in examples)


def _other_splits(
    task: Task, dataset: Any, fields: Mapping[str, str] | None, split: str
) -> list[Sequence[Example]]:
    """Return the examples of every whole split that there is."""
    found: list[Sequence[Example]] = []
    for name in splits_of(dataset, split):
        # A user's task may know fewer splits than there are names.
        with suppress(KeyError, ValueError):
            found.append(load_examples(task, dataset, fields, name))
    return found


def _natural_budget(
    task: Task, codec: TextCodec, splits: Sequence[Sequence[Example]], max_new_tokens: int
) -> int:
    """Return a prompt budget for the longest prompt of any split, and for all turns behind it."""
    longest = max(
        len(ids) for examples in splits for ids in codec.encode_prompts(_texts(task, examples))
    )
    return longest + (task.max_turns - 1) * (max_new_tokens + REPLY_TOKENS)


def _fitting_prompts(
    task: Task,
    codec: TextCodec,
    examples: Sequence[Example],
    size: int,
    truncate: Literal["left", "right"] | None,
) -> Sequence[TokenIds]:
    """Encode every prompt; cut off or refuse what is over the budget."""
    texts = _texts(task, examples)
    prompts = codec.encode_prompts(texts)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) <= size:
        return prompts
    if truncate is None:
        raise ValueError(
            f"The prompt of example {longest} is {len(prompts[longest])} tokens long, over "
            f"max_prompt_tokens={size}: {texts[longest][:80]!r}... Raise max_prompt_tokens, or say "
            "which side to cut off with truncate_prompt='left' or 'right'."
        )
    return [ids[-size:] if truncate == "left" else ids[:size] for ids in prompts]


def _choice_tokens(task: Task, codec: TextCodec, examples: Sequence[Example]) -> list[TokenIds]:
    """Return the tokens of each allowed response, after the prompt of the first example."""
    if task.choices is None:
        return []
    prompt = task.prompt(examples[0])
    return [codec.encode_response(choice, prompt, eos=False) for choice in task.choices]


def _allowed_tokens(
    task: Task, codec: TextCodec, choices: Sequence[TokenIds], max_new_tokens: int
) -> frozenset[int] | None:
    """Return the tokens that the choices are made of; EOS is one unless all fill the budget."""
    if not choices:
        return None
    for text, choice in zip(task.choices or (), choices, strict=True):
        if len(choice) > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too few for the choice {text!r}, "
                f"which takes {len(choice)}."
            )
    allowed = frozenset(int(token) for choice in choices for token in choice)
    one_length = {len(choice) for choice in choices} == {max_new_tokens}
    return allowed if one_length else allowed | {codec.eos_token_id}
