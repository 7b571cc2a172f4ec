import pytest

from textenvs.data.splits import split_examples
from textenvs.task import SPLITS, Example


def make_examples(count: int) -> tuple[Example, ...]:
    return tuple(Example(f"prompt {i}", (f"reference {i}",)) for i in range(count))


@pytest.mark.parametrize(
    ("count", "sizes"), [(100, (80, 10, 10)), (10, (8, 1, 1)), (25, (20, 2, 3)), (0, (0, 0, 0))]
)
def test_splits_hold_80_10_and_10_percent(count: int, sizes: tuple[int, int, int]) -> None:
    examples = make_examples(count)
    assert tuple(len(split_examples(examples, split)) for split in SPLITS) == sizes


def test_splits_are_disjoint_and_complete() -> None:
    examples = make_examples(57)
    prompts = [example.prompt for split in SPLITS for example in split_examples(examples, split)]
    assert sorted(prompts) == sorted(example.prompt for example in examples)


def test_splits_are_shuffled_by_the_seed_alone() -> None:
    examples = make_examples(100)
    train = split_examples(examples, "train")
    assert train == split_examples(list(examples), "train")
    assert train != split_examples(examples, "train", seed=1)
    assert train != examples[:80]
    assert {e.prompt for e in train} != {e.prompt for e in examples[:80]}


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        split_examples(make_examples(10), "dev")


def test_equal_examples_are_an_error() -> None:
    twice = (Example("Hello", data={"goal": "tea"}), Example("Hello", data={"goal": "tea"}))
    with pytest.raises(ValueError, match="Two examples have the prompt 'Hello'"):
        split_examples(twice, "train")


def test_examples_may_differ_in_their_data_alone() -> None:
    examples = [Example("Hello", data={"goal": goal}) for goal in range(10)]
    assert len(split_examples(examples, "train")) == 8
