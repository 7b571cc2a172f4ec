"""Agents learn: what could not be reached without the whole machinery working together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym

from agents import PPO, evaluate_split, warm_start
from tests.agents.helpers import llama
from textenvs.data.splits import split_examples
from textenvs.task import Example, Task, Transcript

ANSWERS = {"sun": "warm", "fire": "warm", "snow": "cold", "ice": "cold"}
NOISE = ("on", "the", "big", "old", "hill", "road", "house")


class Touch(Task):
    """Is it warm or cold? What is demonstrated is right half of the time."""

    choices = ("warm", "cold")

    def examples(self, split: str) -> Sequence[Example]:
        return split_examples(
            [
                Example(f"{thing} {first} {second} {third}:", ("warm", "cold"), {"answer": answer})
                for thing, answer in ANSWERS.items()
                for first in NOISE
                for second in NOISE
                for third in NOISE
            ],
            split,
        )

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response == t.example.data["answer"]) for t in transcripts]


def test_reward_of_held_out_examples_rises() -> None:
    train: Any = gym.make_vec("TextGen-v0", num_envs=32, task=Touch)
    test = gym.make("TextGen-v0", task=Touch, split="test")
    model = PPO(
        "TransformerPolicy",
        train,
        learning_rate=3e-3,
        n_steps=4,
        batch_size=64,
        kl_coef=0.01,
        seed=0,
        device="cpu",
        policy_kwargs={"model": llama(initializer_range=0.05)},
    )
    warm_start(model, passes=1, learning_rate=1e-3, progress=False, cache=False)
    before = evaluate_split(model, test)
    model.learn(4000)
    after = evaluate_split(model, test)
    assert before.mean < 0.65
    assert after.mean > 0.9
    assert after.mean - before.mean > 4 * (before.standard_error + after.standard_error)
