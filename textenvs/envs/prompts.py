"""What the agent is given: the task's text around an example's, as tokens that fit the budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from textenvs.task import Example, Task, Turn
from textenvs.text.chat import ChatTemplate
from textenvs.text.codec import TextCodec, TokenIds
from textenvs.text.messages import Message, check_messages
from textenvs.text.special import BREAK, in_texts

Side = Literal["left", "right"]
NO_TEMPLATE = (
    "A prompt consists of messages, which need a chat template: use a tokenizer that has one "
    "(gym.make(..., tokenizer=...)), or give one (chat_template='{% for message in messages "
    "%}...'). Encoder-decoders read none."
)
ROLES = {"user": "user", "agent": "assistant"}


class Prompt(NamedTuple):
    """What the agent is given at the start of an episode.

    Args:
        text: The text to encode; see `shown`.
        said: What of it is the first turn of the transcript.
    """

    text: str
    said: str

    def shown(self) -> Prompt:
        """Return it as a person reads it."""
        return self._replace(text=shown(self.text)) if BREAK in self.text else self


def render_prompts(task: Task, codec: TextCodec, examples: Sequence[Example]) -> tuple[Prompt, ...]:
    """Return what to encode; special tokens in examples are broken, those around are not."""
    if codec.chat is not None:
        return tuple(_chat(task, codec, codec.chat, example) for example in examples)
    texts = (prompt_text(task, example) for example in examples)
    # Examples are looked through only where their prompt has what could be of them.
    rendered = (
        prompt_text(task, _as_text(codec, example)) if codec.as_text.finds(text) else text
        for text, example in zip(texts, examples, strict=True)
    )
    return tuple(Prompt(text, first_turn(task, shown(text))) for text in rendered)


def prompt_text(task: Task, example: Example) -> str:
    """Return the text of a prompt that no chat template renders.

    Raises:
        ValueError: If it consists of messages.
    """
    text = task.prompt(example)
    if isinstance(text, str) and not example.history:
        return text
    raise ValueError(NO_TEMPLATE)


def messages_of(task: Task, codec: TextCodec, example: Example) -> list[Message]:
    """Return the messages of an example's chat, up to the one that is to be answered."""
    prompt = task.prompt(example)
    if isinstance(prompt, str):
        user: Message = {"role": "user", "content": first_turn(task, prompt)}
        return codec.begun([*example.history, user])
    return codec.begun(check_messages(prompt))


def _chat(task: Task, codec: TextCodec, chat: ChatTemplate, example: Example) -> Prompt:
    messages = messages_of(task, codec, example)
    texts = (text for message in messages for text in message.values())
    if any(codec.as_text.finds(text) for text in texts):
        messages = messages_of(task, codec, _as_text(codec, example))
    return Prompt(chat.prompt(messages), shown(messages[-1]["content"]))


def render_reply(
    task: Task, codec: TextCodec, example: Example, turns: Sequence[Turn], reply: str
) -> str:
    """Return the text that continues a conversation, to be encoded likewise.

    Args:
        task: The task.
        codec: What renders chats.
        example: What the conversation is about.
        turns: The conversation so far, the agent's response last.
        reply: The user's next turn.
    """
    if codec.chat is None:
        return task.format_reply(codec.as_text(reply))
    said = [{"role": ROLES[turn.role], "content": codec.as_text(turn.text)} for turn in turns[1:]]
    messages = [*messages_of(task, codec, _as_text(codec, example)), *said]
    return codec.chat.continuation(messages, codec.as_text(reply))


def shown(text: str) -> str:
    """Return a rendered text as a person reads it."""
    return text.replace(BREAK, "")


def first_turn(task: Task, text: str) -> str:
    """Return a prompt as the first turn of the transcript: what was read, as it was read.

    Where it has the format of all turns, that is left out, as it is for the later ones.
    """
    if task.max_turns == 1:
        return text
    before, _, after = task.format_reply(BREAK).partition(BREAK)
    before = before.lstrip()
    if len(before + after) <= len(text) and text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)]
    return text


def fit_prompts(
    task: Task,
    codec: TextCodec,
    examples: Sequence[Example],
    rendered: Sequence[Prompt],
    encoded: Sequence[TokenIds],
    size: int,
    truncate: Side | None,
) -> tuple[tuple[Prompt, ...], tuple[TokenIds, ...]]:
    """Cut or refuse every example's rendered and encoded prompt that is over the budget.

    Returns:
        The prompts with their texts as they are shown, and their token ids.

    Raises:
        ValueError: If a prompt is too long and may not be cut, or is too long without its example.
    """
    texts = [prompt.text for prompt in rendered]
    _tell_of_special_tokens(texts)
    over = [i for i, ids in enumerate(encoded) if len(ids) > size]
    if over and truncate is None:
        longest = max(over, key=lambda i: len(encoded[i]))
        raise ValueError(
            f"The prompt of example {longest} is {len(encoded[longest])} tokens long, over "
            f"max_prompt_tokens={size}: {shown(texts[longest])[:80]!r}... Raise max_prompt_tokens, "
            "or say which side of the example's text to cut off with truncate_prompt='left' or "
            "'right'."
        )
    fitting = dict(enumerate(zip(rendered, encoded, strict=True)))
    for i in over:
        fitting[i] = _cut(task, codec, examples[i], size, truncate or "left")
    return (
        tuple(prompt.shown() for prompt, _ in fitting.values()),
        tuple(ids for _, ids in fitting.values()),
    )


def check_cue(task: Task, codec: TextCodec, example: Example) -> None:
    """Warn where a conversation's first turn ends otherwise than its later ones."""
    if task.max_turns == 1 or not example.prompt or codec.chat is not None:
        return
    _, found, first = prompt_text(task, example).rpartition(example.prompt)
    _, known, later = task.format_reply(example.prompt).rpartition(example.prompt)
    if found and known and first != later:
        warnings.warn(
            f"{type(task).__name__} has two formats: the first turn of a conversation ends in "
            f"{first!r}, and later ones in {later!r}. Override format_turn, or both prompt and "
            "format_reply, so that the agent reads one.",
            stacklevel=2,
        )


def _as_text(codec: TextCodec, example: Example) -> Example:
    own = example.prompt, dict(example.data), tuple(map(dict, example.history))
    broken = in_texts(own, codec.as_text)
    if broken == own:
        return example
    prompt, data, history = broken
    return replace(example, prompt=prompt, data=data, history=history)


def _tell_of_special_tokens(texts: Sequence[str]) -> None:
    """Say once that special tokens in examples are read as text: they may have been meant."""
    broken = [i for i, text in enumerate(texts) if BREAK in text]
    if broken:
        warnings.warn(
            f"The texts of {len(broken)} examples contain what is written like a special token; "
            f"it is read as text. The first is example {broken[0]}: "
            f"{shown(texts[broken[0]])[:80]!r}. If a chat template has rendered them, pass "
            "tokenizer=textenvs.text.codec.TextCodec(tokenizer, split_special_tokens=False).",
            stacklevel=2,
        )


def _cut(
    task: Task, codec: TextCodec, example: Example, size: int, side: Side
) -> tuple[Prompt, TokenIds]:
    """Keep as much of an example's text as fits the budget, inside what is around it."""
    text = example.prompt
    cuts = codec.cuts(text) if side == "right" else codec.cuts(text)[::-1]

    def rendered(kept: int) -> tuple[Prompt, TokenIds]:
        part = text[: cuts[kept]] if side == "right" else text[cuts[kept] :]
        (whole,) = render_prompts(task, codec, [replace(example, prompt=part)])
        return whole, codec.encode_prompt(whole.text)

    fitting = rendered(0)
    if len(fitting[1]) > size:
        raise ValueError(
            f"max_prompt_tokens={size} is too few: what {type(task).__name__}.prompt puts around "
            f"an example's text takes {len(fitting[1])} tokens by itself, as in "
            f"{shown(fitting[0].text)[:80]!r}."
        )
    fits, over = 0, len(cuts) - 1
    while over - fits > 1:
        middle = (fits + over) // 2
        candidate = rendered(middle)
        if len(candidate[1]) <= size:
            fits, fitting = middle, candidate
        else:
            over = middle
    return fitting
