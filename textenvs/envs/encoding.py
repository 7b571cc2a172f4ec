"""A task's examples as token ids, and the budgets and spaces that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from gymnasium import spaces

from textenvs.data.sources import load_examples, splits_of
from textenvs.envs.prompts import Prompt, Side, check_cue, fit_prompts, render_prompts
from textenvs.rewards import RewardTerm, check_example, check_references
from textenvs.spaces import TokenSpace
from textenvs.task import Example, Task, Turn
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
        starts: Each example's prompt as the agent reads it.
        prompts: The token ids of these, none longer than `max_prompt_tokens`.
        max_prompt_tokens: The prompt budget in tokens.
        max_new_tokens: The response budget of a turn in tokens.
        choices: The token ids of each allowed response, without EOS. None: all are allowed.
    """

    task: Task
    codec: TextCodec
    split: str
    examples: Sequence[Example]
    starts: Sequence[Prompt]
    prompts: Sequence[TokenIds]
    max_prompt_tokens: int
    max_new_tokens: int
    choices: tuple[tuple[int, ...], ...] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedTask:
        return self  # nothing in it changes, and a task may hold what cannot be copied

    @cached_property
    def action_space(self) -> TokenSpace:
        """The next token."""
        codec = self.codec
        return TokenSpace(
            codec.vocabulary_size,
            codec.eos_token_id,
            codec.pad_token_id,
            self.allowed_tokens,
            choices=self.choices,
            stop_token_ids=codec.stop_token_ids,
        )

    @property
    def allowed_tokens(self) -> frozenset[int] | None:
        """The tokens that the choices are made of; EOS is one unless all fill the budget."""
        if self.choices is None:
            return self.codec.target_ids
        allowed = frozenset(token for choice in self.choices for token in choice)
        one_length = {len(choice) for choice in self.choices} == {self.max_new_tokens}
        return allowed if one_length else allowed | {self.codec.eos_token_id}

    def encode_response(self, text: str, example: int, turns: Sequence[Turn]) -> TokenIds:
        """Return the tokens with which an agent would say a text, as far as the budget goes.

        Args:
            text: The response.
            example: The index of the example that the conversation is about.
            turns: The conversation so far.
        """
        before: str | None = None  # A choice is the same tokens whatever it follows.
        if self.choices is None:
            later = len(turns) > 1 and self.codec.chat is None
            before = self.starts[example].text
            before = self.task.format_reply(turns[-1].text) if later else before
        ids = self.codec.encode_response(text, before)
        return ids[: self.max_new_tokens]

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
    truncate_prompt: Side | None = None,
    reply_tokens: int | None = None,
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
            of any split, so that one agent fits them all; in a conversation, with room for all
            turns.
        max_new_tokens: The response budget of a turn. None: the longest choice's length if the
            task has choices, else the task's budget.
        truncate_prompt: Which side of an example's text to cut off where its prompt is over the
            budget; what the task puts around it stays. None: raise an error.
        reply_tokens: How long a user's reply is taken to be in tokens, for a prompt budget that is
            not given. None: 32.
        terms: What is to score the responses: each example must have what they need.

    Raises:
        ValueError: If a budget is no positive integer, or too small for a prompt or a choice, or
            the examples cannot be loaded or scored, or the tokenizer cannot give back a choice.
        TypeError: If choices are no texts.
    """
    if truncate_prompt not in (None, "left", "right"):
        raise ValueError(
            f"truncate_prompt must be None, 'left' or 'right', but it is {truncate_prompt!r}."
        )
    # A task's own examples are its author's: only what a user's reward asks of them is checked.
    needy = any(term.needs_references for term in terms)
    check = partial(check_references, terms) if needy else None
    if dataset is not None:
        check = partial(check_example, task, terms)
    if codec.two_vocabularies and task.max_turns > 1:
        raise ValueError(
            f"{type(task).__name__} has up to {task.max_turns} turns, and the tokenizer has a "
            "vocabulary for what is read and another for what is said, so that what was said could "
            "not be read in the next turn: choose a tokenizer of one vocabulary."
        )
    examples = load_examples(task, dataset, fields, split, check)
    check_cue(task, codec, examples[0])
    choices = _choice_tokens(task, codec)
    new_tokens: int = _budget(
        "max_new_tokens",
        max_new_tokens,
        max(map(len, choices)) if choices else task.max_new_tokens,
    )
    _check_choices_fit(task, choices or (), new_tokens)
    reply: int = _budget("reply_tokens", reply_tokens, REPLY_TOKENS)
    size: int | None = _budget("max_prompt_tokens", max_prompt_tokens, task.max_prompt_tokens)
    rendered = render_prompts(task, codec, examples)
    encoded = _encoded(codec, rendered)
    if size is None:
        longest = max(map(len, encoded))
        for other in _other_splits(task, dataset, fields, split):
            others = _encoded(codec, render_prompts(task, codec, other))
            longest = max(longest, *map(len, others))
        around = 0 if codec.chat is None else len(codec.encode_reply(codec.chat.between))
        size = longest + (task.max_turns - 1) * (new_tokens + reply + around)
    starts, prompts = fit_prompts(task, codec, examples, rendered, encoded, size, truncate_prompt)
    return EncodedTask(task, codec, split, examples, starts, prompts, size, new_tokens, choices)


def _budget(name: str, given: int | None, default: Any) -> Any:
    """Return a token budget, or the default if none is given."""
    if given is None:
        return default
    if not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"{name} must be a positive integer, but it is {given!r}.")
    return int(given)


def _other_splits(
    task: Task, dataset: Any, fields: Mapping[str, str] | None, split: str
) -> list[Sequence[Example]]:
    """Return the examples of every other whole split that there is."""
    found: list[Sequence[Example]] = []
    for name in splits_of(dataset, split):
        if name == split:
            continue
        # A user's task may know fewer splits than there are names.
        with suppress(KeyError, ValueError):
            found.append(load_examples(task, dataset, fields, name))
    return found


def _encoded(codec: TextCodec, prompts: Sequence[Prompt]) -> Sequence[TokenIds]:
    return codec.encode_prompts([prompt.text for prompt in prompts])


def _choice_tokens(task: Task, codec: TextCodec) -> tuple[tuple[int, ...], ...] | None:
    """Return the tokens of each allowed response, which are the same after every prompt."""
    if not task.choices:
        return None
    if isinstance(task.choices, str) or not all(isinstance(c, str) for c in task.choices):
        raise TypeError(f"choices must be a list of texts, but they are {task.choices!r}.")
    for choice in task.choices:
        given_back = codec.given_back(choice)
        if given_back != choice:
            raise ValueError(
                f"The tokenizer gives back {given_back!r} for the choice {choice!r}, so that no "
                "response could ever be it: name the choice as the tokenizer does, or use another "
                "tokenizer."
            )
    responses = (codec.encode_response(choice, None, eos=False) for choice in task.choices)
    return tuple(tuple(ids.tolist()) for ids in responses)


def _check_choices_fit(task: Task, choices: Sequence[tuple[int, ...]], max_new_tokens: int) -> None:
    for text, choice in zip(task.choices or (), choices, strict=True):
        if len(choice) > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too few for the choice {text!r}, "
                f"which takes {len(choice)}."
            )
