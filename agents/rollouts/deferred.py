"""Rewards that come after their steps: slow reward terms, scored while a rollout goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.vec_env import GymnasiumVecEnv
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards.deferred import DeferredScorer

# What else an info has only when its slow terms are known.
FILLED_LATER = ("observed", "is_success")
# Takes in a step's infos of some slots, and which of these slots' episodes ended.
Record = Callable[[list[dict[str, Any]], npt.NDArray[np.bool_]], None]


@dataclass(frozen=True)
class _Step:
    """A step whose rewards are incomplete.

    Args:
        infos: By slot, where there is one.
        dones: (num_envs,)
        rewards: (num_envs,) as far as they are known.
        places: (num_envs,) the step of each slot in the buffer.
    """

    infos: dict[int, dict[str, Any]]
    dones: npt.NDArray[np.bool_]
    rewards: npt.NDArray[Any]
    places: npt.NDArray[np.intp]


class DeferredRewards:
    """The steps of a rollout whose rewards are completed at its end.

    Args:
        env: What it plays in, as `_defers` wants it.
        record: Takes in each step's infos when they are complete.
    """

    def __init__(self, env: Any, record: Record) -> None:
        self._record = record
        self._monitor: VecMonitor = env
        self._returns = self._monitor.episode_returns.copy()
        self._steps: list[_Step] = []
        self._engine = env.venv.env.engine
        self._scorer = DeferredScorer(self._engine.terms, env.num_envs, self._engine.observed)
        self._engine.deferred_scorer = self._scorer

    @property
    def pending(self) -> bool:
        """Whether there are steps that wait."""
        return bool(self._steps)

    def defer(
        self,
        infos: list[dict[str, Any]],
        dones: npt.NDArray[np.bool_],
        rewards: npt.NDArray[Any],
        places: npt.NDArray[np.intp],
    ) -> None:
        """Keep a step until its rewards are complete; see `_Step`."""
        present = {slot: info for slot, info in enumerate(infos) if info}
        self._steps.append(_Step(present, dones, np.array(rewards), places.copy()))

    def resolve(self, buffer: SequenceRolloutBuffer) -> None:
        """Wait for the scores and enter them: each step's as if it had just been made."""
        scored = {id(info["transcript"]): info for info in self._scorer.resolve()}
        self.close()
        returns = self._returns
        for step in self._steps:
            for slot, info in step.infos.items():
                if "transcript" in info:
                    terms = info["reward_terms"]
                    # In the very roundings of a step that waits; and whatever else was paid stays.
                    other = float(step.rewards[slot]) - float(np.float32(sum(terms.values())))
                    terms.clear()
                    complete = scored[id(info["transcript"])]
                    terms.update(complete["reward_terms"])
                    info.update({k: complete[k] for k in FILLED_LATER if k in complete})
                    step.rewards[slot] = other + sum(terms.values())
                    buffer.rewards[step.places[slot], slot] = step.rewards[slot]
            returns += step.rewards
            for slot in np.flatnonzero(step.dones).tolist():
                step.infos[slot]["episode"]["r"] = returns[slot]
                returns[slot] = 0.0
            self._record(list(step.infos.values()), step.dones[list(step.infos)])
        self._monitor.episode_returns = returns

    def close(self) -> None:
        """Let steps have their rewards at once again."""
        self._engine.deferred_scorer = None
        self._scorer.close()


@contextmanager
def deferred_rewards(env: VecEnv, record: Record) -> Iterator[DeferredRewards | None]:
    """Score the slow terms of the rollout collected in this block in a thread of their own.

    When all its steps are in the buffer, before anything is computed from them, `resolve` waits for
    the scores and enters them where they would have been: then buffer, infos, monitor and
    statistics are as if each step had waited.

    Yields:
        None without slow terms, or if anything around the environment has read the rewards by then:
        the rewards come with the step.
    """
    if not _defers(env):
        yield None
        return
    deferred = DeferredRewards(env, record)
    try:
        yield deferred
    finally:
        deferred.close()


def _defers(env: VecEnv) -> bool:
    """Return whether there are slow terms, and nobody but a monitor without a file reads rewards.

    A monitor's file has been written by the time that the scores are known.
    """
    if not (
        type(env) is VecMonitor
        and env.results_writer is None
        and type(env.venv) is GymnasiumVecEnv
        and isinstance(env.venv.env, TextVectorEnv)
    ):
        return False
    engine = env.venv.env.engine
    return any(term.slow for term in [*engine.terms, *engine.observed])
