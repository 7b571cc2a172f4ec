"""A user's labels and template, and rows that a task or a reward can do nothing with."""

from __future__ import annotations

import csv
import threading
from pathlib import Path
from typing import Any

import datasets
import gymnasium as gym
import numpy as np
import pytest

import textenvs  # noqa: F401 (registers the ids)
from tests.textenvs.toys import Chat, Echo, say
from textenvs import Example
from textenvs.data.preparation import prepare_task
from textenvs.envs.env import TextEnv
from textenvs.tasks.classification.task import TextClassification

STARS = ("awful", "bad", "fair", "good", "superb")


def rows(labels: Any, count: int = 40) -> list[dict[str, Any]]:
    return [{"text": f"review {i}", "label": labels[i % len(labels)]} for i in range(count)]


def task_of(dataset: Any, **kwargs: Any) -> TextClassification:
    task = prepare_task(TextClassification(), dataset=dataset, **kwargs)
    assert isinstance(task, TextClassification)
    return task


def test_labels_of_a_csv_file_are_the_choices(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows(STARS))
    env: Any = gym.make("TextClassification-v0", dataset=str(path))
    assert env.unwrapped.task.choices == STARS
    env.reset(seed=0, options={"example": 3})
    *_, info = say(env, " good")
    assert (info["reward_terms"], info["is_success"]) == ({"task": 1.0}, True)
    assert info["observed"] == {"well_formed": 1.0}
    # Both parts of a file have the labels of the whole.
    parts = [task_of(str(path), split=split).choices for split in ("train[:2]", "train[38:]")]
    assert parts == [STARS, STARS]


@pytest.mark.parametrize(
    ("labels", "choices"),
    [
        (["negative", "positive"], ("negative", "positive")),
        ([1, 0], ("negative", "positive")),
        (["1", "0"], ("negative", "positive")),
        (["b", "a ", "c"], ("a", "b", "c")),
        ([1, 2, 3, 4, 5], ("1", "2", "3", "4", "5")),
        (["10", "9", "8"], ("8", "9", "10")),
        ([np.int64(3), np.int64(7)], ("3", "7")),
        (["negative", "neutral", "positive"], ("negative", "neutral", "positive")),
    ],
)
def test_choices_follow_the_labels(labels: Any, choices: tuple[str, ...]) -> None:
    data = rows(labels)
    task = task_of(data)
    assert task.choices == choices
    for row in data[: len(labels)]:
        label = task.label(Example(row["text"], data={"label": row["label"]}))
        fits = choices == ("negative", "positive") and str(row["label"]).isdecimal()
        assert label == (choices[int(row["label"])] if fits else str(row["label"]).strip())


def test_all_splits_give_the_same_choices() -> None:
    dataset = {"train": rows(["x", "y"]), "test": rows(["x", "z"])}
    for split in ("train", "test", "shuffled(train)[:90%]"):
        assert task_of(dataset, split=split).choices == ("x", "y", "z")


def test_class_names_of_a_dataset_are_the_choices() -> None:
    names = datasets.ClassLabel(names=["world", "sport", "trade"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    dataset = datasets.Dataset.from_list(rows([2, 0, 1]), features=features)
    for source in (dataset, datasets.DatasetDict(train=dataset)):
        task = task_of(source)
        assert task.choices == ("world", "sport", "trade")
        assert task.label(Example("a", data={"label": 1})) == "sport"


def test_given_choices_hold() -> None:
    task = TextClassification()
    for env_id, kwargs in {
        "TextClassification-v0": {},
        "TextGen-v0": {"max_new_tokens": 4},
    }.items():
        dataset = rows(STARS) if env_id == "TextClassification-v0" else None
        for env in (
            gym.make(env_id, choices=STARS, dataset=dataset, **kwargs),  # type: ignore[arg-type]
            gym.make_vec(env_id, 2, choices=STARS, dataset=dataset, **kwargs),  # type: ignore[arg-type]
        ):
            assert env.unwrapped.task.choices == STARS  # type: ignore[union-attr]
    assert prepare_task(task, choices=("x", "y")).choices == ("x", "y")
    assert task.choices == ("negative", "positive")  # as it was
    # Whole numbers count them, in their order.
    numbered = prepare_task(task, dataset=rows([0, 1]), choices=("good", "bad"))
    assert isinstance(numbered, TextClassification)
    assert numbered.label(Example("a", data={"label": 0})) == "good"
    assert prepare_task(TextClassification(STARS), dataset=rows(["a", "b"])).choices == STARS


@pytest.mark.parametrize(
    "choices", ["yes", ("yes",), (), ("a", "a"), ("a", " b"), ("a", ""), (1, 2), 5]
)
def test_unusable_choices_are_an_error(choices: Any) -> None:
    with pytest.raises(ValueError, match="two or more different labels"):
        TextEnv(Echo, choices=choices)


def test_a_wrong_label_is_named_by_file_and_row(tmp_path: Path) -> None:
    for labels, wrong, hint in (
        (["negative", "positive"], "postive", r"Did you mean 'positive'\?"),
        (["negative", "positive"], "maybe", r"given by choices="),
        ([0, 1], 7, "whole number from 0 to 1"),
        (STARS, "supreb", r"Did you mean 'superb'\?"),
        (STARS, "", r"the label \('label'\) is missing"),
    ):
        data = rows(labels, 400)
        data[120]["label"] = wrong
        path = tmp_path / "reviews.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"))
            writer.writeheader()
            writer.writerows(data)
        with pytest.raises(ValueError, match=rf"reviews\.csv, row 122: .*{hint}") as error:
            gym.make("TextClassification-v0", dataset=str(path))
        assert f"is {str(wrong)!r}. " in str(error.value) or wrong == ""  # which is missing
    with pytest.raises(ValueError, match=r"row 1: .*'awful'"):
        gym.make("TextClassification-v0", dataset=rows(STARS), choices=("x", "y"))
    with pytest.raises(ValueError, match=r"row 1: .*is 0\.5"):
        gym.make("TextClassification-v0", dataset=rows([0.5, 1.5]))


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("Translation-v0", {}, "row 3: there are no references"),
        ("TextGen-v0", {"reward": "chrf"}, "row 3: .* reward term 'chrf' compares"),
        ("TextGen-v0", {"observe": "rouge_l"}, "row 3: .* reward term 'rouge_l' compares"),
        (
            "TextGen-v0",
            {"reward": ["task", ("bleu_char", 0.5)]},
            "row 3: .* reward term 'bleu_char'",
        ),
    ],
)
def test_a_row_without_references_is_named(env_id: str, kwargs: Any, message: str) -> None:
    data = [{"prompt": f"{i}", "references": [] if i == 2 else ["x"]} for i in range(40)]
    with pytest.raises(ValueError, match=message):
        gym.make(env_id, dataset=data, **kwargs)
    gym.make("TextGen-v0", dataset=data)  # which needs none


def test_a_task_without_references_has_no_reward_that_needs_them() -> None:
    with pytest.raises(ValueError, match=r"Booking, row 1: .*'exact_match' compares"):
        gym.make("Dialogue-v0", reward="exact_match")


def test_a_bad_goal_is_named() -> None:
    goal = {"day": "Friday", "time": "7 pm", "people": "4 people", "food": "Thai"}
    data = [{"prompt": "Hello", "goal": goal}, {"prompt": "Hi", "goal": {"day": "Friday"}}]
    with pytest.raises(ValueError, match=r"row 2: The goal .* must have day, time, people, food"):
        gym.make("Dialogue-v0", dataset=data)


def test_a_template_is_put_around_the_prompt() -> None:
    data = [{"text": "too slow", "label": "positive"}] * 2
    template = "Is this praise?\n{prompt}\nAnswer:"
    for env in (
        gym.make("TextClassification-v0", dataset=data, template=template),
        gym.make_vec("TextClassification-v0", 1, dataset=data, template=template),
    ):
        task = env.unwrapped.task  # type: ignore[union-attr]
        assert task.prompt(Example("too slow")) == "Is this praise?\ntoo slow\nAnswer:"
    assert TextClassification().prompt(Example("a")) == "Review: a\nSentiment:"
    assert TextEnv(Echo, template="Say: {prompt}").task.prompt(Example("hi")) == "Say: hi"


@pytest.mark.parametrize("template", ["Review:", "", 5, "{}", "{ prompt }"])
def test_a_template_without_a_field_is_an_error(template: Any) -> None:
    with pytest.raises(ValueError, match="template must be the text around the prompt"):
        TextEnv(Echo, template=template)


def test_a_template_that_would_not_be_used_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Chat writes its prompts by itself .*leave it out"):
        TextEnv(Chat, template="{prompt}")
    with pytest.raises(ValueError, match=r"has \{question\}, but an example only has"):
        TextEnv(Echo, template="{question}")


def test_what_a_task_holds_is_shared_with_its_copy() -> None:
    task = Echo()
    task.lock = threading.Lock()  # type: ignore[attr-defined]
    assert prepare_task(task) is task
    copied = prepare_task(task, choices=("a", "b"), template="{prompt}?")
    assert copied.lock is task.lock  # type: ignore[attr-defined]
    assert task.choices is None and task.template is None
