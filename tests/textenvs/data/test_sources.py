"""Datasets: every kind of source, splits and parts of them, and what bad input is told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import gymnasium as gym
import pyarrow
import pyarrow.parquet
import pytest

from textenvs import Example, Task
from textenvs.data.sources import load_examples

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "references": ["x", "y"], "level": 1},
    {"prompt": "b", "references": ["z"], "level": 2},
    {"prompt": "c", "references": [], "level": 3},
]
EXAMPLES = tuple(Example(row["prompt"], tuple(row["references"])) for row in ROWS)


class Levels(Task):
    """Brings ten examples and wants levels of a user's dataset."""

    fields: ClassVar[Mapping[str, str]] = {
        "prompt": "prompt",
        "references": "references",
        "level": "level",
    }
    required_fields: ClassVar[tuple[str, ...]] = ("prompt", "level")

    def examples(self, split: str) -> Sequence[Example]:
        return [Example(f"{split} {i}") for i in range(10)]


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_gz(path: Path, rows: Sequence[Any]) -> str:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def write_parquet(path: Path, rows: Sequence[Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def from_folder(folder: Path, rows: Sequence[Any]) -> str:
    datasets.Dataset.from_list(list(rows)).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


SOURCES: dict[str, Callable[[Path], Any]] = {
    "jsonl": lambda tmp: write_jsonl(tmp / "d.jsonl", ROWS),
    "jsonl.gz": lambda tmp: write_gz(tmp / "d.jsonl.gz", ROWS),
    "Path": lambda tmp: Path(write_jsonl(tmp / "d.jsonl", ROWS)),
    "parquet": lambda tmp: write_parquet(tmp / "d.parquet", ROWS),
    "Dataset": lambda tmp: datasets.Dataset.from_list(ROWS),
    "saved Dataset": lambda tmp: from_folder(tmp, ROWS),
    "rows": lambda tmp: ROWS,
    "tuple": lambda tmp: tuple(ROWS),
    "examples": lambda tmp: list(EXAMPLES),
    "mapping of rows": lambda tmp: {"test": ROWS[:1], "train": ROWS},
    "mapping of files": lambda tmp: {"train": write_jsonl(tmp / "d.jsonl", ROWS)},
    "DatasetDict": lambda tmp: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_examples(source: str, tmp_path: Path) -> None:
    assert load_examples(Task(), SOURCES[source](tmp_path)) == EXAMPLES


@pytest.mark.parametrize("source", SOURCES)
def test_a_part_of_a_split(source: str, tmp_path: Path) -> None:
    dataset = SOURCES[source](tmp_path)
    assert load_examples(Task(), dataset, split="train[1:]") == EXAMPLES[1:]
    assert load_examples(Task(), dataset, split="train[:67%]") == EXAMPLES[:2]
    assert load_examples(Task(), dataset, split="train[-1:]") == EXAMPLES[-1:]
    assert load_examples(Task(), dataset, split="train[1:2]") == EXAMPLES[1:2]


def test_parts_by_percentage_are_disjoint_and_complete() -> None:
    parts = [load_examples(Levels(), split=f"test{part}") for part in ("[:30%]", "[30%:]")]
    assert [len(part) for part in parts] == [3, 7]
    assert parts[0] + parts[1] == tuple(Levels().examples("test"))


def test_csv_has_one_reference_and_text_only(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('\ufeffprompt,references,level\n"a, b",x,1\nc,"say ""y""",2\n', "utf-8")
    assert load_examples(Levels(), path) == (
        Example("a, b", ("x",), {"level": "1"}),
        Example("c", ('say "y"',), {"level": "2"}),
    )


def test_fields_map_names_to_columns() -> None:
    rows = [{"mr": "food[Thai]", "refs": ["A Thai place."], "id": 3}]
    fields = {"prompt": "mr", "references": "refs", "number": "id"}
    expected = (Example("food[Thai]", ("A Thai place.",), {"number": 3}),)
    assert load_examples(Task(), rows, fields) == expected
    assert load_examples(Levels(), ROWS)[0].data == {"level": 1}


def test_fields_come_through_gym_make(tmp_path: Path) -> None:
    path = write_gz(tmp_path / "dev.jsonl.gz", [{"mr": "name[X]", "refs": ["X is nice."]}])
    env = gym.make("TextGen-v0", dataset=path, fields={"prompt": "mr", "references": "refs"})
    env.reset(seed=0)
    *_, info = env.step(0)
    assert info["transcript"].example == Example("name[X]", ("X is nice.",))


def test_splits_of_a_mapping() -> None:
    dataset = {"train": ROWS[:2], "dev": ROWS[2:]}
    assert load_examples(Task(), dataset, split="dev") == EXAMPLES[2:]
    with pytest.raises(ValueError, match="Unknown split 'test': this dataset has train, dev"):
        load_examples(Task(), dataset, split="test")


def test_a_source_without_splits_is_all_train() -> None:
    with pytest.raises(
        ValueError, match=r"list has no splits.*Pass dataset=\{'train': ..., 'test'"
    ):
        load_examples(Task(), ROWS, split="test")


@pytest.mark.parametrize("split", ["dev", "Train", "train2", None])
def test_an_unknown_split_of_a_task(split: Any) -> None:
    message = f"Unknown split '{split}': expected one of train, validation, test"
    with pytest.raises(ValueError, match=message):
        load_examples(Levels(), split=split)


@pytest.mark.parametrize("split", ["", "train[5]", "train[:x]", "train + test", "train[:1.5%]"])
def test_a_malformed_split(split: str) -> None:
    with pytest.raises(ValueError, match=r"must look like 'train' or 'train\[:90%\]'"):
        load_examples(Levels(), split=split)


def test_a_task_without_data_needs_a_dataset() -> None:
    with pytest.raises(ValueError, match=r"Task brings no data.*pass dataset="):
        load_examples(Task())


@pytest.mark.parametrize("split", ["train[5:5]", "train[99:]"])
def test_an_empty_part_or_dataset(split: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no examples in split 'train\["):
        load_examples(Levels(), split=split)
    sources: list[Any] = [[], datasets.Dataset.from_list([]), write_jsonl(tmp_path / "d.jsonl", [])]
    for empty in sources:
        with pytest.raises(ValueError, match="has no examples in split 'train'"):
            load_examples(Levels(), empty)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "csv"])
@pytest.mark.parametrize(("split", "bad"), [("train", 2), ("train[1:]", 2), ("train[50%:]", 3)])
def test_a_row_without_its_field_is_named_by_its_line(
    suffix: str, split: str, bad: int, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{n}", "note": "n"} for n in (1, 2, 3, 4)]
    rows[bad - 1]["prompt"] = None
    path, line = tmp_path / f"d.{suffix}", bad
    if suffix == "csv":
        lines = [
            f"{row['note']}" if row["prompt"] is None else f"n,{row['prompt']}" for row in rows
        ]
        path.write_text("\n".join(["note,prompt", *lines]))
        line += 1
    else:
        {"jsonl": write_jsonl, "jsonl.gz": write_gz, "parquet": write_parquet}[suffix](path, rows)
    for dataset in (path, {"train": path}):
        with pytest.raises(ValueError, match=rf"d\.{suffix}, row {line}: the prompt .*missing"):
            load_examples(Task(), dataset, split=split)


def test_an_unknown_field_lists_the_columns_and_the_remedy(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"mr": "a", "refs": []}])
    message = r"row 1: no field 'prompt'.* has 'mr', 'refs'.*fields=\{'prompt': \.\.\.\}"
    with pytest.raises(ValueError, match=message):
        load_examples(Task(), path)
    with pytest.raises(ValueError, match="no field 'ref' to read the references from"):
        load_examples(Task(), path, {"prompt": "mr", "references": "ref"})
    with pytest.raises(ValueError, match="no field 'level' to read the level from"):
        load_examples(Levels(), [{"prompt": "a"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5}, r"row 1: the prompt must be text, but it is a int \(5\)"),
        ({"prompt": "a", "references": 5}, "row 1: the references must be .* but they are 5"),
        ({"prompt": "a", "references": ["b", None]}, "row 1: the references must be a text or"),
    ],
)
def test_a_value_of_another_type(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(Task(), [row])


@pytest.mark.parametrize("line", ["{'prompt': 'b'}", '"b"', "[1]", "", '{"prompt": "b"'])
def test_a_line_that_is_no_json_object(line: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl could not be read: row 2 is not .*JSON"):
        load_examples(Task(), path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv", "d.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 no such format \xff")
    with pytest.raises(ValueError, match=rf"{name} could not be read"):
        load_examples(Task(), tmp_path / name)


@pytest.mark.parametrize("name", ["d.txt", "d.json", "d.tsv", "d", "d.csv.gz"])
def test_an_unknown_file_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=r"Unknown file format .*expected one of \.jsonl, \.jsonl"):
        load_examples(Task(), tmp_path / name)


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "none.jsonl", "none.csv", "data/none.jsonl.gz"):
        with pytest.raises(ValueError, match=r"There is no file .*none"):
            load_examples(Task(), name)


def test_a_hub_id_that_cannot_be_loaded() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing' .*could not be loaded from the hub"):
        load_examples(Task(), "nobody/nothing")


def test_a_hub_id_is_loaded_by_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> Any:
        calls.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples(Task(), "some/data", split="test[1:]") == EXAMPLES[1:]
    assert calls == [("some/data", "test")]


@pytest.mark.parametrize("dataset", [5, object(), {1, 2}, (row for row in ROWS)])
def test_another_type_is_an_error(dataset: Any) -> None:
    with pytest.raises(TypeError, match=r"a path, a hub id, .*but it is a "):
        load_examples(Task(), dataset)


def test_a_streamed_dataset_is_an_error() -> None:
    with pytest.raises(TypeError, match="but it is a IterableDataset"):
        load_examples(Task(), datasets.Dataset.from_list(ROWS).to_iterable_dataset())


def test_a_row_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="row 2: expected an Example or a mapping, got a str"):
        load_examples(Task(), [ROWS[0], "text"])
