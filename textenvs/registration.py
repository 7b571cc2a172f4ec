"""Which tasks there are, and how they become Gymnasium ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import gymnasium as gym

from textenvs.importing import load_object
from textenvs.task import Example, ScoreFunction, Task

BUILTIN_TASKS = {
    "TextGen-v0": "textenvs.tasks.textgen.task:TextGen",
    "Dialogue-v0": "textenvs.tasks.dialogue.task:Booking",
    "Translation-v0": "textenvs.tasks.translation.task:Translation",
    "TextClassification-v0": "textenvs.tasks.classification.task:TextClassification",
}
FUNCTION_TASK = "textenvs.tasks.function:FunctionTask"

TaskClass = TypeVar("TaskClass", bound=type[Task])


def load_task(task: str | Task | type[Task]) -> Task:
    """Return the task that a registered id, "package.module:Class", a class or a task stands for.

    Raises:
        ValueError: If it cannot be found.
        TypeError: If it is no task.
    """
    found: Any = task
    if isinstance(task, str):
        if ":" in task:
            found = load_object(task)
        elif task in gym.registry and "task" in gym.registry[task].kwargs:
            found = gym.registry[task].kwargs["task"]
            return load_task(found)
        else:
            close = get_close_matches(task, task_ids(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Unknown task {task!r}: expected a registered id ({', '.join(task_ids())}) or "
                f"'package.module:Class'.{hint}"
            )
    if isinstance(found, type) and issubclass(found, Task):
        found = found()
    if not isinstance(found, Task):
        raise TypeError(
            f"A task must be a textenvs.Task, but {task!r} is a {type(found).__name__}."
        )
    return found


def task_ids() -> list[str]:
    """Return the registered ids that are text tasks."""
    return [env_id for env_id, spec in gym.registry.items() if "task" in spec.kwargs]


def register_task(
    id: str,
    task: str | Task | type[Task] | None = None,
    *,
    examples: Sequence[Example] | None = None,
    score: ScoreFunction | None = None,
    max_episode_steps: int | None = None,
    **attributes: Any,
) -> Any:
    """Register a task as a Gymnasium environment, single and vectorised.

    Three ways: `register_task("Name-v0", MyTask)`, as a decorator `@register_task("Name-v0")`, or
    without a class, `register_task("Name-v0", examples=[...], score=function)`.

    Args:
        id: A Gymnasium id, "Name-v0".
        task: A `Task` class or object, or "package.module:Class".
        examples: The examples, if there is no class.
        score: Scores a batch of transcripts, if there is no class.
        max_episode_steps: Truncate episodes after so many tokens. None: the budgets end them.
        **attributes: Attributes of the task, such as `max_new_tokens`, if there is no class.

    Returns:
        The task, or the decorator if neither a task nor examples are given.
    """
    if task is None and examples is None and score is None:

        def decorate(task_class: TaskClass) -> TaskClass:
            register_task(id, task_class, max_episode_steps=max_episode_steps, **attributes)
            return task_class

        return decorate
    if task is None:
        if examples is None or score is None:
            raise TypeError("register_task needs a task, or both examples= and score=.")
        task = load_object(FUNCTION_TASK)(examples, score, **attributes)
    elif attributes:
        raise TypeError(f"Set {', '.join(attributes)} on the task itself.")
    gym.register(
        id=id,
        entry_point="textenvs.envs.env:TextEnv",
        vector_entry_point="textenvs.envs.vector_env:TextVectorEnv",
        max_episode_steps=max_episode_steps,
        kwargs={"task": _by_name(task)},
    )
    return task


def _by_name(task: str | Task | type[Task]) -> str | Task | type[Task]:
    """Return "module:Class" for a class that can be imported so: it keeps specs picklable."""
    if isinstance(task, type) and task.__module__ != "__main__":
        name = f"{task.__module__}:{task.__qualname__}"
        if "<locals>" not in name:
            return name
    return task


def register_builtin_tasks(register: Callable[..., Any] = register_task) -> None:
    """Register the environments that the package brings."""
    for env_id, task in BUILTIN_TASKS.items():
        register(env_id, task)
