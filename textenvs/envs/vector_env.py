"""N text environments in one, stepped by the batched engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textenvs.envs.engine import Info, TextEngine
from textenvs.envs.env import TextEnv
from textenvs.envs.rendering import render_ansi
from textenvs.envs.slots import Observation
from textenvs.envs.state import generator_from, generator_state
from textenvs.task import Task
from textenvs.text.codec import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mask = npt.NDArray[np.bool_]


class TextVectorEnv(VectorEnv[Observation, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """The vectorised `TextEnv`: same task, spaces, rewards and info, N slots at once.

    Slot i behaves as a `TextEnv` seeded with `seed + i` in a Gymnasium `SyncVectorEnv` does.

    Args:
        task: See `TextEnv`.
        num_envs: The number of slots.
        tokenizer: See `TextEnv`.
        dataset: See `TextEnv`.
        fields: See `TextEnv`.
        split: See `TextEnv`.
        reward: See `TextEnv`.
        max_prompt_tokens: See `TextEnv`.
        max_new_tokens: See `TextEnv`.
        truncate_prompt: See `TextEnv`.
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
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        truncate_prompt: Literal["left", "right"] | None = None,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        copy: bool = True,
    ) -> None:
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
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            truncate_prompt=truncate_prompt,
        )
        self.single_observation_space = self.engine.observation_space
        self.single_action_space = self.engine.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        self.copy = copy
        self._rngs: list[np.random.Generator] = []
        self._seeds: list[int | None] = []
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        # Slots without an episode: never reset, or over and waiting for their reset.
        self._over = np.ones(num_envs, dtype=np.bool_)
        self._infos: dict[int, Info] = {}

    @property
    def task(self) -> Task:
        """The task."""
        return self.engine.task

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.engine.tokenizer

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Each slot's generator."""
        return tuple(self._rngs)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """Each slot's seed."""
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, Info]:
        """Start episodes.

        Args:
            seed: One for each slot, or s for s, s+1, ...; None keeps the generators going.
            options: `example`: the index of the example, one for all or one for each slot;
                `reset_mask`: a boolean array (num_envs,) of the slots to reset, the rest goes on.
        """
        options = options or {}
        mask = self._reset_mask(options.get("reset_mask"))
        self._seed(seed, mask)
        example = options.get("example")
        examples = [None] if example is None else np.atleast_1d(np.asarray(example)).tolist()
        if len(examples) not in (1, self.num_envs):
            raise ValueError(
                f"options['example'] must be one index, or one for each of the {self.num_envs} "
                f"slots, but it has {len(examples)}."
            )
        for slot in np.flatnonzero(mask):
            self._start(int(slot), examples[slot % len(examples)])
        return self._observation(), {}

    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[Observation, npt.NDArray[np.float64], Mask, Mask, Info]:
        """Append one token to each slot's response; `actions` has shape (num_envs,)."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"actions must be {self.num_envs} integers, but they have shape {actions.shape} "
                f"and dtype {actions.dtype}."
            )
        waiting = np.flatnonzero(self._over)
        if len(waiting) and (
            self.autoreset_mode != AutoresetMode.NEXT_STEP or len(self._rngs) < self.num_envs
        ):
            raise ResetNeeded(
                f"The episodes in slots {waiting.tolist()} are over or have not started: call "
                "reset(), with options={'reset_mask': mask} for some of the slots."
            )
        slots = np.flatnonzero(~self._over) if len(waiting) else None
        rewards, terminated, ended = self.engine.step(actions, self._rngs, slots)
        self._elapsed += 1
        for slot in waiting:
            self._start(int(slot))
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        if self.max_episode_steps is not None:
            truncated = self._elapsed >= self.max_episode_steps
        self._infos = dict(ended)
        infos: Info = {}
        done = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            infos = self._same_step_reset(np.flatnonzero(done))
        else:
            self._over = done
        for ended_slot, info in ended:
            if not self._was_reset(ended_slot, done):
                infos = self._add_info(infos, info, ended_slot)
        return self._observation(), rewards, terminated, truncated, infos

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
            "generators": [generator_state(rng) for rng in self._rngs],
            "seeds": list(self._seeds),
            "elapsed": self._elapsed.copy(),
            "over": self._over.copy(),
            "infos": {slot: dict(info) for slot, info in self._infos.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where `get_state` was called, here or in an environment made alike.

        Raises:
            ValueError: If the state is that of an environment with other examples, budgets or
                number of slots.
        """
        self.engine.set_state(state["engine"])
        generators = [generator_from(generator) for generator in state["generators"]]
        self._rngs = [rng for rng in generators if rng is not None]
        self._seeds = list(state["seeds"])
        self._elapsed[:] = state["elapsed"]
        self._over = state["over"].copy()
        self._infos = {slot: dict(info) for slot, info in state["infos"].items()}

    def _was_reset(self, slot: int, done: Mask) -> bool:
        return bool(self.autoreset_mode == AutoresetMode.SAME_STEP and done[slot])

    def _same_step_reset(self, slots: npt.NDArray[np.intp]) -> Info:
        """Keep what the finished episodes ended with, and start the next ones."""
        infos: Info = {}
        for slot in slots:
            final = {
                "final_obs": {k: v[slot].copy() for k, v in self.engine.observations.items()},
                "final_info": self._infos.pop(int(slot), {}),
            }
            infos = self._add_info(infos, final, int(slot))
            self._start(int(slot))
        return infos

    def _start(self, slot: int, example: int | None = None) -> None:
        self.engine.reset(slot, self._rngs[slot], example)
        self._elapsed[slot] = 0
        self._over[slot] = False

    def _seed(self, seed: int | Sequence[int | None] | None, mask: Mask) -> None:
        if seed is None:
            seeds: Sequence[int | None] = [None] * self.num_envs
        elif isinstance(seed, (int, np.integer)):
            seeds = [int(seed) + slot for slot in range(self.num_envs)]
        else:
            seeds = seed
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"Expected {self.num_envs} seeds, one for each slot, got {len(seeds)}."
            )
        if not self._rngs:
            generators = [seeding.np_random(s) for s in seeds]
            self._rngs = [rng for rng, _ in generators]
            self._seeds = [used for _, used in generators]
        for slot, value in enumerate(seeds):
            if value is not None and mask[slot]:
                self._rngs[slot], self._seeds[slot] = seeding.np_random(value)

    def _reset_mask(self, mask: Any) -> Mask:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must be a boolean array of shape ({self.num_envs},) with "
                f"at least one True, but it has dtype {mask.dtype}, shape {mask.shape}."
            )
        return cast("Mask", mask)

    def _observation(self) -> Observation:
        live = self.engine.observations
        return {key: array.copy() for key, array in live.items()} if self.copy else live
