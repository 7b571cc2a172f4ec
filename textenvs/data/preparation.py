"""A task as an environment plays it: with a user's choices, template and data."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from textenvs.data.sources import class_names, load_examples, splits_of, whole_split
from textenvs.task import Task


def prepare_task(
    task: Task,
    *,
    dataset: Any = None,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    choices: Sequence[str] | None = None,
    template: str | None = None,
) -> Task:
    """Return the task itself, or a copy of it with other choices or another template.

    Args:
        task: The task; it is not changed, and what it holds is shared with the copy.
        dataset: None, or what `load_examples` takes. A task may take its choices from there.
        fields: Which columns of the dataset hold `prompt`, `references`, ...
        split: The split that is wanted.
        choices: The only responses allowed. None: the task's own, or those of the data.
        template: The text around the prompt; see `Task.template`. None: the task's own.

    Raises:
        ValueError: If the choices are not two or more different texts, or the template has no
            field or would not be used.
    """
    if choices is not None:
        given = check_choices(choices)
        task = copy.copy(task)
        task.choices = given
    elif dataset is not None and type(task).adapt_to is not Task.adapt_to:
        splits = dict.fromkeys([whole_split(split), *splits_of(dataset, split)])
        examples = [e for name in splits for e in load_examples(task, dataset, fields, name)]
        column = {**task.fields, **(fields or {})}.get("label", "label")
        task = task.adapt_to(examples, class_names(dataset, split, column))
    if template is not None:
        _check_template(task, template)
        task = copy.copy(task)
        task.template = template
    return task


def check_choices(choices: Any) -> tuple[str, ...]:
    """Return choices as a tuple.

    Raises:
        ValueError: If they are not two or more different texts.
    """
    listed = isinstance(choices, Iterable) and not isinstance(choices, (str, Mapping))
    texts = tuple(choices) if listed else ()
    if not all(isinstance(text, str) and text.strip() == text != "" for text in texts) or len(
        set(texts)
    ) < max(2, len(texts)):
        raise ValueError(
            "choices must be two or more different labels, texts without white space around them, "
            f"but they are {choices!r}."
        )
    return texts


def _check_template(task: Task, template: Any) -> None:
    if not isinstance(template, str) or not re.search(r"\{\w+\}", template):
        raise ValueError(
            "template must be the text around the prompt, such as 'Review: {prompt}\\nSentiment:', "
            f"but it is {template!r}."
        )
    if type(task).prompt is not Task.prompt:
        raise ValueError(
            f"{type(task).__name__} writes its prompts by itself (it overrides Task.prompt), so "
            f"that the template {template!r} would not be used: leave it out."
        )
