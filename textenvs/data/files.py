"""Files and folders with data, read as rows."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Row = Mapping[str, Any]
# Rows, or those of each split by its name.
Rows = Sequence[Row] | Mapping[str, Sequence[Row]]

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv")
FILE_FORMATS = (*TEXT_FORMATS, *(f"{suffix}.gz" for suffix in TEXT_FORMATS), ".parquet")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves
_SPLIT_OF_FILE = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])", re.IGNORECASE)
_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}


def looks_like_file(path: Path) -> bool:
    """Return whether a path that does not exist was meant to be a file, and not a hub id."""
    return path.is_absolute() or path.suffix in {*FILE_FORMATS, ".gz", ".txt"}


def read_folder(path: Path) -> Any:
    """Return what a folder holds: a saved `datasets.Dataset`, or parquet files.

    Parquet files whose names (or folders' names) begin with "train", "validation" or "test" are of
    these splits; without any such name they are one set of rows, in the order of their names.

    Raises:
        ValueError: If it holds neither.
    """
    if any((path / name).is_file() for name in _SAVED):
        from datasets import load_from_disk

        return load_from_disk(str(path))
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"The folder {path} holds no dataset: expected what datasets.Dataset.save_to_disk "
            "writes, or .parquet files."
        )
    splits: dict[str, list[Row]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)), []).extend(_as_rows(file))
    return splits.get("") if len(splits) == 1 and "" in splits else _named(splits)


def _named(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return splits by name; files without one are for training."""
    rest = splits.pop("", [])
    return {**splits, "train": splits.get("train", []) + rest} if rest else splits


def _split_of(path: Path) -> str:
    for part in path.parts:
        match = _SPLIT_OF_FILE.match(part)
        if match is not None:
            name = match[1].lower()
            return _SPLIT_NAMES.get(name, name)
    return ""


def _as_rows(path: Path) -> Sequence[Row]:
    rows = read_file(path)
    assert not isinstance(rows, Mapping)  # a parquet file has no splits
    return rows


def read_file(path: Path) -> Rows:
    """Return a file's rows; those of a .json file may be divided into splits.

    Raises:
        ValueError: If there is no such file, or it is of an unknown format, or cannot be read.
    """
    if not path.name.endswith(FILE_FORMATS):
        raise ValueError(
            f"Unknown file format {''.join(path.suffixes) or path.name!r} of {path}: "
            f"expected one of {', '.join(FILE_FORMATS)}."
        )
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        return _parse(path)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} could not be read: {error}") from error


def is_csv(source: str) -> bool:
    """Return whether a file's first line is a header."""
    return source.removesuffix(".gz").endswith((".csv", ".tsv"))


def _parse(path: Path) -> Rows:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    opener = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    newline = "" if is_csv(name) else "\n"
    # utf-8-sig: with or without the byte order mark that some programs write.
    with opener(path, "rt", newline=newline, encoding="utf-8-sig") as file:
        if is_csv(name):
            rows = csv.DictReader(file, delimiter="\t" if name.endswith(".tsv") else ",")
            # An empty cell is no text, but a missing one.
            return [{column: cell or None for column, cell in row.items()} for row in rows]
        return list(_json_rows(file)) if name.endswith(".jsonl") else _json(file)


def _json(file: TextIO) -> Rows:
    """Return the rows of a JSON file: a list, lists by split, or one object a line."""
    text = file.read()
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(_json_rows(text.split("\n")))
        raise
    if isinstance(data, dict) and data and all(isinstance(rows, list) for rows in data.values()):
        return {name: _objects(rows, f" of {name!r}") for name, rows in data.items()}
    if isinstance(data, list):
        return _objects(data)
    raise ValueError(
        'expected a list of objects, or such lists by split ({"train": [...], "test": [...]}), '
        f"but it is {text[:40]!r}."
    )


def _objects(rows: Sequence[Any], where: str = "") -> Sequence[Row]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}{where} is not a JSON object, but {str(row)[:40]!r}.")
    return rows


def _json_rows(lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"row {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object, but {line[:40]!r}.")
        yield row
