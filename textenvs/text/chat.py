"""Chat templates: conversations as an instruct model reads them, and what ends a turn there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from textenvs.text.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For templates that write the date: with today's, a run would be another one tomorrow.
DAY = datetime(2024, 7, 26)
CODES = {f"%{code}": format(DAY, f"%{code}") for code in "YymdBbAaHIMSjp"}
CODES |= {
    "%-d": "26",
    "%e": "26",
    "%-m": "7",
    "%F": "2024-07-26",
    "%D": "07/26/24",
    "%T": "00:00:00",
}
FIXED_DAY = "".join(
    (
        "{%- macro strftime_now(format) -%}{{ format",
        *(f" | replace('{code}', '{written}')" for code, written in CODES.items()),
        " }}{%- endmacro +%}",
    )
)
# Stands where a response will be: a noncharacter of Unicode, which no text contains.
MARK = "\ufdd2"


class ChatTemplate:
    """Renders conversations by a tokenizer's chat template, or by another one.

    Args:
        tokenizer: The tokenizer.
        template: A Jinja template, as `apply_chat_template` takes it. None: the tokenizer's own.

    Attributes:
        template: See above.
        separator: What stands between the cue for a response and the response.
        turn_end: The text that the template puts behind a response, and what follows.
        written: What the template writes around messages.
        between: The text between two responses, but for the user's own.

    Raises:
        ValueError: If the template cannot render a conversation of a user and an assistant.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.template = template
        asked: list[Message] = [{"role": "user", "content": "Hello"}]
        if "Hello" not in (cue := self.prompt(asked)):
            raise ValueError(
                "The chat template leaves out what the user said: give another template "
                "(chat_template=...), or none (chat_template=False)."
            )
        # An answered turn: some templates write the last one otherwise, such as empty thoughts.
        before, _, behind = self._render([*asked, _said(MARK), *asked]).rpartition(MARK)
        self.turn_end = behind
        between = before[len(cue) :] if before.startswith(cue) else ""
        self.separator = "" if between.strip() else between
        if between.strip() and cue == self._render(asked):
            raise ValueError(
                "The chat template has no cue for a response (it ignores add_generation_prompt), "
                f"but writes {between!r} in front of one: give another template "
                "(chat_template=...), or none (chat_template=False)."
            )
        self.between = self.continuation([*asked, _said("Hello")], "")
        self.written = cue + behind

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation, with the cue for the next response."""
        return self._render(messages, add_generation_prompt=True)

    def continuation(self, messages: Sequence[Message], reply: str) -> str:
        """Return what is put behind the assistant's last response when a user replies to it.

        Args:
            messages: The conversation, a response last.
            reply: What the user says.

        Returns:
            What ends the response, the user's turn, and the cue for the next response.
        """
        asked = {"role": "user", "content": reply}
        whole = self.prompt([*messages[:-1], _said(MARK), asked])
        return whole.rpartition(MARK)[2]

    def _template(self) -> str | None:
        """Return what renders, in which the date is a fixed day."""
        used = self.template or self._tokenizer.get_chat_template()
        return FIXED_DAY + used if "strftime_now" in used else self.template

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template(),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except ImportError:
            raise
        except Exception as error:  # whatever a template raises
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The chat template cannot render messages of {roles}: {error}. Leave out what it "
                "does not know (a system prompt?), give another template (chat_template=...), or "
                "none (chat_template=False)."
            ) from error
        if any(MARK in message["content"] for message in messages) and MARK not in rendered:
            raise ValueError(
                "The chat template leaves out what the assistant said: give another template "
                "(chat_template=...), or none (chat_template=False)."
            )
        return str(rendered)


def chat_template_of(
    tokenizer: PreTrainedTokenizerBase,
    choice: bool | str | Path,
    convention: Literal["causal", "encoder"],
) -> ChatTemplate | None:
    """Return the template that a user chose, or None: prompts are text.

    Args:
        tokenizer: The tokenizer.
        choice: "auto": the tokenizer's own if it has one; True: that in any case; False: none;
            else a Jinja template, or a file that holds one.
        convention: What kind of model reads the prompts; see `TextCodec`.

    Raises:
        ValueError: If the tokenizer has none, or the file is not there, or the model is no causal
            one.
        TypeError: If the choice is something else.
    """
    if isinstance(choice, bool) or choice == "auto":
        own = bool(getattr(tokenizer, "chat_template", None))
        if choice is False or (choice == "auto" and (not own or convention == "encoder")):
            return None
        if not own:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: give one "
                "(chat_template='{% for message in messages %}...'), or leave it out."
            )
        template = None
    elif isinstance(choice, (str, Path)):
        template = str(choice)
        if "{" not in template:
            if not Path(template).is_file():
                raise ValueError(
                    "chat_template must be 'auto', True, False, a Jinja template or a file that "
                    f"holds one, but it is {template!r}."
                )
            template = Path(template).read_text(encoding="utf-8")
    else:
        raise TypeError(
            "chat_template must be 'auto', True, False, or a Jinja template, but it is a "
            f"{type(choice).__name__}."
        )
    if convention == "encoder":
        raise ValueError("An encoder-decoder reads no chat: leave chat_template out.")
    return ChatTemplate(tokenizer, template)


def check_system_prompt(chat: ChatTemplate | None, prompt: str | None) -> None:
    """Refuse a system prompt that nobody would read; None is no system prompt.

    Raises:
        ValueError: If there is no chat template, or it leaves the system prompt out.
        TypeError: If it is no text.
    """
    if prompt is None:
        return
    if not isinstance(prompt, str):
        raise TypeError(f"system_prompt must be a text, but it is a {type(prompt).__name__}.")
    if chat is None:
        raise ValueError(
            "A system prompt needs a chat template, and the tokenizer has none, or chat_template="
            "False: give one, or leave the system prompt out."
        )
    system = {"role": "system", "content": prompt}
    if prompt.strip() not in chat.prompt([system, {"role": "user", "content": "Hello"}]):
        raise ValueError(
            "The chat template leaves out the system prompt: give another template, or leave the "
            "system prompt out."
        )


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}
