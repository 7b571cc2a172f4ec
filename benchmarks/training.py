"""A short training of an algorithm: how fast its rollouts and updates are, and what it learns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from agents import RunSpec, evaluate_split, warm_start

# A label is one token after a long prompt: so few of these cost what the others' budget does.
SHARES = {"TextClassification-v0": 1 / 8}


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Args:
        algo: The algorithm, as `RunSpec.algo`.
        env: The environment.
        tokens: How many it trained on; a rollout is never cut.
        rollout: Tokens a second of its rollouts.
        update: Tokens a second of what comes after each: advantages, reference, update.
        before: Held-out reward after the warm start, and its standard error.
        after: The same after the training.
    """

    algo: str
    env: str
    tokens: int
    rollout: float
    update: float
    before: tuple[float, float]
    after: tuple[float, float]


class Clock(BaseCallback):
    """Takes the time of rollouts, and of what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rollout, self.update = 0.0, 0.0
        self._since = 0.0

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self._since = time.perf_counter()

    def _on_rollout_start(self) -> None:
        self.update += self._lap()

    def _on_rollout_end(self) -> None:
        self.rollout += self._lap()

    def _on_training_end(self) -> None:
        self.update += self._lap()

    def _lap(self) -> float:
        since, self._since = self._since, time.perf_counter()
        return self._since - since


def train(spec: RunSpec, timed: Callable[[Callable[[], object]], object]) -> Training:
    """Train as a run does, without its folder, from the warm start that all algorithms have.

    Args:
        spec: What is trained, and on how many tokens.
        timed: Is given the training alone, and calls it once.
    """
    env = gym.make_vec(spec.env_id, num_envs=spec.num_envs, **spec.env_kwargs())
    kwargs = {**spec.algorithm_kwargs(), "seed": spec.seed, "device": spec.device}
    model: Any = spec.algorithm("TransformerPolicy", env, **kwargs)
    warm_start(model, **{**spec.warm_start_kwargs(), "progress": False})
    test = gym.make(spec.env_id, **spec.env_kwargs(held_out=True))
    before = evaluate_split(model, test, max_examples=spec.eval_examples)
    clock = Clock()
    timed(lambda: model.learn(spec.timesteps, callback=clock))
    after = evaluate_split(model, test, max_examples=spec.eval_examples)
    return Training(
        spec.algo,
        spec.env_id,
        model.num_timesteps,
        model.num_timesteps / clock.rollout,
        model.num_timesteps / clock.update,
        (before.mean, before.standard_error),
        (after.mean, after.standard_error),
    )
