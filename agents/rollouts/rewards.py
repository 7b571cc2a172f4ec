"""Rewards that come after their steps: slow reward terms, scored while a rollout goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.vec_env import GymnasiumVecEnv
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards.deferred import DeferredScorer

if TYPE_CHECKING:
    from agents.algorithms.ppo import PPO


@contextmanager
def late_rewards(agent: PPO, env: VecEnv, buffer: SequenceRolloutBuffer) -> Iterator[None]:
    """Score the slow terms of the rollout collected in this block in a thread of their own.

    When all its steps are in the buffer, before anything is computed from them, the rollout waits
    for the scores, and they are entered where they would have been: then buffer, infos, monitor and
    statistics are as if each step had waited. A rollout that an error or an interrupt ends leaves
    nothing behind.

    Without slow terms, or if anything around the environment has read the rewards by then, this
    does nothing and the rewards come with the step.
    """
    if not _can_wait(env):
        yield
        return
    late = LateRewards(agent, env, buffer)
    try:
        yield
        late.settle()
    except BaseException:
        if late.begun:
            # The monitor's sums lack what was not scored, so these episodes cannot go on.
            agent._last_obs = None
        raise
    finally:
        late.end()


class LateRewards:
    """The steps of a rollout whose rewards are incomplete.

    Args:
        agent: Whose rollout it is; it gives each step's infos to `hold`.
        env: What it plays in, as `_can_wait` wants it.
        buffer: Where the steps go.
    """

    def __init__(self, agent: PPO, env: Any, buffer: SequenceRolloutBuffer) -> None:
        self._agent, self._buffer = agent, buffer
        self._monitor: VecMonitor = env
        self._returns = self._monitor.episode_returns.copy()
        self._steps: list[tuple[dict[int, dict[str, Any]], npt.NDArray[np.bool_]]] = []
        self._engine = env.venv.env.engine
        self._scorer = DeferredScorer(self._engine.terms, env.num_envs)
        self._engine.deferred_scorer = self._scorer
        agent.late_rewards, buffer.settle = self, self.settle

    @property
    def begun(self) -> bool:
        """Whether there are steps yet."""
        return bool(self._steps)

    def hold(self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_]) -> None:
        """Keep a step's infos until their rewards are complete."""
        self._steps.append(({slot: info for slot, info in enumerate(infos) if info}, dones))

    def settle(self) -> None:
        """Wait for the scores and enter them: each step's as if it had just been made."""
        if self._agent.late_rewards is not self:
            return
        scored = {id(info["transcript"]): info["reward_terms"] for info in self._scorer.resolve()}
        self.end()
        returns = self._returns
        for step, (infos, dones) in enumerate(self._steps):
            rewards = self._buffer.rewards[step]
            for slot, info in infos.items():
                if "transcript" in info:
                    terms = info["reward_terms"]
                    # In the very roundings of a step that waits; and whatever else was paid stays.
                    other = float(rewards[slot]) - float(np.float32(sum(terms.values())))
                    terms.clear()
                    terms.update(scored[id(info["transcript"])])
                    rewards[slot] = other + sum(terms.values())
            returns += rewards
            for slot in np.flatnonzero(dones).tolist():
                infos[slot]["episode"]["r"] = returns[slot]
                returns[slot] = 0.0
            self._agent._update_info_buffer(list(infos.values()), dones[list(infos)])
        self._monitor.episode_returns = returns

    def end(self) -> None:
        """Let steps have their rewards at once again."""
        self._agent.late_rewards = self._buffer.settle = self._engine.deferred_scorer = None
        self._scorer.close()


def _can_wait(env: VecEnv) -> bool:
    """Return whether there are slow terms, and nobody but a monitor without a file reads rewards.

    A monitor's file has been written by the time that the scores are known.
    """
    return (
        type(env) is VecMonitor
        and env.results_writer is None
        and type(env.venv) is GymnasiumVecEnv
        and isinstance(env.venv.env, TextVectorEnv)
        and any(term.slow for term in env.venv.env.engine.terms)
    )
