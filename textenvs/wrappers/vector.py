"""Wrappers for vectorised text environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from textenvs.rewards import RewardTerm, check_new_names, resolve_rewards, score_transcripts

__all__ = ["AddReward"]


class AddReward(VectorWrapper, gym.utils.RecordConstructorArgs):
    """Add reward terms to those that a vector environment has; see `textenvs.wrappers.AddReward`.

    All the turns that end in one step are scored in one call.

    Args:
        env: A vectorised text environment, native, "sync" or "async".
        reward: What `gym.make(..., reward=...)` takes.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], reward: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, reward=reward)
        super().__init__(env)
        base = env.unwrapped
        task = base.task if hasattr(base, "task") else base.get_attr("task")[0]  # type: ignore[attr-defined]
        self.terms: Sequence[RewardTerm] = resolve_rewards(reward, task)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step, and score the transcripts of the turns that ended."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        # With same-step autoreset, the info of an episode's last step is in final_info.
        for info in (infos, infos.get("final_info", {})):
            if "transcript" in info:
                rewards = rewards + self._add(info)
        return observations, rewards, terminated, truncated, infos

    def _add(self, info: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Enter the terms into a batch's info and return what they add to each slot's reward."""
        ended = np.flatnonzero(info["_transcript"])
        check_new_names(self.terms, info["reward_terms"])
        total = np.zeros(self.num_envs)
        for term in self.terms:
            scores = np.zeros(self.num_envs)
            scores[ended] = score_transcripts(term, [info["transcript"][i] for i in ended])
            info["reward_terms"][term.name] = scores
            info["reward_terms"][f"_{term.name}"] = info["_transcript"].copy()
            total += scores
        return total
