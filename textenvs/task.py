"""What a text task is: prompts, references, how to score finished text, what a user says next.

A task works on text alone. Tokens, budgets, seeding and autoreset belong to the environment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from textenvs.text.messages import Message, are_messages, check_messages

SPLITS = ("train", "validation", "test")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Example:
    """One item of a dataset.

    Args:
        prompt: The text that the agent is given.
        references: Texts that a good response resembles; may be empty. A single text is the only
            one of them.
        data: Whatever else the task needs (a label, a user's hidden goal), by name.
        history: The messages of a chat before the prompt, such as a system prompt. Messages as the
            prompt, {"role": ..., "content": ...} each, are these and, the last one, the prompt.

    Raises:
        TypeError: If the prompt or a reference is no text, or the data have no names.
        ValueError: If messages are none, or the last one is no user's.
    """

    prompt: str
    references: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would only fail, or silently score nothing, when it is drawn."""
        if are_messages(self.prompt):
            *before, last = check_messages(self.prompt)
            object.__setattr__(self, "prompt", last["content"])
            object.__setattr__(self, "history", (*self.history, *before))
        if self.history:
            check_messages([*self.history, {"role": "user", "content": "Hello"}])
        single = isinstance(self.references, str) or not isinstance(self.references, Iterable)
        references: tuple[Any, ...] = (self.references,) if single else tuple(self.references)
        if not isinstance(self.prompt, str) or not all(isinstance(r, str) for r in references):
            raise TypeError(
                "An Example has a text as its prompt and texts as its references, but they are "
                f"{self.prompt!r} and {self.references!r}."
            )
        if not isinstance(self.data, Mapping):
            raise TypeError(f"An Example's data must map names to values, not be {self.data!r}.")
        object.__setattr__(self, "references", references)


@dataclass(frozen=True)
class Turn:
    """One utterance of a conversation."""

    role: Literal["user", "agent"]
    text: str


@dataclass(frozen=True)
class Transcript:
    """A finished turn, as the reward terms see it.

    Args:
        example: The example that the episode is about.
        turns: The conversation so far. It starts with what the agent was given (`Task.prompt`) as
            the user's turn and ends with the agent's response, so a single-turn task has two. What
            `Task.format_turn` puts around each turn of a conversation is left out.
        response_tokens: How many tokens the last response took, EOS included.
        stopped: True if the agent ended the response, with EOS or another stop; False if the budget
            ran out.
        final: True if this turn ended the episode.
        truncated: True if it ended the episode only because the conversation no longer fits the
            prompt budget.
        references: The example's references as the tokenizer gives them back, without surrounding
            white space: what a response can be. None: without surrounding white space.
        raw_response: The last response with its white space and its special tokens, but for the
            stop token that ended it. None: as in `turns`.
    """

    example: Example
    turns: tuple[Turn, ...]
    response_tokens: int = 0
    stopped: bool = True
    final: bool = True
    truncated: bool = False
    references: tuple[str, ...] = None  # type: ignore[assignment]
    raw_response: str = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in what was left out."""
        if self.references is None:
            stripped = tuple(text.strip() for text in self.example.references)
            object.__setattr__(self, "references", stripped)
        if self.raw_response is None:
            object.__setattr__(self, "raw_response", self.turns[-1].text if self.turns else "")

    @property
    def prompt(self) -> str:
        """The first thing that the agent was given, as it was read."""
        return self.turns[0].text

    @property
    def response(self) -> str:
        """What the agent said last, without surrounding white space."""
        return self.turns[-1].text.strip()

    @property
    def responses(self) -> tuple[str, ...]:
        """Everything that the agent said, turn by turn."""
        return tuple(turn.text for turn in self.turns if turn.role == "agent")

    def __str__(self) -> str:
        """The conversation, a line a turn."""
        return "\n".join(f"{turn.role}: {turn.text}" for turn in self.turns)


ScoreFunction = Callable[[Sequence[Transcript]], Sequence[float]]


class Task:
    """A text task. Subclass it, say how to score, and register it with `textenvs.register_task`.

    Only `score` must be written, and `examples` if the task brings its own data. Every method is a
    pure function of its arguments: what a conversation's user knows is in `Example.data`, what has
    been said is in the turns, and randomness comes from the generator that is passed in.

    Attributes:
        fields: Which columns of a user's dataset fill `Example`: `prompt`, `references`, and any
            further name, which goes to `Example.data`. `gym.make(..., fields=...)` overrides it.
        required_fields: The names out of `fields` that a user's dataset must have.
        max_prompt_tokens: The prompt budget in tokens. None: as long as the longest prompt.
        max_new_tokens: The response budget in tokens, for each turn. EOS counts.
        max_turns: How many turns the agent has at most.
        choices: The only responses allowed (labels), or None. The agent can then say nothing else,
            and `max_new_tokens` is the longest of them.
            `gym.make(..., choices=...)` overrides it.
        template: The text around the prompt, "Review: {prompt} Label:", in which names in
            braces are the prompt and what else is in `Example.data`. None: the prompt alone.
            `gym.make(..., template=...)` overrides it.
        system_prompt: What a chat begins with, unless an example's own begins with another, or
            None. `gym.make(..., system_prompt=...)` overrides it.
        score_every_turn: Whether `score` is called after each turn of a conversation or only after
            the last one.
        success_score: The least score of the last turn that makes an episode a success, or None:
            `is_success` says. Where a score is slow, so is an `is_success` that asks for it again.
        slow_score: Whether `score` takes long, so that `agents.PPO` scores while the rollout goes
            on. It must then work when it is called from another thread.
        best_return: The mean return that the best known behaviour reaches, or None.
    """

    fields: ClassVar[Mapping[str, str]] = {"prompt": "prompt", "references": "references"}
    required_fields: ClassVar[tuple[str, ...]] = ("prompt",)
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 64
    max_turns: int = 1
    choices: Sequence[str] | None = None
    template: str | None = None
    system_prompt: str | None = None
    score_every_turn: bool = False
    success_score: float | None = None
    slow_score: bool = False
    best_return: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Task:
        # Environments share a task: its methods are pure functions, and what it may hold besides,
        # such as a model or a lock, must not be copied or cannot be.
        return self

    def examples(self, split: str) -> Sequence[Example]:
        """Return the task's own data of one split ("train", "validation" or "test")."""
        raise ValueError(
            f"{type(self).__name__} brings no data of its own (split {split!r} was asked for): "
            "pass dataset=..., or override Task.examples."
        )

    def prompt(self, example: Example) -> str | Sequence[Message]:
        """Return the text that the agent is given: the example's prompt in the template.

        Special tokens are meant as such where this method writes them, and as text where they are
        in the example. In a conversation it is written as `format_turn` does; where a chat template
        writes it, that is left out, and the text is the user's message, behind the example's
        history. A task that is played with a chat template may return all messages instead.

        Raises:
            ValueError: If the template names something that the example does not have.
        """
        if self.template is None:
            return self._turn(example.prompt)
        values = {**example.data, "prompt": example.prompt}

        def fill(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise ValueError(
                    f"The template {self.template!r} has {match[0]}, but an example only has "
                    f"{', '.join(values)}."
                )
            return str(values[match[1]])

        return self._turn(_FIELD.sub(fill, self.template))

    def _turn(self, text: str) -> str:
        return self.format_turn(text) if self.max_turns > 1 else text

    def format_turn(self, text: str) -> str:
        """Return a user's turn of a conversation as the agent reads it, with the agent's cue."""
        return f"User: {text}\nAgent:"

    def score(self, transcripts: Sequence[Transcript]) -> Sequence[float]:
        """Return one reward for each finished transcript, in order."""
        raise NotImplementedError(f"{type(self).__name__} must override Task.score.")

    def is_success(self, transcript: Transcript) -> bool | None:
        """Return whether the finished episode succeeded, or None if the task knows no success."""
        if self.success_score is None:
            return None
        return self.score([transcript])[0] >= self.success_score

    def is_well_formed(self, transcript: Transcript) -> bool | None:
        """Return whether the response is one that the task's language or format knows.

        It says nothing about how good the response is, and nothing is paid for it. A task that
        overrides it has the measure `well_formed` in `info["observed"]`: the guard against a reward
        that rises while the text breaks. None: that cannot be said of this example.
        """
        return None

    def check_example(self, example: Example) -> None:
        """Refuse an example of a user's dataset that the task can do nothing with.

        Raises:
            ValueError: By default, if the example lacks the references that
                `required_fields` asks for.
        """
        if "references" in self.required_fields and not example.references:
            raise ValueError(
                "there are no references, but the task compares responses to them: give the row "
                "references, or leave it out."
            )

    def adapt_to(self, examples: Sequence[Example], class_names: Sequence[str] | None) -> Task:
        """Return the task for the examples of a user's dataset; by default, it is this one.

        Args:
            examples: Those of all splits that are known.
            class_names: What the whole numbers of the labels' column stand for, if the dataset
                says so.
        """
        return self

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str | None:
        """Return what the user answers to the agent's last turn; None ends the conversation."""
        return None

    def format_reply(self, reply: str) -> str:
        """Return the text that is put between the agent's last response and its next one."""
        return f"\n{self.format_turn(reply)}"

    def demonstrate(self, example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        """Return a response worth imitating before any reward is known (used for warm starts).

        Args:
            example: The example that the conversation is about.
            turns: The conversation so far, the user's turn last.
            rng: The source of all randomness.
        """
        if not example.references:
            raise ValueError(
                f"The example with prompt {example.prompt!r} has no references to demonstrate: "
                "give the dataset references, or override Task.demonstrate."
            )
        return example.references[rng.integers(len(example.references))]

    def best_response(self, example: Example, turns: Sequence[Turn]) -> str:
        """Return the best response that is known: by default, the best scored reference."""
        candidates = [
            Transcript(example, (*turns, Turn("agent", reference)))
            for reference in example.references
        ]
        if not candidates:
            raise ValueError(f"The example with prompt {example.prompt!r} has no references.")
        return candidates[int(np.argmax(self.score(candidates)))].response
