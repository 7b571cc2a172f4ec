"""Where examples come from: a task's own data, files, `datasets` objects, the hub, lists."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from textenvs.task import SPLITS, Example, Task

FILE_FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?$")


def load_examples(
    task: Task,
    dataset: Any = None,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
) -> tuple[Example, ...]:
    """Return the examples of one split.

    Args:
        task: Says which fields an example has, and brings its own data if `dataset` is None.
        dataset: None, a path to a .jsonl, .jsonl.gz, .csv or .parquet file, a folder written by
            `datasets.Dataset.save_to_disk`, a hub id, a `datasets.Dataset` or `DatasetDict`, a
            list of `Example` or of rows, or a mapping from split names to any of these. A source
            without splits of its own is all "train".
        fields: The columns that hold `prompt`, `references` and whatever else the task reads.
        split: "train", "validation" or "test" (or what the dataset calls them), optionally a part
            of it as in the `datasets` library: "train[:90%]", "test[100:]".

    Raises:
        ValueError: For an unknown split, an unreadable or unknown file, an empty dataset, or a row
            that lacks a field.
        TypeError: If `dataset` is of another type.
    """
    match = _SPLIT.match(str(split))
    if match is None:
        raise ValueError(f"split must look like 'train' or 'train[:90%]', but it is {split!r}.")
    name = match["name"]
    if dataset is None:
        if name not in SPLITS:
            raise ValueError(f"Unknown split {name!r}: expected one of {', '.join(SPLITS)}.")
        rows: Sequence[Any] = task.examples(name)
        source = type(task).__name__
    else:
        rows, source = _read(dataset, name)
    part = slice(_part(len(rows), match["start"]), _part(len(rows), match["stop"]))
    # Errors name rows as a user counts them: from 1, and in a CSV file after the header.
    first_row = range(len(rows))[part].start + (2 if source.endswith(".csv") else 1)
    # Slicing a datasets.Dataset returns a dict of columns, and not rows.
    rows = rows.select(range(len(rows))[part]) if hasattr(rows, "select") else rows[part]
    if not len(rows):
        raise ValueError(f"The dataset {source} has no examples in split {split!r}.")
    columns = {**task.fields, **(fields or {})}
    required = (*task.required_fields, *(fields or ()))
    return tuple(
        row
        if isinstance(row, Example)
        else _example(row, columns, required, f"{source}, row {first_row + i}")
        for i, row in enumerate(rows)
    )


def splits_of(dataset: Any, split: str) -> list[str]:
    """Return the splits of a source, as far as they are known without asking anybody else.

    Args:
        dataset: What `load_examples` takes.
        split: The split that is wanted, which exists in any case.
    """
    if dataset is None:
        return list(SPLITS)
    if isinstance(dataset, Mapping):
        return [str(name) for name in dataset]
    return [split.partition("[")[0]]


def _read(dataset: Any, split: str) -> tuple[Sequence[Any], str]:
    """Return the rows of a source's split and a name for the source."""
    if isinstance(dataset, Mapping):  # a DatasetDict is one, too
        if split not in dataset:
            raise ValueError(
                f"Unknown split {split!r}: this dataset has {', '.join(map(str, dataset))}."
            )
        return _read(dataset[split], "train")
    if isinstance(dataset, (str, Path)):
        path = Path(dataset).expanduser()
        if path.is_dir():
            from datasets import load_from_disk

            return _read(load_from_disk(str(path)), split)
        if not path.is_file() and not _looks_like_file(path):
            return _from_hub(str(dataset), split), str(dataset)
        _only_train(split, str(dataset))
        return _read_file(path), str(path)
    if isinstance(dataset, Sequence) or hasattr(dataset, "select"):
        _only_train(split, type(dataset).__name__)
        return dataset, type(dataset).__name__
    raise TypeError(
        "dataset must be None, a path, a hub id, a datasets.Dataset, a list of Example or rows, "
        f"or a mapping from split names to these, but it is a {type(dataset).__name__}."
    )


def _only_train(split: str, source: str) -> None:
    if split != "train":
        raise ValueError(
            f"Unknown split {split!r}: {source} has no splits, so all of it is 'train'. Pass "
            f"dataset={{'train': ..., {split!r}: ...}}, or a part of it, such as "
            "split='train[90%:]'."
        )


def _looks_like_file(path: Path) -> bool:
    return path.is_absolute() or path.suffix in {*FILE_FORMATS, ".gz", ".json", ".txt", ".tsv"}


def _read_file(path: Path) -> list[Mapping[str, Any]]:
    if not path.name.endswith(FILE_FORMATS):
        raise ValueError(
            f"Unknown file format {''.join(path.suffixes) or path.name!r} of {path}: "
            f"expected one of {', '.join(FILE_FORMATS)}."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        return _parse_file(path)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} could not be read: {error}") from error


def _parse_file(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return list(_json_rows(file))


def _json_rows(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"row {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object, but {line[:40]!r}.")
        yield row


def _from_hub(name: str, split: str) -> Sequence[Any]:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(
            f"The dataset {name!r} (split {split!r}) is no file here and could not be loaded from "
            f"the hub: {error}"
        ) from error


def _part(length: int, bound: str | None) -> int | None:
    """Return the index that a slice bound ("10", "90%" or None) stands for."""
    if bound is None:
        return None
    return round(length * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)


def _example(row: Any, columns: Mapping[str, str], required: Iterable[str], where: str) -> Example:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected an Example or a mapping, got a {type(row).__name__}.")
    values = {name: row[column] for name, column in columns.items() if row.get(column) is not None}
    for name in required:
        if name not in values and columns[name] in row:
            raise ValueError(f"{where}: the {name} ({columns[name]!r}) is missing.")
        if name not in values:
            raise ValueError(
                f"{where}: no field {columns[name]!r} to read the {name} from; the row has "
                f"{', '.join(map(repr, row))}. Name the right one with fields={{{name!r}: ...}}."
            )
    prompt = values.pop("prompt", "")
    references = values.pop("references", ())
    if not isinstance(prompt, str):
        raise ValueError(
            f"{where}: the prompt must be text, but it is a {type(prompt).__name__} ({prompt!r})."
        )
    if isinstance(references, str):
        references = (references,)
    if not (isinstance(references, Iterable) and all(isinstance(r, str) for r in references)):
        raise ValueError(
            f"{where}: the references must be a text or a list of texts, but they are "
            f"{references!r}."
        )
    return Example(prompt, tuple(references), values)
