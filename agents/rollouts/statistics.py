"""What is logged of a rollout besides SB3's own metrics."""

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

# By name, what the last turns had; plain data, which is saved with an agent.
TurnMetrics = dict[str, deque[float]]


def add_turn(metrics: TurnMetrics, info: dict[str, Any], window: int) -> None:
    """Take in a step's info; only those that end a turn have anything to say.

    Args:
        metrics: Changed in place.
        info: The step's.
        window: How many turns are remembered.
    """
    transcript = info.get("transcript")
    if not isinstance(transcript, Transcript):
        return
    values = {
        **{f"rollout/{name}": value for name, value in info.get("observed", {}).items()},
        "rollout/response_length": transcript.response_tokens,
        "rollout/eos_rate": transcript.stopped,
        **{f"reward/{name}": value for name, value in info.get("reward_terms", {}).items()},
    }
    for name, value in values.items():
        metrics.setdefault(name, deque(maxlen=window)).append(float(value))


def record_turns(metrics: TurnMetrics, logger: Logger) -> None:
    """Log the means over the turns of all ranks."""
    joined: dict[str, list[float]] = defaultdict(list)
    for own in parallel.all_gather([metrics]):
        for name, values in own.items():
            joined[name] += values
    for name, every in joined.items():
        logger.record(name, float(np.mean(every)))


def episode_sums(
    running: npt.NDArray[np.float64],
    values: npt.NDArray[Any],
    starts: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.bool_],
) -> list[float]:
    """Sum up whole episodes, over the borders of rollouts, of what comes step by step.

    Args:
        running: (num_envs,) the sums so far of the episodes that go on; changed in place.
        values: (steps, num_envs)
        starts: (steps, num_envs), true where an episode's first step is.
        ends: (steps, num_envs), true where its last step is.

    Returns:
        The sums of the episodes that end.
    """
    finished: list[float] = []
    for value, start, end in zip(values, starts, ends, strict=True):
        running[start] = 0.0
        running += value
        finished.extend(running[end].tolist())
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
