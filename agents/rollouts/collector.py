"""The rollout loop: step by step through any `VecEnv`, by SB3's callback protocol."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import Observation, SequenceRolloutBuffer, Truncation
from agents.rollouts.deferred import DeferredRewards, deferred_rewards
from agents.rollouts.unfinished import UnfinishedEpisode, put_back
from agents.rollouts.vec_env import GymnasiumVecEnv
from textenvs.envs.engine import TextEngine
from textenvs.envs.observations import Observations
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.task import Transcript


class Agent(Protocol):
    """What the loop needs of an SB3 algorithm: where the last step left off."""

    num_timesteps: int
    waited: float
    _last_obs: Any
    _last_episode_starts: Any
    unfinished: list[UnfinishedEpisode]

    def record_infos(self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_]) -> None:
        """Take in a step's infos."""
        ...


class StepSource:
    """Steps through an environment: so many steps of each slot, or so many whole episodes.

    Args:
        agent: Whose observations, counters and statistics go on.
        env: The environment.
        n_steps: Steps of each slot; with `episodes_per_slot`, about how many to prepare for.
        episodes_per_slot: Episodes of each slot, all of them whole. A slot that has had its own
            leaves the batch and waits. It needs environments made by `gym.make_vec`, with no more
            than a monitor around them. None: `n_steps`.
        resample: Asked when all slots have had their episodes and these are scored: whether each
            is to have as many again. None: never.

    Raises:
        ValueError: If the environment's slots cannot wait.
    """

    def __init__(
        self,
        agent: Agent,
        env: VecEnv,
        n_steps: int,
        episodes_per_slot: int | None = None,
        resample: Callable[[SequenceRolloutBuffer], bool] | None = None,
    ) -> None:
        self._agent, self._env = agent, env
        self._n_steps = n_steps
        self._episodes = episodes_per_slot
        self._resample = resample
        # Only without wrappers in between are observations known to be as the engine made them,
        # so that the versions of their prompts hold.
        self._adapter = native_adapter(env)
        self._engine = native_engine(env)
        if episodes_per_slot is not None:
            check_slots_can_wait(env)

    def fill(
        self, policy: TransformerPolicy, buffer: SequenceRolloutBuffer, callback: BaseCallback
    ) -> bool:
        """Collect a rollout; see `RolloutSource`."""
        agent = self._agent
        policy.set_training_mode(False)
        engine = self._engine
        begins = np.all(agent._last_episode_starts) and (engine is None or engine.groups_agree)
        if self._episodes is not None and not begins:
            agent._last_obs = self._env.reset()
            agent._last_episode_starts = np.ones(self._env.num_envs, dtype=np.bool_)
        if engine is not None:
            drawn = np.array(engine.drawn)
            buffer.first_episodes = drawn - drawn.min()
        buffer.reset()
        started = time.perf_counter()
        callback.on_rollout_start()
        agent.waited = time.perf_counter() - started
        starts = agent._last_episode_starts  # an episode that was reset does not go on
        put_back(buffer, (e for e in agent.unfinished if not starts[e["slot"]]))
        policy.start_rollout(self._n_steps)
        goes_on = self._collect(policy, buffer, callback)
        while goes_on and self._resample is not None and self._resample(buffer):
            goes_on = self._collect(policy, buffer, callback)
        if goes_on:
            buffer.finish(self._last_values(policy), agent._last_episode_starts)
        return goes_on

    def _collect(
        self, policy: TransformerPolicy, buffer: SequenceRolloutBuffer, callback: BaseCallback
    ) -> bool:
        """Let each slot have its steps or episodes, and score them all."""
        agent = self._agent
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
        agent = self._agent
        assert self._episodes is not None
        missing = np.full(self._env.num_envs, self._episodes)
        try:
            while (slots := np.flatnonzero(missing)).size:
                if not self._step(policy, buffer, callback, deferred, slots):
                    return False
                missing[slots] -= agent._last_episode_starts[slots]
                left = np.flatnonzero(missing)
                if 0 < len(left) < len(slots):
                    policy.keep_rows(np.searchsorted(slots, left))
        finally:
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
        last = agent._last_obs if self._adapter is not None else dict(agent._last_obs)
        obs = last if whole else rows_of(last, slots)
        begun = slots[np.asarray(agent._last_episode_starts)[slots]]
        if self._engine is not None and len(begun):
            playing = self._engine.playing
            for slot in begun.tolist():
                rollout_buffer.examples[slot, int(rollout_buffer.lengths[slot])] = playing[slot]
        tokens, log_probs, values = policy.act(obs)
        actions = self._of_all(tokens, slots)
        new_obs, rewards, dones, infos = self._env_step(actions, slots)
        agent.num_timesteps += len(slots)
        seen = {
            "self": agent,
            "env": env,
            "callback": callback,
            "rollout_buffer": rollout_buffer,
            "n_rollout_steps": self._n_steps,
            "n_steps": rollout_buffer.pos,
            "obs_tensor": {key: th.from_numpy(array) for key, array in last.items()},
            "actions": actions,
            "clipped_actions": actions,
            "log_probs": th.from_numpy(self._of_all(log_probs, slots)),
            "values": th.from_numpy(
                self._of_all(np.zeros_like(log_probs) if values is None else values, slots)
            )[:, None],
            "slots": slots,
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
        for slot, info in enumerate(infos):
            transcript = info.get("transcript")
            if isinstance(transcript, Transcript) and not transcript.stopped:
                rollout_buffer.cut_turns.add((slot, int(places[slot])))
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

    def _env_step(self, actions: npt.NDArray[Any], slots: npt.NDArray[np.intp]) -> Any:
        """Step some slots; whoever else steps the environment, such as a callback, steps all."""
        if len(slots) == self._env.num_envs or self._adapter is None:
            return self._env.step(actions)
        self._adapter.active = np.isin(np.arange(self._env.num_envs), slots)
        try:
            return self._env.step(actions)
        finally:
            self._adapter.active = None

    def _of_all(self, values: npt.NDArray[Any], slots: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """Return an array of all slots, 0 where a slot waits."""
        if len(slots) == self._env.num_envs:
            return values
        every = np.zeros(self._env.num_envs, dtype=values.dtype)
        every[slots] = values
        return every

    def _last_values(self, policy: TransformerPolicy) -> npt.NDArray[np.float32]:
        """Return the values of the observations that the rollout ends with, 0 behind an end."""
        over = np.asarray(self._agent._last_episode_starts, dtype=np.bool_)
        last = self._agent._last_obs
        values = np.zeros(len(over), dtype=np.float32)
        if policy.critic and not over.all():
            rows = np.flatnonzero(~over)
            values[rows] = policy.next_values(last, rows)
        return values


def native_adapter(env: VecEnv) -> GymnasiumVecEnv | None:
    """Return what steps a native vector environment that has no wrapper besides a monitor."""
    adapter = env.venv if type(env) is VecMonitor else env
    native = isinstance(adapter, GymnasiumVecEnv) and adapter.native is not None
    return cast("GymnasiumVecEnv", adapter) if native else None


def native_engine(env: VecEnv) -> TextEngine | None:
    """Return the engine of such an environment."""
    adapter = native_adapter(env)
    return None if adapter is None else cast("TextVectorEnv", adapter.native).engine


def check_slots_can_wait(env: VecEnv) -> None:
    """Refuse environments whose slots cannot wait for each other.

    Raises:
        ValueError: If it is no native vector environment, or has a wrapper besides a monitor.
    """
    if native_adapter(env) is None:
        raise ValueError(
            "episodes_per_slot lets slots wait for each other, which needs an environment made by "
            f"gym.make_vec('...-v0', num_envs=...) with no wrappers around it, but it is {env}."
        )


def rows_of(observation: Observation, rows: npt.NDArray[np.intp]) -> Observation:
    """Return some rows of a batch of observations."""
    if isinstance(observation, Observations):
        return observation.rows(rows)
    return {key: values[rows] for key, values in observation.items()}
