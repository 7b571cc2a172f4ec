"""The batched engine: N slots of token-level episodes, stepped with array operations.

`TextEnv` is a one-slot view of it and `TextVectorEnv` the whole. A token that does not end a turn
costs a few array operations, whatever the length; text is decoded and scored once per turn.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from textenvs.data.sources import load_examples, splits_of
from textenvs.envs.state import check_fits
from textenvs.registration import load_task
from textenvs.rewards import resolve_rewards, score_transcripts
from textenvs.spaces import TokenSpace
from textenvs.task import Example, Task, Transcript, Turn
from textenvs.text.codec import TextCodec, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textenvs.rewards.deferred import LateScorer

Observation = dict[str, npt.NDArray[np.int64]]
Info = dict[str, Any]

# What a reply of the user is reckoned at when the prompt budget of a dialogue is not given.
REPLY_TOKENS = 32


class TextEngine:
    """N slots, each an episode of one example; see `TextEnv` for what the arguments mean.

    Attributes:
        observations: The live arrays, right-padded: `prompt` (num_envs, max_prompt_tokens),
            `prompt_length` (num_envs, 1), `response` (num_envs, max_new_tokens) and
            `response_length` (num_envs, 1), all int64. They change in place.
        turns: Each slot's conversation so far.
        late_scorer: None: a turn's end waits for its whole reward. Otherwise slow terms are left
            out of the reward and of `reward_terms`, and the infos given to this one, which
            completes them later. It is not handed on by `with_slots`.
    """

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | TextCodec | None = None,
        dataset: Any = None,
        fields: Mapping[str, str] | None = None,
        split: str = "train",
        reward: Any = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        truncate_prompt: Literal["left", "right"] | None = None,
    ) -> None:
        self.task = load_task(task)
        self.split = split
        self.codec = tokenizer if isinstance(tokenizer, TextCodec) else TextCodec(tokenizer)
        self.examples = load_examples(self.task, dataset, fields, split)
        self.terms = resolve_rewards(reward, self.task)
        choices = self._choice_tokens()
        self.max_new_tokens = _budget(
            "max_new_tokens",
            max_new_tokens,
            max(map(len, choices)) if choices else self.task.max_new_tokens,
        )
        self._prompts = self._encode_prompts(
            _budget("max_prompt_tokens", max_prompt_tokens, self.task.max_prompt_tokens),
            truncate_prompt,
            self._every_split(dataset, fields, split),
        )
        self.eos_token_id = self.codec.eos_token_id
        self.pad_token_id = self.codec.pad_token_id
        size = self.codec.vocabulary_size
        self.action_space = TokenSpace(
            size, self.eos_token_id, self.pad_token_id, self._allowed_tokens(choices)
        )
        self.observation_space = spaces.Dict(
            {
                "prompt": spaces.Box(0, size - 1, (self.max_prompt_tokens,), np.int64),
                "prompt_length": spaces.Box(0, self.max_prompt_tokens, (1,), np.int64),
                "response": spaces.Box(0, size - 1, (self.max_new_tokens,), np.int64),
                "response_length": spaces.Box(0, self.max_new_tokens, (1,), np.int64),
            }
        )
        self._allocate(num_envs)

    def with_slots(self, num_envs: int) -> TextEngine:
        """Return another engine of the same task, data, tokenizer, reward and budgets."""
        other = copy.copy(self)
        other._allocate(num_envs)
        return other

    def _allocate(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.observations: Observation = {
            key: np.full((num_envs, *space.shape), self._fill(key), dtype=np.int64)
            for key, space in self.observation_space.items()
            if space.shape is not None
        }
        self.turns: list[tuple[Turn, ...]] = [()] * num_envs
        self._example = [-1] * num_envs
        self.late_scorer: LateScorer | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.codec.tokenizer

    @property
    def _response(self) -> TokenIds:
        """The live responses, (num_envs, max_new_tokens)."""
        return self.observations["response"]

    @property
    def _response_length(self) -> TokenIds:
        """A view of their lengths, (num_envs,); a stored view would be cut off by a pickle."""
        return self.observations["response_length"][:, 0]

    def reset(self, slot: int, rng: np.random.Generator, example: int | None = None) -> None:
        """Start an episode in a slot, on a random example or on the one with this index.

        Raises:
            ValueError: If there is no example with this index.
        """
        if example is None:
            example = int(rng.integers(len(self.examples)))
        elif not 0 <= example < len(self.examples):
            raise ValueError(
                f"options['example'] must be in [0, {len(self.examples)}) for split "
                f"{self.split!r}, but it is {example}."
            )
        self._example[slot] = example
        self.turns[slot] = (Turn("user", self.examples[example].prompt),)
        self._set_prompt(slot, self._prompts[example])

    def step(
        self,
        actions: npt.NDArray[np.int64],
        rngs: Sequence[np.random.Generator],
        slots: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[tuple[int, Info]]]:
        """Append one token to each of the slots.

        Args:
            actions: Token ids, shape (num_envs,); those of other slots are ignored.
            rngs: Each slot's generator.
            slots: Which slots to step; None: all.

        Returns:
            The rewards and whether the episodes ended, each of shape (num_envs,), and the info of
            each slot whose turn ended.
        """
        rewards = np.zeros(len(actions))
        terminated = np.zeros(len(actions), dtype=np.bool_)
        slots = np.arange(len(actions)) if slots is None else slots
        tokens = actions[slots]
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.action_space.n):
            raise ValueError(
                f"Actions must be token ids in [0, {self.action_space.n}), but they range from "
                f"{tokens.min()} to {tokens.max()}."
            )
        length = self._response_length[slots]
        self._response[slots, length] = tokens
        self._response_length[slots] = length + 1
        ending = slots[self.codec.is_stop(tokens) | (length + 1 == self.max_new_tokens)]
        if not len(ending):
            return rewards, terminated, []
        infos = self._end_turns([int(slot) for slot in ending], rngs)
        for slot, info in infos:
            rewards[slot] = sum(info["reward_terms"].values())
            terminated[slot] = info["transcript"].final
        return rewards, terminated, infos

    def _end_turns(
        self, slots: Sequence[int], rngs: Sequence[np.random.Generator]
    ) -> list[tuple[int, Info]]:
        """Decode the finished responses, let the users reply, score everything at once."""
        transcripts = []
        for slot in slots:
            transcript, continuation = self._end_turn(slot, rngs[slot])
            transcripts.append(transcript)
            if continuation is not None:
                self._set_prompt(slot, continuation)
        late = self.late_scorer
        terms = [term for term in self.terms if late is None or not term.slow]
        scores = {term.name: score_transcripts(term, transcripts) for term in terms}
        infos = []
        for i, (slot, transcript) in enumerate(zip(slots, transcripts, strict=True)):
            info: Info = {
                "transcript": transcript,
                "reward_terms": {name: values[i] for name, values in scores.items()},
            }
            if transcript.final:
                info["example"] = self._example[slot]
                success = self.task.is_success(transcript)
                if success is not None:
                    info["is_success"] = bool(success)
            infos.append((slot, info))
        if late is not None:
            late.take([info for _, info in infos])
        return infos

    def _end_turn(self, slot: int, rng: np.random.Generator) -> tuple[Transcript, TokenIds | None]:
        """Return the finished turn and, if the conversation goes on, the grown prompt."""
        tokens = self._response[slot, : self._response_length[slot]]
        stopped = bool(self.codec.is_stop(tokens[-1:])[0])
        response = self.codec.decode_response(tokens)
        turns = (*self.turns[slot], Turn("agent", response))
        self.turns[slot] = turns
        transcript = Transcript(
            self.examples[self._example[slot]], turns, len(tokens), stopped, final=False
        )
        if len(transcript.responses) < self.task.max_turns:
            reply = self.task.reply(transcript, rng)
            if reply is not None:
                prompt = self.observations["prompt"][slot]
                continuation = np.concatenate(
                    [
                        prompt[: self.observations["prompt_length"][slot, 0]],
                        tokens,
                        self.codec.encode_reply(self.task.format_reply(reply)),
                    ]
                )
                if len(continuation) <= self.max_prompt_tokens:
                    self.turns[slot] = (*turns, Turn("user", reply))
                    return transcript, continuation
        return Transcript(transcript.example, turns, len(tokens), stopped), None

    def _set_prompt(self, slot: int, tokens: TokenIds) -> None:
        prompt = self.observations["prompt"]
        prompt[slot, : len(tokens)] = tokens
        prompt[slot, len(tokens) :] = self.pad_token_id
        self.observations["prompt_length"][slot] = len(tokens)
        self._response[slot] = self.pad_token_id
        self._response_length[slot] = 0

    def _fill(self, key: str) -> int:
        return 0 if key.endswith("length") else self.pad_token_id

    def _every_split(
        self, dataset: Any, fields: Mapping[str, str] | None, split: str
    ) -> list[Sequence[Example]]:
        """Return the examples of every split that there is, the present one first."""
        found: list[Sequence[Example]] = [self.examples]
        for name in splits_of(dataset, split):
            # A task of a user's may know fewer splits than there are names.
            with suppress(KeyError, ValueError):
                found.append(load_examples(self.task, dataset, fields, name))
        return found

    def _natural_budget(self, splits: Sequence[Sequence[Example]]) -> int:
        """Return a budget for the longest prompt of any split: one agent fits them all."""
        longest = max(
            len(ids)
            for examples in splits
            for ids in self.codec.encode_prompts(self._texts(examples))
        )
        later_turns = (self.task.max_turns - 1) * (self.max_new_tokens + REPLY_TOKENS)
        return int(longest + later_turns)

    def _texts(self, examples: Sequence[Example]) -> tuple[str, ...]:
        return tuple(self.task.prompt(example) for example in examples)

    def _encode_prompts(
        self,
        budget: int | None,
        truncate: Literal["left", "right"] | None,
        splits: Sequence[Sequence[Example]],
    ) -> Sequence[TokenIds]:
        """Encode every prompt, settle the prompt budget, and hold the prompts to it."""
        if truncate not in (None, "left", "right"):
            raise ValueError(
                f"truncate_prompt must be None, 'left' or 'right', but it is {truncate!r}."
            )
        texts = self._texts(self.examples)
        prompts = self.codec.encode_prompts(texts)
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.max_prompt_tokens = budget or self._natural_budget(splits)
        if len(prompts[longest]) <= self.max_prompt_tokens:
            return prompts
        if truncate is None:
            raise ValueError(
                f"The prompt of example {longest} is {len(prompts[longest])} tokens long, over "
                f"max_prompt_tokens={self.max_prompt_tokens}: {texts[longest][:80]!r}... Raise "
                "max_prompt_tokens, or say which side to cut off with truncate_prompt='left' or "
                "'right'."
            )
        size = self.max_prompt_tokens
        return [ids[-size:] if truncate == "left" else ids[:size] for ids in prompts]

    def _choice_tokens(self) -> list[TokenIds]:
        """Return the tokens of each allowed response, after the prompt of the first example."""
        if self.task.choices is None:
            return []
        prompt = self.task.prompt(self.examples[0])
        return [
            self.codec.encode_response(choice, prompt, eos=False) for choice in self.task.choices
        ]

    def _allowed_tokens(self, choices: Sequence[TokenIds]) -> set[int] | None:
        if not choices:
            return None
        for text, choice in zip(self.task.choices or (), choices, strict=True):
            if len(choice) > self.max_new_tokens:
                raise ValueError(
                    f"max_new_tokens={self.max_new_tokens} is too few for the choice {text!r}, "
                    f"which takes {len(choice)}."
                )
        allowed = {int(token) for choice in choices for token in choice}
        one_length = {len(choice) for choice in choices} == {self.max_new_tokens}
        return allowed if one_length else allowed | {self.eos_token_id}

    def encode_response(self, text: str, slot: int = 0) -> TokenIds:
        """Return the tokens with which an agent would say `text` in a slot's present state.

        EOS is included unless the budget ends first.
        """
        prompt = self.task.prompt(self.examples[self._example[slot]])
        if len(self.turns[slot]) > 1:
            prompt = self.task.format_reply(self.turns[slot][-1].text)
        return self.codec.encode_response(text, prompt)[: self.max_new_tokens]

    def example(self, slot: int) -> Example:
        """Return the example that a slot's episode is about."""
        return self.examples[self._example[slot]]

    def get_state(self) -> dict[str, Any]:
        """Return where each slot stands, as plain data without the examples and the tokenizer."""
        return {
            "made_of": self.made_of,
            "observations": {key: array.copy() for key, array in self.observations.items()},
            "turns": list(self.turns),
            "example": list(self._example),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Put each slot where `get_state` found it.

        Raises:
            ValueError: If the state is that of an engine with other examples, budgets or slots.
        """
        check_fits(state["made_of"], self.made_of)
        for key, array in self.observations.items():
            array[...] = state["observations"][key]
        self.turns = list(state["turns"])
        self._example = list(state["example"])

    @property
    def made_of(self) -> dict[str, Any]:
        """What a state is only of use with."""
        return {
            "num_envs": self.num_envs,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "examples": len(self.examples),
            "digest": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        """A hash of the examples: prompts as tokens, references as text."""
        digest = hashlib.sha256()
        for example, prompt in zip(self.examples, self._prompts, strict=True):
            digest.update(prompt.tobytes() + repr(example.references).encode())
        return digest.hexdigest()[:16]


def _budget(name: str, given: int | None, default: Any) -> Any:
    """Return a token budget, or the default if none is given."""
    if given is None:
        return default
    if not isinstance(given, (int, np.integer)) or given < 1:
        raise ValueError(f"{name} must be a positive integer, but it is {given!r}.")
    return int(given)
