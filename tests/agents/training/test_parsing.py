"""What names of environments stand for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest

from agents.training.parsing import resolve_env_id
from textenvs.registration import load_task

MODULE = """
import textenvs

class Translation(textenvs.Task):
    max_new_tokens = 5
    def examples(self, split):
        return [textenvs.Example(f"{i}:", (str(i),)) for i in range(30)]
    def score(self, transcripts):
        return [1.0 for _ in transcripts]

@textenvs.register_task("Numbers-v3")
class Counting(Translation):
    pass

textenvs.register_task("space/Shared-v0", shared := Translation())
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with tasks, and no trace of it afterwards."""
    (tmp_path / "my_own_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(gym.registry)
    yield "my_own_tasks"
    gym.registry.clear()
    gym.registry.update(before)
    sys.modules.pop("my_own_tasks", None)


def test_users_task_is_not_a_built_in_one_of_its_name(module: str) -> None:
    env_id = resolve_env_id(f"{module}:Translation")
    assert env_id == "my_own_tasks/Translation-v0"
    assert type(load_task(env_id)).__module__ == module
    assert type(gym.make(env_id).unwrapped.task).__module__ == module  # type: ignore[attr-defined]
    assert resolve_env_id(f"{module}:Translation") == env_id  # and not a second one
    assert type(load_task("Translation-v0")).__module__.startswith("textenvs.")


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("Counting", "Numbers-v3"),
        ("shared", "space/Shared-v0"),
        ("Numbers-v3", "Numbers-v3"),
        ("space/Shared-v0", "space/Shared-v0"),
    ],
)
def test_ids_that_a_module_registers(module: str, name: str, env_id: str) -> None:
    assert resolve_env_id(f"{module}:{name}") == env_id
    assert type(load_task(env_id)).__module__ == module


def test_mistakes_name_the_nearest(module: str) -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'Numbers-v3'\?"):
        resolve_env_id(f"{module}:Number-v3")
    with pytest.raises(ValueError, match="Could not import 'nowhere'"):
        resolve_env_id("nowhere:Number-v3")
    assert resolve_env_id("textenvs:TextGen-v0") == "TextGen-v0"
