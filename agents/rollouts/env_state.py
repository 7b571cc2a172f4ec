"""Where a stack of environments stands, as an agent holds it: taken out and put into another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.error import Error as GymnasiumError
from gymnasium.vector import AsyncVectorEnv, VectorWrapper
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
)

from agents import compat
from agents.rollouts.vec_env import GymnasiumVecEnv
from textenvs.envs.state import check_fits
from textenvs.envs.vector_env import TextVectorEnv

# What the wrappers around all slots remember from step to step.
WRAPPERS: dict[type[Any], tuple[str, ...]] = {
    VecMonitor: ("episode_returns", "episode_lengths", "episode_count"),
    VecNormalize: ("obs_rms", "ret_rms", "returns", "old_obs", "old_reward"),
    vector_wrappers.NormalizeObservation: ("obs_rms",),
    vector_wrappers.NormalizeReward: ("return_rms", "accumulated_reward", "_prev_dones"),
    vector_wrappers.RecordEpisodeStatistics: (
        "episode_count",
        "episode_returns",
        "episode_lengths",
        "prev_dones",
        "time_queue",
        "return_queue",
        "length_queue",
    ),
}

# The same of a single environment and its wrappers: `TextEnv`, `TimeLimit`, SB3's `Monitor`,
# `NormalizeReward`. A worker process can only be asked by name, so no name may be had twice.
SINGLE = (
    "text_state",
    "_elapsed_steps",
    "rewards",
    "needs_reset",
    "total_steps",
    "return_rms",
    "discounted_reward",
)


def get_env_state(env: VecEnv) -> dict[str, Any] | None:
    """Return where text environments stand, position in the episode and generators included.

    What a wrapper remembers is part of it for those of `WRAPPERS` and `SINGLE`; any other is taken
    to remember nothing. Reward terms are taken to be pure functions.

    Args:
        env: Of SB3's kind, with any wrappers, in this process or in workers.

    Returns:
        Plain picklable data, or None: for other environments than those of `textenvs`, and if the
        workers cannot be asked, since they are closed, busy or gone.
    """
    *wrappers, base = _layers(env)
    try:
        slots = _slots(base)
    except (OSError, EOFError, GymnasiumError):  # an interrupt ends workers, too
        return None
    if slots is None:
        return None
    remembered = [(type(w).__name__, _remembered(w)) for w in wrappers]
    return {"wrappers": remembered, "slots": slots}


def set_env_state(env: VecEnv, state: dict[str, Any]) -> None:
    """Put an environment that has been reset where `get_env_state` found another one.

    Raises:
        ValueError: If it is wrapped otherwise or has other examples, budgets or slots. It is then
            left as it is.
    """
    own = get_env_state(env)
    if own is None:
        raise ValueError(f"Expected environments of textenvs, open and idle, got {env}.")
    *wrappers, base = _layers(env)
    if _names(own) != _names(state):
        raise ValueError(
            f"The state is that of another environment: expected {_names(own)}, got "
            f"{_names(state)}. Make the environment with the same wrappers."
        )
    for ours, theirs in zip(_engines(own), _engines(state), strict=True):
        check_fits(theirs["made_of"], ours["made_of"])
    for wrapper, (_, remembered) in zip(wrappers, state["wrappers"], strict=True):
        vars(wrapper).update(deepcopy(remembered))
    slots = state["slots"]
    if isinstance(base, TextVectorEnv):
        base.set_state(slots["native"])
        return
    for name, values in slots.items():
        _set_each(base, name, deepcopy(values))


def shows(state: dict[str, Any], observations: Any) -> bool:
    """Return whether these observations are those that an environment in this state gave last."""
    engines = [engine["observations"] for engine in _engines(state)]
    return isinstance(observations, dict) and all(
        np.array_equal(np.concatenate([engine[key] for engine in engines]), values)
        for key, values in observations.items()
    )


def _layers(env: VecEnv) -> Iterator[Any]:
    """Yield the wrappers around all slots, the outermost first, and what is inside of them."""
    layer: Any = env
    while isinstance(layer, VecEnvWrapper):
        yield layer
        layer = layer.venv
    adapter = layer
    if isinstance(adapter, GymnasiumVecEnv):
        layer = adapter.env
        while isinstance(layer, VectorWrapper):
            yield layer
            layer = layer.env
    yield layer if isinstance(layer, TextVectorEnv) else adapter


def _remembered(wrapper: Any) -> dict[str, Any]:
    names = {name for kind, own in WRAPPERS.items() if isinstance(wrapper, kind) for name in own}
    return {name: deepcopy(value) for name, value in vars(wrapper).items() if name in names}


def _slots(base: Any) -> dict[str, Any] | None:
    """Return the state of a native vector environment, or of each slot's own, by name."""
    if isinstance(base, TextVectorEnv):
        return {"native": base.get_state()}
    if not _can_be_asked(base) or not _have(base, SINGLE[0]):
        return None
    return {
        name: deepcopy(base.env_method("get_wrapper_attr", name))
        for name in SINGLE
        if _have(base, name)
    }


def _can_be_asked(base: VecEnv) -> bool:
    if isinstance(base, SubprocVecEnv):
        return not (base.closed or base.waiting)
    if isinstance(base, GymnasiumVecEnv):
        vector: Any = base.env.unwrapped
        if isinstance(vector, AsyncVectorEnv) and not compat.is_idle(vector):
            return False
        return hasattr(vector, "call") and not vector.closed
    return True


def _have(base: VecEnv, name: str) -> bool:
    # To ask a subprocess for what it does not have would end it.
    return all(base.env_method("has_wrapper_attr", name))


def _set_each(base: VecEnv, name: str, values: Sequence[Any]) -> None:
    """Give each slot its own value of an attribute, of whichever wrapper has it."""
    if isinstance(base, GymnasiumVecEnv):
        vector: Any = base.env.unwrapped
        vector.set_attr(name, values)
        return
    for slot, value in enumerate(values):
        base.env_method("set_wrapper_attr", name, value, indices=[slot])


def _engines(state: dict[str, Any]) -> list[dict[str, Any]]:
    slots = state["slots"]
    if "native" in slots:
        return [slots["native"]["engine"]]
    return [slot["engine"] for slot in slots["text_state"]]


def _names(state: dict[str, Any]) -> str:
    """Name what a state is made of, for comparison and for the user."""
    slots = state["slots"]
    inside = "a native vector environment"
    if "native" not in slots:
        inside = f"{len(slots['text_state'])} single environments with {', '.join(slots)}"
    return " over ".join([*(name for name, _ in state["wrappers"]), inside])
