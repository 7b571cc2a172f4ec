"""Datasets: every kind of source, splits and parts of them, and what bad input is told."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import gymnasium as gym
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from textenvs import Example, Task
from textenvs.data.sources import load_examples, splits_of

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


def parquet_folder(folder: Path) -> str:
    """Two files of one dataset, in the order of their names."""
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "part-1.parquet", ROWS[2:])
    write_parquet(folder / "data" / "part-0.parquet", ROWS[:2])
    return str(folder)


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return str(path)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "json": lambda tmp: write_json(tmp / "d.json", ROWS),
    "json with a line a row": lambda tmp: write_jsonl(tmp / "d.json", ROWS),
    "json by split": lambda tmp: write_json(tmp / "d.json", {"train": ROWS, "test": ROWS[:1]}),
    "folder of parquet": parquet_folder,
    "DataFrame": lambda tmp: pandas.DataFrame(ROWS),
    "arrow table": lambda tmp: pyarrow.Table.from_pylist(ROWS),
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


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("csv.gz", ",")])
def test_csv_has_one_reference_and_text_only(suffix: str, delimiter: str, tmp_path: Path) -> None:
    path, opener = tmp_path / f"d.{suffix}", gzip.open if suffix.endswith("gz") else open
    rows = [["prompt", "references", "level"], ["a, b", "x", "1"], ["c", 'say "y"', "2"]]
    with opener(path, "wt", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert load_examples(Levels(), path) == (
        Example("a, b", ("x",), {"level": "1"}),
        Example("c", ('say "y"',), {"level": "2"}),
    )


def test_empty_cells_of_csv_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,references,level\na,,1\n,x,2\n")
    assert load_examples(Levels(), path, split="train[:1]") == (Example("a", (), {"level": "1"}),)
    with pytest.raises(ValueError, match=r"d\.csv, row 3: the prompt \('prompt'\) is missing"):
        load_examples(Levels(), path)


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


@pytest.mark.parametrize(
    "split", ["", "train[5]", "train[:x]", "train + test", "train[:1.5%]", "shuffled(train"]
)
def test_a_malformed_split(split: str) -> None:
    with pytest.raises(ValueError, match=r"must look like 'train', 'train\[:90%\]' or 'shuffled"):
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
    with pytest.raises(ValueError, match=r"no field 'ref' to .* fields=\{'references': 'refs'\}"):
        load_examples(Task(), path, {"prompt": "mr", "references": "ref"})
    with pytest.raises(ValueError, match="no field 'level' to read the level from"):
        load_examples(Levels(), [{"prompt": "a"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": 5},
            r"row 1: the prompt must be text or a list of messages, but it is a int \(5\)",
        ),
        ({"prompt": "a", "references": 5.5}, "row 1: the references must be .* but they are 5.5"),
        ({"prompt": "a", "references": True}, "row 1: the references must be .* they are True"),
        ({"prompt": "a", "references": {"b": 1}}, "row 1: the references must be a text or"),
        ({"prompt": "a", "references": b"b"}, "row 1: the references must be a text or"),
        ({"prompt": "a", "references": ["b", None]}, "row 1: the references must be a text or"),
    ],
)
def test_a_value_of_another_type(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(Task(), [row])


@pytest.mark.parametrize("line", ["{'prompt': 'b'}", '"b"', "[1]", '{"prompt": "b"'])
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


@pytest.mark.parametrize("name", ["d.txt", "d", "d.parquet.gz", "d.txt.gz"])
def test_an_unknown_file_format(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=r"Unknown file format .*expected one of \.jsonl, \.json"):
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


@pytest.mark.parametrize(
    "text", ["{row}\n{row}\n\n", "\ufeff{row}\n{row}", "{row}\n  \n{row}\r\n\r\n"]
)
def test_blank_lines_and_byte_order_marks_are_no_rows(text: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text.replace("{row}", '{"prompt": "a"}'), encoding="utf-8", newline="")
    assert load_examples(Task(), path) == (Example("a"), Example("a"))


@pytest.mark.parametrize(
    "content", ["5", '{"prompt": "a"}', "[[1]]", '{"train": ["a"]}', '[{"prompt": "a"}', "{}"]
)
def test_json_that_holds_no_rows(content: str, tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    if content == '{"prompt": "a"}':  # as a line of .jsonl, it would be a row
        message = "expected a list of objects, or such lists by split"
    else:
        message = "could not be read"
    with pytest.raises(ValueError, match=rf"d\.json could not be read.*|{message}"):
        load_examples(Task(), path)


def test_folders_of_parquet_files_by_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[1:2])
    (tmp_path / "val").mkdir()
    write_parquet(tmp_path / "val" / "0.parquet", ROWS[2:])
    assert load_examples(Task(), tmp_path) == EXAMPLES[:2]
    assert load_examples(Task(), tmp_path, split="validation") == EXAMPLES[2:]
    assert splits_of(str(tmp_path), "train") == ["train", "validation"]
    with pytest.raises(ValueError, match="this dataset has train, validation"):
        load_examples(Task(), tmp_path, split="test")


def test_a_folder_without_data_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no dataset: expected .*save_to_disk.*\.parquet"):
        load_examples(Task(), tmp_path)


def test_missing_values_of_a_table_are_missing() -> None:
    table = pandas.DataFrame({"prompt": ["a", "b"], "level": [1, None], "references": ["x", None]})
    assert load_examples(Task(), table) == (Example("a", ("x",)), Example("b"))
    level = load_examples(Levels(), table, split="train[:1]")[0].data["level"]
    assert level == 1 and not isinstance(level, float)
    with pytest.raises(ValueError, match=r"DataFrame, row 2: the level .*missing"):
        load_examples(Levels(), table)


NESTED = [{"translation": {"en": "a", "fr": ["x"], "de": None}, "id": {"n": 7}}]


def test_nested_columns_have_dotted_names(tmp_path: Path) -> None:
    fields = {"prompt": "translation.en", "references": "translation.fr", "number": "id.n"}
    expected = (Example("a", ("x",), {"number": 7}),)
    jsonl = write_jsonl(tmp_path / "d.jsonl", NESTED)
    for source in (NESTED, jsonl, datasets.Dataset.from_list(NESTED), pandas.DataFrame(NESTED)):
        assert load_examples(Task(), source, fields) == expected
    with pytest.raises(ValueError, match=r"row 1: the prompt \('translation.de'\) is missing"):
        load_examples(Task(), NESTED, {"prompt": "translation.de"})
    with pytest.raises(
        ValueError, match=r"no field 'translation.it' .* row has 'translation', 'id'"
    ):
        load_examples(Task(), NESTED, {"prompt": "translation.it"})
    # A column of just this name comes first.
    both = [{"a.b": "plain", "a": {"b": "nested"}}]
    assert load_examples(Task(), both, {"prompt": "a.b"})[0].prompt == "plain"


def test_whole_numbers_are_references() -> None:
    rows = [
        {"prompt": "6 x 7", "references": 42},
        {"prompt": "-", "references": [1, np.int64(2), "3"]},
    ]
    assert [e.references for e in load_examples(Task(), rows)] == [("42",), ("1", "2", "3")]
    table = pandas.DataFrame({"prompt": ["a"], "references": [42]})
    assert load_examples(Task(), table)[0].references == ("42",)


@pytest.mark.parametrize("name", ["reference", "Prompt", "prompts", "levl"])
def test_a_near_miss_of_a_field_is_told_the_name(name: str) -> None:
    message = rf"fields has '{name}', which Levels does not read: did you mean '\w+'\? It reads 'p"
    with pytest.raises(ValueError, match=message):
        load_examples(Levels(), ROWS, {name: "prompt"})
    assert load_examples(Levels(), ROWS, {"note": "prompt"})[0].data["note"] == "a"


@pytest.mark.parametrize("fields", ["prompt=a", ["prompt"], {"prompt": 1}, {1: "prompt"}])
def test_fields_map_texts_to_texts(fields: Any) -> None:
    with pytest.raises(TypeError, match="fields must map names to columns"):
        load_examples(Task(), ROWS, fields)


def test_a_shuffled_part_is_of_all_kinds_and_seeded(tmp_path: Path) -> None:
    """A file that is sorted by its labels has all of them on both sides."""
    rows = [{"prompt": f"{i}", "references": ["a" if i < 50 else "b"]} for i in range(100)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    parts = [load_examples(Task(), path, split=f"shuffled(train){part}") for part in PARTS]
    assert [len(part) for part in parts] == [90, 10]
    assert {e.prompt for part in parts for e in part} == {row["prompt"] for row in rows}
    for part in parts:
        assert {e.references for e in part} == {("a",), ("b",)}
    for source in (rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows)):
        with pytest.warns(UserWarning, match=r"Only 10 of the 100 examples of .* are in 'shuffled"):
            assert load_examples(Task(), source, split="shuffled(train)[90%:]") == parts[1]
    assert load_examples(Task(), path, split="train[90%:]") == load_examples(Task(), path)[90:]


PARTS = ("[:90%]", "[90%:]")


@pytest.mark.parametrize("part", PARTS)
def test_a_row_of_a_shuffled_part_is_named_by_its_line(part: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i}"} for i in range(40)]
    chosen = load_examples(Task(), rows, split=f"shuffled(train){part}")[0].prompt
    rows[int(chosen)] = {"prompt": None}
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=rf"d\.jsonl, row {int(chosen) + 1}: the prompt"):
        load_examples(Task(), path, split=f"shuffled(train){part}")


def refuse_b(example: Example) -> None:
    if example.prompt == "b":
        raise ValueError("b is no good.")


@pytest.mark.parametrize("source", ["jsonl", "rows", "examples", "DataFrame", "json by split"])
def test_a_row_that_does_not_pass_a_check_is_named(source: str, tmp_path: Path) -> None:
    dataset = SOURCES[source](tmp_path)
    with pytest.raises(ValueError, match=r"(d\.jsonl?|list|DataFrame), row 2: b is no good\."):
        load_examples(Task(), dataset, check=refuse_b)
    assert len(load_examples(Task(), dataset, split="train[2:]", check=refuse_b)) == 1
