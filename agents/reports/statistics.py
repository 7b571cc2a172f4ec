"""What can be said of a few seeds: the interquartile mean, and how far it may be off.

Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def interquartile_mean(scores: Any, axis: int = -1) -> Any:
    """Return the mean of what is left when a quarter is cut off at both ends, rounded down.

    Of fewer than four numbers it is their mean.

    Args:
        scores: Numbers.
        axis: Along which.
    """
    ranked = np.sort(np.asarray(scores, dtype=np.float64), axis=axis)
    cut = ranked.shape[axis] // 4
    inner = np.take(ranked, range(cut, ranked.shape[axis] - cut), axis=axis)
    return inner.mean(axis=axis)


def bootstrap_interval(
    scores: Any, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Any, Any]:
    """Return the bounds of the interquartile mean over runs and tasks, by stratified bootstrap.

    Runs are drawn with replacement, task by task; the bounds are percentiles.

    Args:
        scores: (runs, tasks, ...) numbers; of what follows, each place has bounds of its own.
        confidence: The probability between the bounds.
        draws: How often is drawn.
        seed: For the drawing.

    Returns:
        Lower and upper bounds, (...) each.
    """
    scores = np.asarray(scores, dtype=np.float64)
    runs, tasks = scores.shape[:2]
    random = np.random.default_rng(seed)
    chosen = random.integers(0, runs, (draws, runs, tasks))
    drawn = scores[chosen, np.arange(tasks)]  # (draws, runs, tasks, ...)
    means = interquartile_mean(drawn.reshape(draws, runs * tasks, *scores.shape[2:]), axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
