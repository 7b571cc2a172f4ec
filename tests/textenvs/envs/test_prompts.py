"""What the agent is given: cut inside the template, shown as read, in one format for all turns."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from tests.textenvs.tokenizers import KINDS, tokenizer_of
from tests.textenvs.toys import EXAMPLES, Chat, Echo, encode
from textenvs import CallableReward, Example, Task, Transcript, register_task
from textenvs.envs.engine import TextEngine
from textenvs.envs.env import TextEnv
from textenvs.envs.rendering import render_ansi
from textenvs.envs.vector_env import TextVectorEnv

LONG = Example("The soup was warm, and we loved every bite of it. " * 3, ("good",))


class Review(Echo):
    """Writes something on both sides of the example."""

    def examples(self, split: str) -> Sequence[Example]:
        return [LONG, Example("Short."), Example("")]

    def prompt(self, example: Example) -> str:
        return f"Review: {example.prompt}\nSentiment:"


class Shouted(Review):
    """Changes the example's text, so that it is not found in the prompt."""

    def prompt(self, example: Example) -> str:
        return f"Review: {example.prompt.upper()}\nSentiment:"


class Guess(Task):
    """Has neither a prompt nor a format of its own."""

    max_turns = 5
    max_new_tokens = 8

    def examples(self, split: str) -> Sequence[Example]:
        return [Example("Guess my number.")]

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str:
        return "lower " * 20

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [1.0] * len(transcripts)


class Cued(Guess):
    """Changes the first turn alone."""

    def prompt(self, example: Example) -> str:
        return f"{example.prompt}\nGuess:"


class Instructed(Guess):
    """Puts an instruction in front of the conversation."""

    def prompt(self, example: Example) -> str:
        return f"Be quick.\n{super().prompt(example)}"


class Locked(Echo):
    """Holds what cannot be copied or pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize("task", [Review, Shouted])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_text_is_cut_and_what_is_around_it_stays(
    kind: str, side: Any, task: Any
) -> None:
    tokenizer = tokenizer_of(kind)
    whole = TextEngine(task, tokenizer=tokenizer)
    size = whole.max_prompt_tokens * 2 // 3
    engine = TextEngine(task, tokenizer=tokenizer, max_prompt_tokens=size, truncate_prompt=side)
    engine.reset(0, np.random.default_rng(0), 0)
    shown = engine.turns[0][0].text
    text = LONG.prompt.upper() if task is Shouted else LONG.prompt
    assert shown.startswith("Review: ") and shown.endswith("\nSentiment:")
    kept = shown.removeprefix("Review: ").removesuffix("\nSentiment:")
    assert kept and (text.endswith(kept) if side == "left" else text.startswith(kept))
    length = int(engine.observations["prompt_length"][0, 0])
    assert size - 4 <= length <= size
    # What was read is what is shown.
    (read,) = engine.codec.encode_prompts([shown])
    assert engine.observations["prompt"][0, :length].tolist() == read.tolist()
    for i in (1, 2):
        engine.reset(0, np.random.default_rng(0), i)
        assert engine.turns[0][0].text == engine.task.prompt(engine.example(0))


def test_what_is_around_a_text_must_fit() -> None:
    with pytest.raises(ValueError, match=r"=2 is too few.*Review.prompt.*'Review: \\nSentiment:'"):
        TextEngine(Review, max_prompt_tokens=2, truncate_prompt="left")


def test_transcripts_and_pictures_show_what_was_read() -> None:
    engine = TextEngine(Review, dataset=[Example("Short.")])
    engine.reset(0, np.random.default_rng(0), 0)
    assert "Review: Short.\nSentiment:" in render_ansi(engine, 0, {})
    _, _, ((_, info),) = engine.respond([0], [[0]], [np.random.default_rng(0)])
    assert info["transcript"].prompt == "Review: Short.\nSentiment:"
    assert info["transcript"].example.prompt == "Short."
    assert str(info["transcript"]) == "user: Review: Short.\nSentiment:\nagent: "


def test_all_turns_have_one_format() -> None:
    engine = TextEngine(Guess, max_prompt_tokens=99)
    engine.reset(0, np.random.default_rng(0))
    engine.respond([0], [[5, 0]], [np.random.default_rng(0)])
    length = int(engine.observations["prompt_length"][0, 0])
    assert engine.observations["prompt"][0, :length].tolist() == [
        *encode("User: Guess my number.\nAgent:"), 5, 0,
        *encode(f"\nUser: {'lower ' * 20}\nAgent:"),
    ]  # fmt: skip
    assert Echo().prompt(EXAMPLES[0]) == EXAMPLES[0].prompt
    # The format of all turns is not shown, and what is more of the first one is.
    assert [turn.text for turn in engine.turns[0][::2]] == ["Guess my number.", "lower " * 20]
    engine = TextEngine(Instructed)
    engine.reset(0, np.random.default_rng(0))
    assert engine.turns[0][0].text == "Be quick.\nUser: Guess my number.\nAgent:"


def test_two_formats_are_said() -> None:
    with pytest.warns(UserWarning, match=r"Cued has two formats.*'\\nGuess:'.*'\\nAgent:'"):
        TextEngine(Cued)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in (Guess, Chat, Review):
            TextEngine(task)


def test_a_conversation_that_no_longer_fits_is_truncated_and_said() -> None:
    kwargs: dict[str, Any] = {"task": Guess, "max_prompt_tokens": 60}
    single, native = TextEnv(**kwargs), TextVectorEnv(num_envs=2, **kwargs)
    for env in (single, native):
        env.reset(seed=0)
    with pytest.warns(UserWarning, match="no longer fits max_prompt_tokens=60.*reply_tokens"):
        _, reward, terminated, truncated, info = single.step(0)
    assert (reward, terminated, truncated) == (1.0, False, True)
    assert info["transcript"].truncated and info["transcript"].final and "example" in info
    with pytest.warns(UserWarning, match="no longer fits"):
        _, rewards, terminateds, truncateds, _ = native.step(np.array([0, 5]))
    assert rewards.tolist() == [1.0, 0.0]
    assert not terminateds.any() and truncateds.tolist() == [True, False]


def test_the_length_of_replies_is_an_argument() -> None:
    budgets = [TextEngine(Guess, reply_tokens=n).max_prompt_tokens for n in (None, 32, 140)]
    assert budgets[0] == budgets[1] == budgets[2] - 4 * 108
    engine = TextEngine(Guess, reply_tokens=140)
    engine.reset(0, np.random.default_rng(0))
    for _ in range(5):
        _, ended, ((_, info),) = engine.respond([0], [[5] * 8], [np.random.default_rng(0)])
    assert ended[0] and not info["transcript"].truncated
    with pytest.raises(ValueError, match=r"reply_tokens must be a positive integer.*0"):
        TextEngine(Guess, reply_tokens=0)


@pytest.mark.parametrize("vector", [False, True])
def test_misspelt_arguments_and_options(vector: bool) -> None:
    make: Any = gym.make_vec if vector else gym.make
    with pytest.raises(TypeError, match=r"'max_new_token'\. Did you mean 'max_new_tokens'\?"):
        make("TextGen-v0", max_new_token=5)
    env = make("TextGen-v0")
    with pytest.raises(ValueError, match=r"no option 'prompt'\. It takes example.*dataset=\["):
        env.reset(options={"prompt": "Hello"})
    with pytest.raises(ValueError, match=r"no option 'exmaple'\. Did you mean 'example'\?"):
        env.reset(options={"exmaple": 3})


def test_a_task_object_is_shared_and_never_copied() -> None:
    task = Locked()
    register_task("Locked-v0", task)
    score = CallableReward(lambda ts: [float(task.lock.locked())] * len(ts), "locked")
    envs = [gym.make("Locked-v0", reward=score), gym.make("Locked-v0", reward=score)]
    vectors = [
        gym.make_vec("Locked-v0", num_envs=2, reward=score),
        gym.make_vec("Locked-v0", num_envs=2, vectorization_mode="sync"),
    ]
    twin = copy.deepcopy(envs[0].unwrapped)
    tasks = [*(env.get_wrapper_attr("task") for env in envs), twin.task]  # type: ignore[attr-defined]
    tasks += [vectors[0].task, *vectors[1].get_attr("task")]  # type: ignore[attr-defined]
    assert all(each is task for each in tasks) and envs[0].spec is not None
    assert gym.make(envs[0].spec).get_wrapper_attr("task") is task
