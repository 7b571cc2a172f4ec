"""The rollout loop: step by step through any `VecEnv`, by SB3's callback protocol."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import Observation, SequenceRolloutBuffer, Truncation
from agents.rollouts.deferred import DeferredRewards, deferred_rewards
from agents.rollouts.vec_env import GymnasiumVecEnv
from textenvs.envs.observations import Observations


class Agent(Protocol):
    """What the loop needs of an SB3 algorithm: where the last step left off."""

    num_timesteps: int
    _last_obs: Any
    _last_episode_starts: Any

    def record_infos(self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_]) -> None:
        """Take in a step's infos."""
        ...


class StepSource:
    """Steps through an environment: so many steps of each slot, or so many whole episodes.

    Args:
        agent: Whose observations, counters and statistics go on.
        env: The environment.
        n_steps: Steps of each slot; with `episodes_per_slot`, what the rollout starts out from.
        episodes_per_slot: Episodes of each slot, all of them whole. A slot that has had its own
            leaves the batch and waits. It needs environments made by `gym.make_vec`, with no more
            than a monitor around them. None: `n_steps`.

    Raises:
        ValueError: If the environment's slots cannot wait.
    """

    def __init__(
        self, agent: Agent, env: VecEnv, n_steps: int, episodes_per_slot: int | None = None
    ) -> None:
        self._agent, self._env = agent, env
        self._n_steps = n_steps
        self._episodes = episodes_per_slot
        self._adapter: GymnasiumVecEnv | None = None
        if episodes_per_slot is not None:
            self._adapter = native_adapter(env)

    def fill(
        self, policy: TransformerPolicy, buffer: SequenceRolloutBuffer, callback: BaseCallback
    ) -> bool:
        """Collect a rollout; see `RolloutSource`."""
        agent = self._agent
        policy.set_training_mode(False)
        buffer.reset()
        callback.on_rollout_start()
        policy.start_rollout(self._n_steps)
        with deferred_rewards(self._env, agent.record_infos) as deferred:
            try:
                if self._episodes is None:
                    goes_on = self._collect_steps(policy, buffer, callback, deferred)
                else:
                    goes_on = self._collect_episodes(policy, buffer, callback, deferred)
                if deferred is not None:
                    deferred.resolve(buffer)
            except BaseException:
                if deferred is not None and deferred.pending:
                    # The monitor's sums lack what was not scored: these episodes cannot go on.
                    agent._last_obs = None
                raise
        if goes_on:
            buffer.finish(self._last_values(policy), agent._last_episode_starts)
        return goes_on

    def _collect_steps(
        self,
        policy: TransformerPolicy,
        buffer: SequenceRolloutBuffer,
        callback: BaseCallback,
        deferred: DeferredRewards | None,
    ) -> bool:
        slots = np.arange(self._env.num_envs)
        return all(
            self._step(policy, buffer, callback, deferred, slots) for _ in range(self._n_steps)
        )

    def _collect_episodes(
        self,
        policy: TransformerPolicy,
        buffer: SequenceRolloutBuffer,
        callback: BaseCallback,
        deferred: DeferredRewards | None,
    ) -> bool:
        agent, adapter = self._agent, self._adapter
        assert adapter is not None and self._episodes is not None
        if not np.all(agent._last_episode_starts):
            agent._last_obs = self._env.reset()
            agent._last_episode_starts = np.ones(self._env.num_envs, dtype=np.bool_)
        missing = np.full(self._env.num_envs, self._episodes)
        try:
            while (slots := np.flatnonzero(missing)).size:
                if not self._step(policy, buffer, callback, deferred, slots):
                    return False
                missing[slots] -= agent._last_episode_starts[slots]
                left = np.flatnonzero(missing)
                if 0 < len(left) < len(slots):
                    policy.keep_rows(np.searchsorted(slots, left))
                    adapter.active = missing > 0
        finally:
            adapter.active = None
            if isinstance(self._env, VecMonitor):  # It has counted the steps of those that waited.
                waiting = missing == 0
                self._env.episode_lengths[waiting] = 0
        return True

    def _step(
        self,
        policy: TransformerPolicy,
        rollout_buffer: SequenceRolloutBuffer,
        callback: BaseCallback,
        deferred: DeferredRewards | None,
        slots: npt.NDArray[np.intp],
    ) -> bool:
        """Make a step of some slots; callbacks see the local variables that SB3's loop has."""
        agent, env = self._agent, self._env
        whole = len(slots) == env.num_envs
        obs = agent._last_obs if whole else rows_of(agent._last_obs, slots)
        tokens, log_probs, values = policy.act(obs)
        actions = tokens
        if not whole:
            actions = np.zeros(env.num_envs, dtype=tokens.dtype)
            actions[slots] = tokens
        new_obs, rewards, dones, infos = env.step(actions)
        agent.num_timesteps += len(slots)
        seen = {
            "self": agent,
            "env": env,
            "callback": callback,
            "rollout_buffer": rollout_buffer,
            "n_rollout_steps": self._n_steps,
            "n_steps": rollout_buffer.pos,
            "obs_tensor": {key: th.from_numpy(array) for key, array in obs.items()},
            "actions": actions,
            "clipped_actions": actions,
            "log_probs": th.from_numpy(log_probs),
            "values": None if values is None else th.from_numpy(values)[:, None],
            "new_obs": new_obs,
            "rewards": rewards,
            "dones": dones,
            "infos": infos,
        }
        callback.update_locals(seen)
        if not callback.on_step():
            return False
        places = rollout_buffer.lengths
        for slot in np.flatnonzero(dones).tolist():
            last = infos[slot].get("terminal_observation")
            if infos[slot].get("TimeLimit.truncated") and last is not None:
                truncation = Truncation(int(places[slot]), slot, last)
                rollout_buffer.truncations.append(truncation)
        if deferred is None:
            agent.record_infos(infos, dones)
        else:
            deferred.defer(infos, dones, rewards, places)
        starts = agent._last_episode_starts
        rollout_buffer.add(
            obs,
            tokens,
            rewards[slots],
            starts[slots],
            values,
            log_probs,
            None if whole else slots,
        )
        if not whole:  # Those that wait are where their next episodes start.
            dones = dones | ~np.isin(np.arange(env.num_envs), slots)
        agent._last_obs, agent._last_episode_starts = new_obs, dones
        return True

    def _last_values(self, policy: TransformerPolicy) -> npt.NDArray[np.float32]:
        """Return the values of the observations that the rollout ends with, 0 behind an end."""
        over = np.asarray(self._agent._last_episode_starts, dtype=np.bool_)
        last = self._agent._last_obs
        values = np.zeros(len(over), dtype=np.float32)
        if policy.critic and not over.all():
            rows = np.flatnonzero(~over)
            values[rows] = policy.next_values(last, rows)
        return values


def native_adapter(env: VecEnv) -> GymnasiumVecEnv:
    """Return what steps a native vector environment, inside of a monitor or not.

    Raises:
        ValueError: If there is another wrapper, or another environment.
    """
    adapter = env.venv if type(env) is VecMonitor else env
    if not isinstance(adapter, GymnasiumVecEnv):
        raise ValueError(
            "episodes_per_slot lets slots wait for each other, which needs an environment made by "
            f"gym.make_vec('...-v0', num_envs=...) with no wrappers around it, but it is {env}."
        )
    adapter.active = np.ones(env.num_envs, dtype=np.bool_)  # raises if its slots cannot wait
    adapter.active = None
    return adapter


def rows_of(observation: Observation, rows: npt.NDArray[np.intp]) -> Observation:
    """Return some rows of a batch of observations."""
    if isinstance(observation, Observations):
        return observation.rows(rows)
    return {key: values[rows] for key, values in observation.items()}
