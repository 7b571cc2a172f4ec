"""Small tasks and helpers that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from textenvs import Example, Task, Transcript, Turn
from textenvs.envs.observations import Observations
from textenvs.text.loading import embedded_tokenizer

EXAMPLES = (
    Example("The food", ("was good", "was fine")),
    Example("A small hotel near the sea", ("is nice",)),
    Example("Why", ("not",)),
)


class Echo(Task):
    """One turn; the reward is the number of characters said."""

    max_new_tokens = 6

    def examples(self, split: str) -> Sequence[Example]:
        return EXAMPLES

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(len(transcript.response)) for transcript in transcripts]

    def is_success(self, transcript: Transcript) -> bool:
        return "good" in transcript.response


class Chat(Task):
    """Up to three turns of one point each; the user answers unless told to stop."""

    max_new_tokens = 8
    max_turns = 3
    score_every_turn = True

    def examples(self, split: str) -> Sequence[Example]:
        return EXAMPLES

    def prompt(self, example: Example) -> str:
        return f"User: {example.prompt}\nAgent:"

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str | None:
        return None if "stop" in transcript.response else f"Go on {rng.integers(1000)}"

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [1.0] * len(transcripts)


def encode(text: str) -> list[int]:
    """Return the embedded tokenizer's ids."""
    return [int(token) for token in embedded_tokenizer().encode(text, add_special_tokens=False)]


def say(env: gym.Env[Any, Any], text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """Emit a text and EOS; return what the last step returned."""
    space: Any = env.unwrapped.action_space
    for token in encode(text):
        _, reward, terminated, truncated, info = env.step(token)
        assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    observation, reward, terminated, truncated, info = env.step(space.eos_token_id)
    return observation, float(reward), terminated, truncated, info


def finished(
    response: str,
    prompt: str = "The food",
    references: tuple[str, ...] = (),
    tokens: int = 1,
    final: bool = True,
) -> Transcript:
    """Return a single-turn transcript."""
    example = Example(prompt, references)
    return Transcript(example, (Turn("user", prompt), Turn("agent", response)), tokens, final=final)


def random_actions(rng: np.random.Generator, space: Any, count: int) -> npt.NDArray[np.int64]:
    """Return random tokens, one in ten EOS; `space` is a `TokenSpace`."""
    actions = rng.integers(space.n, size=count)
    return np.where(rng.random(count) < 0.1, space.eos_token_id, actions)


def same(first: Any, second: Any) -> bool:
    """Whether two nested results are equal in types, shapes, dtypes and values.

    The native vector environment's observations count as what they are equal to, a dict.
    """
    first, second = (dict(o) if isinstance(o, Observations) else o for o in (first, second))
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        if first.dtype == object:
            return all(map(same, first, second))
        return bool(first.tobytes() == second.tobytes())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
