"""Registering tasks: three ways, what ids stand for, what is imported when."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import NameNotFound

import textenvs
from tests.textenvs.toys import Chat, Echo, encode
from textenvs import Example, Task, Transcript, register_task
from textenvs.checks import check_text_env
from textenvs.registration import BUILTIN_TASKS, load_task
from textenvs.tasks.dialogue.task import Booking
from textenvs.tasks.function import FunctionTask

EOS = 0
NUMBERS = [Example(f"{n} {n + 1}", (str(n + 2),)) for n in range(40)]


def exact(transcripts: Sequence[Transcript]) -> list[float]:
    return [float(t.response in t.references) for t in transcripts]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(gym.registry)
    yield
    gym.registry.clear()
    gym.registry.update(before)


class Outer:
    class Inner(Echo):
        pass


def test_a_task_in_a_few_lines() -> None:
    @register_task("Counting-v0")
    class Counting(Task):
        """Go on counting: three numbers are given, the next one is wanted."""

        max_new_tokens = 6

        def examples(self, split: str) -> Sequence[Example]:
            numbers = [Example(f"{n} {n + 1} {n + 2}", (str(n + 3),)) for n in range(1, 1000)]
            return textenvs.split_examples(numbers, split)

        def score(self, transcripts: Sequence[Transcript]) -> list[float]:
            return [float(t.response == t.references[0]) for t in transcripts]

        def is_success(self, transcript: Transcript) -> bool:
            return transcript.response == transcript.references[0]

    assert "Counting-v0" in textenvs.task_ids()
    env = gym.make("Counting-v0", split="test")
    check_text_env(env)
    env.reset(seed=0)
    twin: Any = env.unwrapped
    for token in encode(f" {twin.engine.example(0).references[0]}"):
        env.step(token)
    _, reward, terminated, _, info = env.step(EOS)
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    for mode in (None, "sync", "async"):
        vector = gym.make_vec("Counting-v0", num_envs=2, vectorization_mode=mode)
        vector.reset(seed=0)
        assert vector.step(np.array([EOS, 5]))[2].tolist() == [True, False]
        vector.close()


def test_a_class_an_object_and_a_path() -> None:
    register_task("ByClass-v0", Echo)
    register_task("ByObject-v0", Echo())
    register_task("ByPath-v0", "tests.textenvs.toys:Echo")
    register_task("Nested-v0", Outer.Inner)
    for env_id in ("ByClass-v0", "ByObject-v0", "ByPath-v0", "Nested-v0"):
        env: Any = gym.make(env_id).unwrapped
        assert isinstance(env.task, Echo)
        assert isinstance(load_task(env_id), Echo)
    assert gym.registry["ByClass-v0"].kwargs["task"] == "tests.textenvs.toys:Echo"
    assert gym.registry["Nested-v0"].kwargs["task"].endswith("test_registration:Outer.Inner")


def test_examples_and_a_function() -> None:
    task = register_task("Plain-v0", examples=NUMBERS, score=exact, max_new_tokens=3)
    assert isinstance(task, FunctionTask) and task.max_new_tokens == 3
    splits = [task.examples(split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [32, 4, 4]
    assert {e.prompt for split in splits for e in split} == {e.prompt for e in NUMBERS}
    check_text_env(gym.make("Plain-v0"))
    with pytest.warns(UserWarning, match="of 3 examples, fewer than 20, has the same ones for"):
        few = FunctionTask(NUMBERS[:3], exact)
    assert few.examples("train") == few.examples("test") == tuple(NUMBERS[:3])


def test_a_function_may_tell_what_a_success_is_and_a_template_what_is_read() -> None:
    register_task(
        "Told-v0", examples=NUMBERS, score=exact, success_score=1.0, template="Go on: {prompt}"
    )
    env: Any = gym.make("Told-v0")
    env.reset(seed=0, options={"example": 0})
    assert env.unwrapped.task.prompt(NUMBERS[0]) == "Go on: 0 1"
    assert env.step(EOS)[4]["is_success"] is False


def test_a_time_limit_is_registered_for_single_and_vectorised() -> None:
    register_task("Short-v0", Echo, max_episode_steps=2)
    env = gym.make("Short-v0")
    vector = gym.make_vec("Short-v0", num_envs=2)
    env.reset(seed=0)
    vector.reset(seed=0)
    assert not env.step(5)[3] and env.step(5)[3]
    assert not vector.step(np.array([5, 5]))[3].any() and vector.step(np.array([5, 5]))[3].all()


def test_bad_registrations() -> None:
    with pytest.raises(TypeError, match="both examples= and score="):
        register_task("X-v0", examples=NUMBERS)
    with pytest.raises(TypeError, match="both examples= and score="):
        register_task("X-v0", score=exact)
    with pytest.raises(TypeError, match="has no attribute 'max_tokens'"):
        register_task("X-v0", examples=NUMBERS, score=exact, max_tokens=3)
    with pytest.raises(TypeError, match=r"must be textenvs\.Example objects, not \('q', 'a'\)"):
        register_task("X-v0", examples=[*NUMBERS, ("q", "a")], score=exact)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="Set max_new_tokens on the task itself"):
        register_task("X-v0", Echo, max_new_tokens=3)
    assert "X-v0" not in gym.registry


def test_what_a_task_may_be() -> None:
    task = Chat()
    assert load_task(task) is task
    assert isinstance(load_task(Chat), Chat)
    assert isinstance(load_task("tests.textenvs.toys:Chat"), Chat)
    assert isinstance(load_task("Dialogue-v0"), Booking)


def test_an_unknown_task_comes_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"'TextGne-v0': .*Did you mean 'TextGen-v0'\?") as error:
        load_task("TextGne-v0")
    assert all(env_id in str(error.value) for env_id in BUILTIN_TASKS)
    with pytest.raises(ValueError, match="'CartPole-v1': expected a registered id"):
        load_task("CartPole-v1")
    with pytest.raises(ValueError, match=r"Could not import 'no\.module:Task'"):
        load_task("no.module:Task")
    with pytest.raises(TypeError, match=r"must be a textenvs\.Task, but .*exact' is a function"):
        load_task("tests.textenvs.test_registration:exact")
    with pytest.raises(TypeError, match=r"must be a textenvs\.Task, but 5 is a int"):
        load_task(5)  # type: ignore[arg-type]
    with pytest.raises(NameNotFound, match="Did you mean: `TextGen`"):
        gym.make("TextGenn-v0")


def test_a_base_task_says_what_to_override() -> None:
    with pytest.raises(NotImplementedError, match=r"Silent must override Task\.score"):
        type("Silent", (Task,), {})().score([])


def test_environments_of_local_classes_survive_cloudpickle() -> None:
    class Local(Echo):
        def score(self, transcripts: Sequence[Transcript]) -> list[float]:
            return [2.5] * len(transcripts)

    register_task("Local-v0", Local)
    env = gym.make("Local-v0")
    with pytest.raises(Exception, match="Local"):
        pickle.dumps(env)
    twin = cloudpickle.loads(cloudpickle.dumps(env))
    twin.reset(seed=0)
    assert twin.step(EOS)[1] == 2.5


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "module",
    [
        "textenvs",
        "textenvs.envs.engine",
        "textenvs.envs.env",
        "textenvs.envs.vector_env",
        "textenvs.wrappers.vector",
        "textenvs.envs.playing",
        "textenvs.checks",
        "textenvs.tasks.dialogue.task",
    ],
)
def test_imports_are_light_and_never_of_agents(module: str) -> None:
    heavy = (
        "agents torch transformers tokenizers datasets evaluate pyarrow pandas "
        "stable_baselines3 sacrebleu vaderSentiment rouge_score"
    ).split()
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_playing_an_embedded_task_needs_no_torch() -> None:
    code = (
        "import sys, gymnasium as gym, textenvs\n"
        "env = gym.make_vec('TextGen-v0', num_envs=2)\n"
        "env.reset(seed=0)\n"
        "env.step(env.action_space.sample())\n"
        "print([m for m in ('torch', 'agents', 'datasets', 'evaluate') if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_importing_through_the_id_registers() -> None:
    code = "import gymnasium as gym; print(gym.make('textenvs:TextGen-v0').spec.id)"
    assert run_python(code).strip() == "TextGen-v0"
