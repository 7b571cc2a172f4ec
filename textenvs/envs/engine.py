"""The batched engine: N slots of token-level episodes, stepped with array operations.

`TextEnv` is a one-slot view of it and `TextVectorEnv` the whole. A token that does not end a turn
costs a few array operations, whatever the length; text is decoded and scored once per turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from textenvs.data.preparation import prepare_task
from textenvs.data.sampler import ExampleSampler, Sampling
from textenvs.envs.encoding import encode_task
from textenvs.envs.observations import Observation, Observations
from textenvs.envs.slots import Slots
from textenvs.envs.state import check_fits
from textenvs.envs.turns import check_ids, end_turn, rests_of_turns
from textenvs.registration import load_task
from textenvs.rewards import resolve_observed, resolve_rewards, score_turns
from textenvs.task import Example, Task, Turn
from textenvs.text.codec import TextCodec, TokenIds, codec_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textenvs.rewards.deferred import DeferredScorer

Info = dict[str, Any]
# Rewards and whether episodes ended, each (num_envs,), and the info of each slot whose turn ended.
Transitions = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[tuple[int, Info]]]


class TextEngine:
    """N slots, each an episode of one example.

    Args:
        task: A registered id, "package.module:Class", a `Task` class or a `Task`.
        num_envs: The number of slots.
        tokenizer: None (the embedded one), a name or path, a tokenizer (never changed), or a
            `TextCodec`.
        dataset: None (the task's own data) or what `textenvs.data.sources.load_examples` takes.
        fields: Which columns of the dataset hold `prompt`, `references`, ...
        split: "train", "validation", "test", or a part such as "train[:90%]".
        reward: None (the task's own) or what `textenvs.rewards.resolve_rewards` takes.
        observe: The same, for what is scored and reported but no part of the reward.
        choices: The only responses allowed. None: the task's, or the labels of the dataset.
        template: The text around the prompt, as "Review: {prompt} Label:". None: the task's.
        max_prompt_tokens: The prompt budget. None: the task's, else as long as the longest prompt.
        max_new_tokens: The response budget of a turn, EOS included. None: the task's.
        truncate_prompt: Which side of an example's text to cut off where its prompt is over the
            budget; what the task puts around it stays. None: raise an error.
        reply_tokens: How many tokens a user's reply is taken to have where a conversation's prompt
            budget is not given. None: 32.
        stop: Texts and token ids that end a turn, besides EOS and what the generation_config.json
            in the tokenizer's folder has.
        chat_template: Whether a chat template writes prompts and replies. "auto": where the
            tokenizer has one; True; False; else a Jinja template, or a file that holds one.
        system_prompt: What a chat begins with. None: the task's, if it has one.
        sampling: Which example is played next: "random", or "epoch", each once before any again.
        group_size: So many neighbouring slots play the same examples in the same order.

    Attributes:
        task, split, examples: What is played.
        codec, eos_token_id, pad_token_id: How text becomes tokens.
        terms: The reward terms.
        observed: The terms that are only observed.
        max_prompt_tokens, max_new_tokens: The budgets.
        observation_space, action_space: Those of one slot.
        deferred_scorer: None: a turn's end waits for its whole reward. Otherwise slow terms are
            left out of the reward and of `reward_terms`, and the infos are given to this one, which
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
        observe: Any = None,
        choices: Sequence[str] | None = None,
        template: str | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        truncate_prompt: Literal["left", "right"] | None = None,
        reply_tokens: int | None = None,
        stop: str | int | Sequence[str | int] | None = None,
        chat_template: bool | str | Path = "auto",
        system_prompt: str | None = None,
        sampling: Sampling = "random",
        group_size: int = 1,
    ) -> None:
        source = {"dataset": dataset, "fields": fields, "split": split}
        self.task = prepare_task(load_task(task), **source, choices=choices, template=template)
        codec = codec_of(tokenizer, stop, chat_template)
        given = (system_prompt, codec.system_prompt, self.task.system_prompt)
        self.codec = codec.with_system_prompt(next((p for p in given if p is not None), None))
        self.terms = resolve_rewards(reward, self.task)
        self.observed = resolve_observed(observe, self.task, self.terms)
        self._encoded = encode_task(
            self.task,
            self.codec,
            **source,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            truncate_prompt=truncate_prompt,
            reply_tokens=reply_tokens,
            terms=[*self.terms, *self.observed],
        )
        self.split = split
        self.examples = self._encoded.examples
        self.max_prompt_tokens = self._encoded.max_prompt_tokens
        self.max_new_tokens = self._encoded.max_new_tokens
        self.eos_token_id = self.codec.eos_token_id
        self.pad_token_id = self.codec.pad_token_id
        self.observation_space = self._encoded.observation_space
        self.action_space = self._encoded.action_space
        self.sampler = ExampleSampler(len(self.examples), num_envs, sampling, group_size)
        self._slots = Slots(num_envs, self.observation_space, self.pad_token_id)
        self.deferred_scorer: DeferredScorer | None = None

    def with_slots(self, num_envs: int) -> TextEngine:
        """Return another engine of the same task, data, tokenizer, reward and budgets.

        Its slots draw at random, each by itself.
        """
        other = self._on(Slots(num_envs, self.observation_space, self.pad_token_id))
        other.sampler = ExampleSampler(len(self.examples), num_envs)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEngine:
        # Tasks and rewards are shared: a model or a lock in them cannot be copied, or should not.
        return self._on(copy.deepcopy(self._slots, memo))

    def _on(self, slots: Slots) -> TextEngine:
        other = copy.copy(self)
        other._slots = slots
        other.deferred_scorer = None
        return other

    @property
    def num_envs(self) -> int:
        """The number of slots."""
        return len(self._slots)

    @property
    def prompts(self) -> Sequence[TokenIds]:
        """The token ids of each example's prompt."""
        return self._encoded.prompts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.codec.tokenizer

    @property
    def observations(self) -> Observation:
        """The live arrays, right-padded int64, which change in place.

        `prompt` (num_envs, max_prompt_tokens), `prompt_length` (num_envs, 1), `response`
        (num_envs, max_new_tokens) and `response_length` (num_envs, 1).
        """
        return self._slots.observations

    def observe(self, copied: bool = True) -> Observations:
        """Return the observations of all slots with the versions of their prompts.

        Args:
            copied: Whether the arrays are copies, or the live ones.
        """
        live = self._slots.observations
        arrays = {key: array.copy() for key, array in live.items()} if copied else live
        return Observations(arrays, self._slots.prompt_versions.copy())

    def refresh(self, observations: Observations, slots: npt.NDArray[np.int64]) -> None:
        """Bring earlier observations up to date in some of the slots, in place."""
        for key, array in self._slots.observations.items():
            observations[key][slots] = array[slots]
        observations.prompt_versions[slots] = self._slots.prompt_versions[slots]

    @property
    def turns(self) -> list[tuple[Turn, ...]]:
        """Each slot's conversation so far."""
        return self._slots.turns

    def example(self, slot: int) -> Example:
        """Return the example that a slot's episode is about."""
        return self.examples[self._slots.examples[slot]]

    def encode_response(self, text: str, slot: int = 0) -> TokenIds:
        """Return the tokens with which an agent would say `text` in a slot's present state.

        EOS is included unless the budget ends first.
        """
        return self._encoded.encode_response(text, self._slots.examples[slot], self.turns[slot])

    def reset(
        self,
        slot: int,
        rng: np.random.Generator,
        example: int | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> None:
        """Start an episode in a slot, on the next example or on the one with this index.

        Args:
            slot: The slot.
            rng: Its generator.
            example: The index of the example. None: what `sampler` draws.
            seeds: What each slot was seeded with, (num_envs,). None: it is not known.

        Raises:
            ValueError: If there is no example with this index.
        """
        if example is None:
            seeds = [None] * self.num_envs if seeds is None else seeds
            example = self.sampler.draw(slot, self._slots.drawn[slot], rng, seeds)
            self._slots.drawn[slot] += 1
        elif not 0 <= example < len(self.examples):
            raise ValueError(
                f"options['example'] must be in [0, {len(self.examples)}) for split "
                f"{self.split!r}, but it is {example}."
            )
        self._slots.examples[slot] = example
        self.turns[slot] = (Turn("user", self._encoded.starts[example].said),)
        self._slots.set_prompt(slot, self._encoded.prompts[example])

    def draw_from_the_first(self, slots: Iterable[int]) -> None:
        """Let slots that have been seeded begin with the first of their examples."""
        for slot in slots:
            self._slots.drawn[slot] = 0

    def align_groups(self) -> None:
        """Let the slots of each group, which are all about to start, draw the same example next."""
        size, drawn = self.sampler.group_size, self._slots.drawn
        for start in range(0, self.num_envs, size) if size > 1 else ():
            drawn[start : start + size] = [max(drawn[start : start + size])] * size

    @property
    def groups_agree(self) -> bool:
        """Whether the slots of each group play the same example now."""
        size, examples = self.sampler.group_size, self._slots.examples
        return all(examples[slot] == examples[slot - slot % size] for slot in range(self.num_envs))

    @property
    def playing(self) -> list[int]:
        """The index of the example that each slot plays; -1 before the first."""
        return list(self._slots.examples)

    @property
    def drawn(self) -> list[int]:
        """How many examples each slot has drawn since it was seeded."""
        return list(self._slots.drawn)

    def step(
        self,
        actions: npt.NDArray[np.int64],
        rngs: Sequence[np.random.Generator],
        slots: npt.NDArray[np.int64] | None = None,
    ) -> Transitions:
        """Append one token to each of the slots.

        Args:
            actions: Token ids, shape (num_envs,); those of other slots are ignored.
            rngs: Each slot's generator.
            slots: Which slots to step; None: all.

        Returns:
            The rewards and whether the episodes ended, each of shape (num_envs,), and the info of
            each slot whose turn ended: with `truncated` in its transcript, an episode that ended
            was truncated.

        Raises:
            ValueError: If an action is no token id.
        """
        slots = np.arange(self.num_envs) if slots is None else slots
        tokens = actions[slots]
        check_ids(tokens, self.codec)
        lengths = self._slots.append(slots, tokens)
        ends = self.codec.is_stop(tokens) | (lengths == self.max_new_tokens)
        if self.codec.stop_strings:
            ends |= [self.codec.has_stopped(self._slots.response(slot)) for slot in slots]
        ending = slots[ends]
        return self._end_turns(ending.tolist(), rngs)

    def respond(
        self,
        slots: Sequence[int] | npt.NDArray[np.int64],
        responses: Sequence[Sequence[int] | TokenIds],
        rngs: Sequence[np.random.Generator],
    ) -> Transitions:
        """Give the slots the whole rest of their turns at once.

        The transitions are those of the tokens one by one: the same rewards, infos, replies and
        grown prompts, and the same draws from the generators.

        Args:
            slots: Which slots respond, each once.
            responses: The token ids for each of `slots`: up to the stop token, which is included,
                or as many as are left of the budget.
            rngs: Each slot's generator, (num_envs,).

        Returns:
            What `step` returns. All infos are there, since all turns end.

        Raises:
            ValueError: If a response is not exactly the rest of a turn. No slot is then changed.
        """
        chosen = [int(slot) for slot in slots]
        rests = rests_of_turns(self._encoded, self._slots, chosen, responses)
        for slot, tokens in zip(chosen, rests, strict=True):
            self._slots.extend(slot, tokens)
        return self._end_turns(chosen, rngs)

    def _end_turns(self, slots: Sequence[int], rngs: Sequence[np.random.Generator]) -> Transitions:
        """Decode the finished responses, let the users reply, score everything at once."""
        rewards = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        infos: list[tuple[int, Info]] = []
        if not slots:
            return rewards, terminated, infos
        transcripts = [end_turn(self._encoded, self._slots, slot, rngs[slot]) for slot in slots]
        deferred = self.deferred_scorer
        scored = score_turns(
            self.task, self.terms, self.observed, transcripts, deferred=deferred is not None
        )
        for slot, info in zip(slots, scored, strict=True):
            infos.append((slot, info))
            rewards[slot] = sum(info["reward_terms"].values())
            terminated[slot] = info["transcript"].final
            if terminated[slot]:
                info["example"] = self._slots.examples[slot]
        if deferred is not None:
            deferred.defer(scored)
        return rewards, terminated, infos

    def get_state(self) -> dict[str, Any]:
        """Return where each slot stands, as plain data without the examples and the tokenizer."""
        return {"made_of": self.made_of, **self._slots.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned.

        Raises:
            ValueError: If the state is that of an engine with other examples, budgets or slots.
        """
        check_fits(state["made_of"], self.made_of)
        self._slots.set_state(state)

    @property
    def made_of(self) -> dict[str, Any]:
        """What a state is only of use with."""
        # States from before there was a choice have none of it.
        plain = vars(ExampleSampler(1))
        drawing = {
            name: value
            for name in ("sampling", "group_size")
            if (value := getattr(self.sampler, name)) != plain[name]
        }
        return {"num_envs": self.num_envs, **drawing, **self._encoded.made_of}
