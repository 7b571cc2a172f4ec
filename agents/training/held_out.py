"""How a run does on held-out examples, again and again: the curve, the best model, early stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback

from agents import parallel
from agents.algorithms.checks import check_finite
from agents.files import json_line
from agents.rollouts.traces import evenly_spread
from agents.training.evaluation import Evaluation, evaluate_split
from agents.training.folder import BEST, PROGRESS, SAMPLES
from agents.training.logs import HELD_OUT, STEP, read_metrics

SAMPLES_EACH = 4  # held-out prompts whose responses are kept at each evaluation


@dataclass
class HeldOut:
    """The held-out examples of a run, and how it has done on them.

    Args:
        model: The agent, with its run's log.
        env: The environment that holds the examples.
        folder: The run's.
        max_examples: Play at most so many.

    Attributes:
        history: Time steps and mean reward of each evaluation that the log holds.
    """

    model: Any
    env: gym.Env[Any, Any]
    folder: Path
    max_examples: int
    history: list[tuple[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        """Read what the log holds already."""
        rows = read_metrics(self.folder / PROGRESS) if parallel.is_main() else []
        self.history = [(row[STEP], row[HELD_OUT]) for row in rows if row.get(HELD_OUT) is not None]

    def play(self) -> Evaluation:
        """Play them; the run's random generators and environments are left alone."""
        return evaluate_split(self.model, self.env, self.max_examples)

    def add(self, evaluation: Evaluation) -> None:
        """Enter an evaluation into the log and the samples, and keep the model if it is the best.

        The log gets a row of its own, beside those of the iterations, whose pending metrics stay.
        """
        steps, best = int(self.model.num_timesteps), self.best
        samples = self._add_samples(evaluation, steps)
        summary = evaluation.summary()
        row = {
            STEP: steps,
            HELD_OUT: summary["mean_reward"],
            "eval/standard_error": summary["standard_error"],
            "eval/success_rate": summary["success_rate"],
            "eval/mean_ep_length": summary["response_tokens"],
            **{f"eval/{name}": value for name, value in summary.get("observed", {}).items()},
            **{f"samples/{i}": text for i, text in enumerate(samples)},
        }
        row = {name: value for name, value in row.items() if value is not None}
        # The texts are for TensorBoard alone, which has its own axis of steps.
        excluded = {
            name: ("csv", "stdout") if name.startswith("samples/") else () for name in row
        } | {STEP: ("tensorboard",)}
        for output in self.model.logger.output_formats:
            output.write(row, excluded, steps)
        self.history.append((steps, evaluation.mean))
        if best is None or evaluation.mean > best[1]:
            check_finite(self.model)
            self.model.policy.save_pretrained(self.folder / BEST)

    @property
    def best(self) -> tuple[int, float] | None:
        """Time steps and mean reward of the best evaluation, the first of equal ones."""
        return max(self.history, key=lambda entry: entry[1], default=None)

    def is_stuck(self, patience: int | None) -> bool:
        """Return whether so many evaluations in a row were no new best."""
        if patience is None or not self.history or self.best is None:
            return False
        return len(self.history) - 1 - self.history.index(self.best) >= patience

    def _add_samples(self, evaluation: Evaluation, steps: int) -> list[str]:
        """Append the same few transcripts each time to a file, and return them as Markdown."""
        records = evaluation.records()
        records = [records[i] for i in evenly_spread(len(records), SAMPLES_EACH)]
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write("".join(json_line({"num_timesteps": steps, **each}) for each in records))
        return [
            "\n\n".join(f"**{turn['role']}**: {turn['text']}" for turn in record["turns"])
            + f"\n\nreward {record['reward']:.3f}"
            for record in records
        ]


class HeldOutCallback(BaseCallback):
    """Plays held-out examples between rollouts while training.

    With several ranks the main one plays; when it stops, all do.

    Args:
        held_out: The examples.
        eval_freq: How many time steps to let pass.
        patience: Stop after so many evaluations in a row without a new best. None: never.
    """

    def __init__(self, held_out: HeldOut, eval_freq: int, patience: int | None = None) -> None:
        super().__init__()
        self.held_out = held_out
        self.eval_freq = eval_freq
        self.patience = patience

    def _on_training_start(self) -> None:
        # A checkpoint is written behind the evaluation of its step: the next one is due later.
        self._seen = self.model.num_timesteps
        self._stuck = self.held_out.is_stuck(self.patience)

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        due = steps // self.eval_freq > self._seen // self.eval_freq
        self._seen = steps
        if due and parallel.is_main():
            self.held_out.add(self.held_out.play())
            self._stuck = self.held_out.is_stuck(self.patience)

    def _on_step(self) -> bool:
        return not self._stuck
