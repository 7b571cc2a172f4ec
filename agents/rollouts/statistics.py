"""What is logged of a rollout besides SB3's own figures."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.logger import Logger

from agents import parallel
from textenvs.task import Transcript


class TurnStatistics:
    """Means over the last turns and episodes: response length, share with EOS, reward terms.

    Args:
        window: Over how many of them.
    """

    def __init__(self, window: int) -> None:
        self._lengths: deque[int] = deque(maxlen=window)
        self._stopped: deque[bool] = deque(maxlen=window)
        self._terms: dict[str, deque[float]] = {}
        self._window = window

    def add(self, info: dict[str, Any]) -> None:
        """Take in a step's info; only those that end a turn have anything to say."""
        transcript = info.get("transcript")
        if not isinstance(transcript, Transcript):
            return
        self._lengths.append(transcript.response_tokens)
        self._stopped.append(transcript.stopped)
        for name, value in info.get("reward_terms", {}).items():
            self._terms.setdefault(name, deque(maxlen=self._window)).append(float(value))

    def record(self, logger: Logger) -> None:
        """Log the means, by turn, over those of all ranks."""
        figures: dict[str, list[float]] = defaultdict(list)
        for statistics in parallel.all_gather([self]):
            figures["rollout/response_length"] += statistics._lengths
            figures["rollout/eos_rate"] += statistics._stopped
            for name, values in statistics._terms.items():
                figures[f"reward/{name}"] += values
        for name, every in figures.items():
            if every:
                logger.record(name, float(np.mean(every)))


class EpisodeSums:
    """Sums over whole episodes of what comes step by step, over the borders of rollouts.

    Args:
        num_envs: How many episodes run side by side.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self._running = np.zeros(num_envs)

    def add(
        self,
        values: npt.NDArray[Any],
        starts: npt.NDArray[np.bool_],
        last_dones: npt.NDArray[np.bool_],
    ) -> list[float]:
        """Return the sums of the episodes that end in a rollout.

        Args:
            values: (steps, num_envs)
            starts: (steps, num_envs), true where an episode's first step is.
            last_dones: (num_envs,), true where the last step ended an episode.
        """
        ends = np.vstack([starts[1:], last_dones])
        finished: list[float] = []
        for step, value in enumerate(values):
            self._running[starts[step]] = 0.0
            self._running += value
            finished.extend(self._running[ends[step]].tolist())
        return finished


def peak_memory(device: th.device) -> float | None:
    """Return the most memory held so far, in MiB: on a GPU by tensors, else by the process."""
    if device.type == "cuda":
        return th.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
