"""Rollouts in which the task's own demonstrations are said, and not what the policy samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback

from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sources import RolloutSource
from textenvs.envs.engine import TextEngine
from textenvs.envs.playing import ScriptedAgent


class DemonstrationSource:
    """Lets `Task.demonstrate` play, by another source's steps; see `RolloutSource`.

    The log-probabilities in the buffer are 0: nobody has sampled the tokens.

    Args:
        steps: Makes the steps, of whole episodes.
        engine: The environments'.
        seed: For the demonstrator.
    """

    def __init__(self, steps: RolloutSource, engine: TextEngine, seed: Any) -> None:
        self._steps = steps
        self._demonstrator: Any = _Demonstrator(engine, seed)

    def fill(self, policy: Any, buffer: SequenceRolloutBuffer, callback: BaseCallback) -> bool:
        """Fill the buffer with demonstrations."""
        return self._steps.fill(self._demonstrator, buffer, callback)


class _Demonstrator:
    """What a rollout asks of a policy, answered by the task."""

    critic = False

    def __init__(self, engine: TextEngine, seed: Any) -> None:
        self._engine = engine
        self._agent = ScriptedAgent(engine.task.demonstrate, seed)
        self._slots = np.arange(engine.num_envs)

    def act(self, observation: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any], None]:
        tokens = self._agent(self._engine, self._engine.observations, self._slots)[self._slots]
        return tokens, np.zeros(len(tokens), dtype=np.float32), None

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        self._slots = self._slots[rows]

    def start_rollout(self, steps: int) -> None:
        self._slots = np.arange(self._engine.num_envs)

    def set_training_mode(self, mode: bool) -> None:
        return None
