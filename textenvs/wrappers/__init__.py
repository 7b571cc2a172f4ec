"""Wrappers for single text environments; those for vector ones are in `textenvs.wrappers.vector`.

To clip, scale or normalise a reward, use Gymnasium's own (`ClipReward`, `TransformReward`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from textenvs.rewards import RewardTerm, check_new_names, resolve_rewards, score_transcripts

__all__ = ["AddReward"]


class AddReward(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Add reward terms to those that an environment has, by name, at the end of each turn.

    Args:
        env: A text environment: one with `info["transcript"]` at the end of a turn.
        reward: What `gym.make(..., reward=...)` takes: a term, a function, a metric, a name, or a
            list of these with weights.
    """

    def __init__(self, env: gym.Env[Any, Any], reward: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, reward=reward)
        super().__init__(env)
        self.terms: Sequence[RewardTerm] = resolve_rewards(reward, env.get_wrapper_attr("task"))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step, and score the transcript if a turn ended."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "transcript" in info:
            check_new_names(self.terms, info["reward_terms"])
            scores = {t.name: score_transcripts(t, [info["transcript"]])[0] for t in self.terms}
            info = {**info, "reward_terms": {**info["reward_terms"], **scores}}
            reward = float(reward) + sum(scores.values())
        return observation, float(reward), terminated, truncated, info
