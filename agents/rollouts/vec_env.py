"""A Gymnasium vector environment, seen as a stable-baselines3 one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeGuard, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvObs, VecEnvStepReturn

from textenvs.envs.engine import TextEngine
from textenvs.envs.vector_env import TextVectorEnv

# These can reset some of their slots at any time, even in next-step mode.
RESET_ANY_TIME = (SyncVectorEnv, AsyncVectorEnv, TextVectorEnv)
# What Gymnasium's wrappers know of slots, and forget of all of them when some are reset: always, or
# around a "sync" or "async" environment.
FORGETFUL: dict[type[Any], tuple[str, ...]] = {
    NormalizeReward: ("accumulated_reward",),
    RecordEpisodeStatistics: ("episode_returns", "episode_lengths", "episode_start_times"),
}


class GymnasiumVecEnv(VecEnv):
    """SB3's `VecEnv` around any `gymnasium.vector.VectorEnv`, native, "sync" or "async".

    SB3 wants a finished episode's slot to be in its next episode when `step` returns, and the last
    observation in its info. In same-step mode the environment does that; in the other modes the
    finished slots are reset at once with `options={"reset_mask": ...}`. A `TextVectorEnv` itself,
    without wrappers around it, is asked slot by slot and not through Gymnasium's dicts of arrays,
    with the same results.

    Args:
        env: The vector environment, of any autoreset mode.

    Raises:
        ValueError: If finished slots can only be reset by a further step of all slots.
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self._same_step = mode == AutoresetMode.SAME_STEP
        if mode == AutoresetMode.NEXT_STEP and not isinstance(env.unwrapped, RESET_ANY_TIME):
            raise ValueError(
                f"SB3 needs finished slots to be reset at once, but {env} resets them with the "
                "next step: make it with another autoreset mode or vectorization_mode='sync'."
            )
        self._native = env if _is_native(env) else None
        self._active: npt.NDArray[np.bool_] | None = None
        self._actions: npt.NDArray[Any] = np.empty(0)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata

    @property
    def native(self) -> TextVectorEnv | None:
        """The environment, if it is a `TextVectorEnv` itself, without wrappers around it."""
        return self._native

    @property
    def active(self) -> npt.NDArray[np.bool_] | None:
        """The slots that step, (num_envs,); None: all.

        The others stay where they are: their reward is 0, they are not done, they have no info, and
        their generators draw nothing.

        Raises:
            ValueError: If it is set to anything but a mask of all slots, or `env` is not a
                `TextVectorEnv` itself.
        """
        return self._active

    @active.setter
    def active(self, mask: npt.NDArray[np.bool_] | None) -> None:
        if mask is not None:
            if self._native is None:
                raise ValueError(
                    "Only a TextVectorEnv without Gymnasium's wrappers around it can step some of "
                    f"its slots, but the environment is {self.env}."
                )
            mask = np.array(mask)
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
                raise ValueError(
                    f"active must be None or a boolean array of shape ({self.num_envs},), but it "
                    f"has dtype {mask.dtype}, shape {mask.shape}."
                )
        self._active = mask

    def reset(self) -> VecEnvObs:
        """Reset every slot."""
        # As in SB3, seeds and options are used for one reset.
        if any(repr(options) != repr(self._options[0]) for options in self._options):
            raise ValueError(
                "A vector environment has the same options for all of its slots, but set_options "
                f"was given different ones: {self._options}."
            )
        # Slot i gets the first seed + i, in SB3 as in Gymnasium.
        observations, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = self._split(infos)
        self._reset_seeds()
        self._reset_options()
        return cast("VecEnvObs", self._own(observations))

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Remember the actions."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every slot, or the `active` ones, and start the next episode where one ended."""
        if self._native is not None:
            return self._step_native(self._native)
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        dones = np.logical_or(terminated, truncated)
        split = self._split(infos)
        for slot in np.flatnonzero(dones):
            if self._same_step:
                last, info = split[slot].pop("final_obs"), split[slot].pop("final_info")
                # RecordEpisodeStatistics puts an episode's end where the next one's beginning is.
                if "episode" in split[slot]:
                    info["episode"] = split[slot].pop("episode")
                self.reset_infos[slot] = split[slot]
                split[slot] = {**info, "terminal_observation": last}
            else:
                split[slot]["terminal_observation"] = _row(observations, int(slot))
            split[slot]["TimeLimit.truncated"] = bool(truncated[slot] and not terminated[slot])
        if dones.any() and not self._same_step:
            observations, infos = self._reset_some(dones)
            for i, info in enumerate(self._split(infos)):
                if dones[i]:
                    self.reset_infos[i] = info
        return self._own(observations), np.array(rewards, dtype=np.float32), dones, split

    def _reset_some(self, slots: npt.NDArray[np.bool_]) -> tuple[Any, dict[str, Any]]:
        """Reset the slots of a mask, (num_envs,)."""
        kept = [
            (layer, name, getattr(layer, name).copy())
            for layer in _layers(self.env)
            for wrapper, names in FORGETFUL.items()
            if isinstance(layer, wrapper)
            for name in names
        ]
        observations, infos = self.env.reset(options={"reset_mask": slots})
        for layer, name, before in kept:
            getattr(layer, name)[~slots] = before[~slots]
        return observations, infos

    def _step_native(self, env: TextVectorEnv) -> VecEnvStepReturn:
        slots = None if self._active is None else np.flatnonzero(self._active)
        live, rewards, terminated, truncated, ended = env.advance(self._actions, slots)
        observations = self._own(live)
        infos = [ended.get(slot, {}) for slot in range(self.num_envs)]
        dones = terminated | truncated
        done_slots = np.flatnonzero(dones)
        for slot in done_slots.tolist():
            infos[slot]["terminal_observation"] = _row(observations, slot)
            infos[slot]["TimeLimit.truncated"] = bool(truncated[slot] and not terminated[slot])
            self.reset_infos[slot] = {}
        if len(done_slots):
            observations = env.restart(done_slots, observations)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of each slot; what the slots share is repeated."""
        slots = list(self._get_indices(indices))
        common = self._common(attr_name)
        if common is not None:
            return [getattr(*common)] * len(slots)
        base: Any = self.env.unwrapped
        if hasattr(base, "call"):
            # Gymnasium's own get_attr would call what is callable, such as a tokenizer.
            values = base.call("get_wrapper_attr", attr_name)
            return [values[slot] for slot in slots]
        raise AttributeError(f"{base} has no attribute {attr_name!r}.")

    def has_attr(self, attr_name: str) -> bool:
        """Return whether slots have an attribute, without asking workers for what ends them."""
        base: Any = self.env.unwrapped
        if self._common(attr_name) is not None or not hasattr(base, "call"):
            return super().has_attr(attr_name)
        return all(base.call("has_wrapper_attr", attr_name))

    def _common(self, attr_name: str) -> tuple[Any, str] | None:
        """Return what has an attribute that the slots share, and its name there."""
        for name in (f"single_{attr_name}", attr_name):  # a slot's own space, not the batch's
            for owner in (self.env, self.env.unwrapped):
                if hasattr(owner, name):
                    return owner, name
        return None

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of every slot."""
        if len(list(self._get_indices(indices))) < self.num_envs:
            raise ValueError(f"{attr_name} can only be set for all slots: leave indices out.")
        base: Any = self.env.unwrapped
        if hasattr(base, "set_attr"):
            base.set_attr(attr_name, value)
        else:
            setattr(base, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of every slot."""
        base: Any = self.env.unwrapped
        slots = list(self._get_indices(indices))
        if hasattr(base, "call"):
            results = base.call(method_name, *method_args, **method_kwargs)
            return [results[slot] for slot in slots]
        return [getattr(base, method_name)(*method_args, **method_kwargs)] * len(slots)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Return whether the vector environment is inside such a wrapper."""
        found = any(isinstance(layer, wrapper_class) for layer in _layers(self.env))
        return [found] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[npt.NDArray[Any] | None]:
        """Return no images: text is rendered as text."""
        return [None] * self.num_envs

    def _own(self, observations: Any) -> Any:
        """Return observations that the next step does not change."""
        copied = getattr(self.env.unwrapped, "copy", True)
        return observations if copied else deepcopy(observations)

    def _split(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """Return each slot's own info out of a batch's; most slots have none."""
        split: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for key, values in infos.items():
            mask = infos.get(f"_{key}")
            if key.startswith("_") and key[1:] in infos:
                continue
            for slot in self._having(values, mask):
                split[slot][key] = (
                    self._nested(values, slot) if isinstance(values, dict) else values[slot]
                )
        return split

    def _having(self, values: Any, mask: Any) -> Iterable[int]:
        if mask is not None:
            return [int(slot) for slot in np.flatnonzero(mask)]
        return range(self.num_envs)

    def _nested(self, values: dict[str, Any], slot: int) -> dict[str, Any]:
        """Return a slot's part of a dict of batches."""
        own = {}
        for key, batch in values.items():
            if key.startswith("_") and key[1:] in values:
                continue
            mask = values.get(f"_{key}")
            if mask is None or mask[slot]:
                own[key] = self._nested(batch, slot) if isinstance(batch, dict) else batch[slot]
        return own


def _layers(env: Any) -> Iterator[Any]:
    """Yield a vector environment's wrappers, the outermost first, and the environment inside."""
    yield env
    while isinstance(env, gym.vector.VectorWrapper):
        env = env.env
        yield env


def _is_native(env: Any) -> TypeGuard[TextVectorEnv]:
    """Return whether `advance` and `restart` do what `step` and `reset` do.

    They do not in a subclass that changes only `step` or `reset`.
    """
    return (
        isinstance(env, TextVectorEnv)
        and type(env).step is TextVectorEnv.step
        and type(env).reset is TextVectorEnv.reset
    )


def _row(observations: Any, slot: int) -> Any:
    """Return a copy of one slot's observation."""
    if isinstance(observations, dict):
        return {key: np.array(batch[slot]) for key, batch in observations.items()}
    return np.array(observations[slot])


def as_vec_env(env: Any) -> Any:
    """Return SB3's view of a Gymnasium vector environment, and anything else as it is."""
    if isinstance(env, gym.vector.VectorEnv):
        return GymnasiumVecEnv(env)
    return env


def engine_of(env: Any) -> TextEngine:
    """Return the engine of a text environment, single or vectorised, Gymnasium's or SB3's.

    Of several environments in one, the first one's.

    Raises:
        TypeError: If it is no text environment.
    """
    if isinstance(env, gym.vector.VectorEnv):
        env = GymnasiumVecEnv(env)
    if isinstance(env, VecEnv):
        found = env.get_attr("engine", indices=[0])[0] if env.has_attr("engine") else None
    else:
        found = getattr(getattr(env, "unwrapped", env), "engine", None)
    if not isinstance(found, TextEngine):
        raise TypeError(f"Expected an environment of textenvs, but got {env}.")
    return found
