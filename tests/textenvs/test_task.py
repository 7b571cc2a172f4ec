"""Examples and tasks by themselves: what they take, what they refuse, how prompts are made."""

from __future__ import annotations

from typing import Any

import pytest

from tests.textenvs.toys import finished
from textenvs import Example, Task


def test_one_text_is_the_only_reference() -> None:
    assert Example("q", "yes").references == ("yes",)  # type: ignore[arg-type]
    assert Example("q", ["yes", "no"]).references == ("yes", "no")  # type: ignore[arg-type]
    assert Example("q") == Example("q", ()) and hash(Example("q").references)


@pytest.mark.parametrize(
    "parts", [(5,), (None,), (["q"],), ("q", 5), ("q", [5]), ("q", None), ("q", ("a", None))]
)
def test_an_example_is_made_of_texts(parts: Any) -> None:
    with pytest.raises(TypeError, match="text as its prompt and texts as its references, but"):
        Example(*parts)


def test_data_have_names() -> None:
    with pytest.raises(TypeError, match="data must map names to values, not be 'yes'"):
        Example("q", (), "yes")  # type: ignore[arg-type]


class Asks(Task):
    template = 'Q: {prompt} [{unit}] {"a": 1}\nA:'


def test_a_template_is_the_text_around_the_prompt() -> None:
    example = Example("How far?", data={"unit": "km", "n": 1})
    assert Task().prompt(example) == "How far?"
    assert Asks().prompt(example) == 'Q: How far? [km] {"a": 1}\nA:'
    # What is in the prompt is text, and no field.
    braces = Asks().prompt(Example("{unit}", data={"unit": "km"}))
    assert str(braces).startswith("Q: {unit} [km]")
    with pytest.raises(ValueError, match=r"has \{unit\}, but an example only has prompt"):
        Asks().prompt(Example("How far?"))


class Longer(Task):
    success_score = 3.0

    def score(self, transcripts: Any) -> list[float]:
        return [float(len(t.response)) for t in transcripts]


def test_a_success_is_what_scores_enough() -> None:
    assert [Longer().is_success(finished("x" * n)) for n in (2, 3, 4)] == [False, True, True]
    assert Task().is_success(finished("x")) is None
    assert Task().is_well_formed(finished("x")) is None
