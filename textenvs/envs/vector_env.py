"""N text environments in one, stepped by the batched engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textenvs.data.sampler import Sampling
from textenvs.envs.arguments import check_arguments, check_options, check_reset_mask
from textenvs.envs.engine import Info, TextEngine
from textenvs.envs.env import TextEnv
from textenvs.envs.observations import Observation, Observations
from textenvs.envs.rendering import render_ansi
from textenvs.envs.state import SlotGenerators
from textenvs.envs.turns import copy_info
from textenvs.task import Task
from textenvs.text.codec import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = npt.NDArray[np.bool_]
Rewards = npt.NDArray[np.float64]


class TextVectorEnv(VectorEnv[Observation, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """The vectorised `TextEnv`: same task, spaces, rewards and info, N slots at once.

    Slot i behaves as a `TextEnv` seeded with `seed + i` in a Gymnasium `SyncVectorEnv` does.

    Args:
        task: A registered id, "package.module:Class", a `Task` class or a `Task`.
        num_envs: The number of slots.
        tokenizer: None (the embedded one), a name or path, a tokenizer (never changed), or a
            `textenvs.text.codec.TextCodec`, which says how to use one.
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
        sampling: Which example a slot plays next. "random": any, by the slot's own generator.
            "epoch": slot i of N takes the examples i, i + N, ... of one permutation after the
            other, so that each is played once before any is played again, as far as slots go on at
            one pace.
        group_size: So many neighbouring slots play the same examples in the same order, so that the
            k-th episodes of a group answer one prompt.
        render_mode: "ansi" or None.
        max_episode_steps: Truncate an episode after so many tokens. None: never.
        autoreset_mode: When a slot starts its next episode, as in Gymnasium.
        copy: Whether `step` and `reset` return copies of the observation arrays, or, faster for
            long budgets, the live arrays, which the next step changes.
    """

    def __init__(
        self,
        task: str | Task | type[Task],
        num_envs: int = 1,
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
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        copy: bool = True,
        **unknown: Any,
    ) -> None:
        check_arguments(type(self), unknown)
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, but it is {num_envs}.")
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode must be None or 'ansi', but it is {render_mode!r}.")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**TextEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs = num_envs
        self.engine = TextEngine(
            task,
            num_envs,
            tokenizer=tokenizer,
            dataset=dataset,
            fields=fields,
            split=split,
            reward=reward,
            observe=observe,
            choices=choices,
            template=template,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            truncate_prompt=truncate_prompt,
            reply_tokens=reply_tokens,
            stop=stop,
            chat_template=chat_template,
            system_prompt=system_prompt,
            sampling=sampling,
            group_size=group_size,
        )
        self.single_observation_space = self.engine.observation_space
        self.single_action_space = self.engine.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        self.copy = copy
        self._generators = SlotGenerators(num_envs)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        # Slots without an episode: never reset, or over and waiting for their reset.
        self._over = np.ones(num_envs, dtype=np.bool_)
        self._infos: dict[int, Info] = {}

    @property
    def task(self) -> Task:
        """The task."""
        return self.engine.task

    @property
    def codec(self) -> TextCodec:
        """How text becomes tokens."""
        return self.engine.codec

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.engine.tokenizer

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each slot's generator."""
        return tuple(self._generators.rngs)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """Each slot's seed."""
        return tuple(self._generators.seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observations, Info]:
        """Start episodes.

        Args:
            seed: One for each slot, or s for s, s+1, ...; None keeps the generators going.
            options: `example`: the index of the example, one for all or one for each slot;
                `reset_mask`: a boolean array (num_envs,) of the slots to reset, the rest goes on.
        """
        options = options or {}
        check_options(options, ("example", "reset_mask"))
        mask = check_reset_mask(options.get("reset_mask"), self.num_envs)
        self.engine.draw_from_the_first(self._generators.seed(seed, mask))
        if "reset_mask" not in options:
            self.engine.align_groups()
        example = options.get("example")
        examples = [None] if example is None else np.atleast_1d(np.asarray(example)).tolist()
        if len(examples) not in (1, self.num_envs):
            raise ValueError(
                f"options['example'] must be one index, or one for each of the {self.num_envs} "
                f"slots, but it has {len(examples)}."
            )
        for slot in np.flatnonzero(mask):
            self._start(int(slot), examples[slot % len(examples)])
        return self.engine.observe(self.copy), {}

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observations, Rewards, Mask, Mask, Info]:
        """Append one token to each slot's response; `actions` has shape (num_envs,)."""
        waiting = np.flatnonzero(self._over)
        may_wait = self.autoreset_mode == AutoresetMode.NEXT_STEP and self._generators.rngs
        running = np.flatnonzero(~self._over) if len(waiting) and may_wait else None
        observations, rewards, terminated, truncated, ended = self.advance(actions, running)
        infos: Info = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            waiting = np.flatnonzero(terminated | truncated)
            for slot in waiting.tolist():
                final = {
                    "final_obs": {key: array[slot].copy() for key, array in observations.items()},
                    "final_info": ended.pop(slot, {}),
                }
                infos = self._add_info(infos, final, slot)
        for slot, info in ended.items():
            infos = self._add_info(infos, info, slot)
        if len(waiting):
            observations = self.restart(waiting, observations)
        return observations, rewards, terminated, truncated, infos

    def advance(
        self, actions: npt.NDArray[np.int64], slots: npt.NDArray[np.int64] | None = None
    ) -> tuple[Observations, Rewards, Mask, Mask, dict[int, Info]]:
        """Append one token to some slots' responses, and start no episode.

        This is `step` without autoreset and without Gymnasium's dicts of arrays.

        Args:
            actions: Token ids, (num_envs,); those of other slots are ignored.
            slots: The indices of the slots to step; None: all. The others stay where they are.

        Returns:
            Observations, rewards, terminated and truncated, each of all slots, and an info for each
            slot whose turn ended.

        Raises:
            ValueError: If the actions are no token ids, or the slots no indices.
            ResetNeeded: If the episode in one of the slots is over or has not started.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"actions must be {self.num_envs} integers, but they have shape {actions.shape} "
                f"and dtype {actions.dtype}."
            )
        stepped = np.arange(self.num_envs) if slots is None else np.asarray(slots)
        if not np.issubdtype(stepped.dtype, np.integer):
            raise ValueError(
                f"slots must be indices, but they are of dtype {stepped.dtype}: "
                "np.flatnonzero(mask) makes indices out of a mask."
            )
        over = stepped[self._over[stepped]]
        if len(over):
            raise ResetNeeded(
                f"The episodes in slots {over.tolist()} are over or have not started: call "
                "reset(), with options={'reset_mask': mask} for some of the slots."
            )
        rewards, terminated, ended = self.engine.step(actions, self._generators.rngs, stepped)
        self._elapsed[stepped] += 1
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        truncated[[slot for slot, info in ended if info["transcript"].truncated]] = True
        terminated &= ~truncated
        if self.max_episode_steps is not None:
            truncated[stepped] |= self._elapsed[stepped] >= self.max_episode_steps
        self._over[stepped] = (terminated | truncated)[stepped]
        self._infos = dict(ended)
        # Copies: wrappers write into what they are given, and rendering needs it as it was.
        infos = {slot: copy_info(info) for slot, info in ended}
        return self.engine.observe(self.copy), rewards, terminated, truncated, infos

    def restart(
        self, slots: npt.NDArray[np.int64], observations: Observations | None = None
    ) -> Observations:
        """Start the next episodes in some of the slots.

        Args:
            slots: The indices of the slots, each once.
            observations: What `advance` has returned: it is brought up to date in these slots, and
                no other array is copied. None: all are observed anew.

        Raises:
            ResetNeeded: If the environment has never been reset.
        """
        if not self._generators.rngs:
            raise ResetNeeded("No episode has started yet: call reset() before restart().")
        for slot in slots:
            self._start(int(slot))
        if observations is None:
            return self.engine.observe(self.copy)
        self.engine.refresh(observations, slots)
        return observations

    def render(self) -> tuple[str, ...] | None:
        """Return each slot's conversation as coloured text."""
        if self.render_mode is None:
            return None
        return tuple(
            render_ansi(self.engine, slot, self._infos.get(slot, {}))
            for slot in range(self.num_envs)
        )

    def get_state(self) -> dict[str, Any]:
        """Return where each slot's episode and generator stand, as plain data."""
        return {
            "engine": self.engine.get_state(),
            **self._generators.get_state(),
            "elapsed": self._elapsed.copy(),
            "over": self._over.copy(),
            "infos": {slot: dict(info) for slot, info in self._infos.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned, here or in an environment made alike.

        Raises:
            ValueError: If the state is that of an environment with other examples, budgets or
                number of slots.
        """
        self.engine.set_state(state["engine"])
        self._generators.set_state(state)
        self._elapsed[:] = state["elapsed"]
        self._over[:] = state["over"]
        self._infos = {slot: dict(info) for slot, info in state["infos"].items()}

    def _start(self, slot: int, example: int | None = None) -> None:
        generators = self._generators
        self.engine.reset(slot, generators.rngs[slot], example, generators.seeds)
        self._elapsed[slot] = 0
        self._over[slot] = False
        self._infos.pop(slot, None)
