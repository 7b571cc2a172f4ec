"""Where examples come from: a task's own data, files, tables, `datasets`, the hub, lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from textenvs.data.files import is_csv, looks_like_file, read_file, read_folder
from textenvs.data.rows import as_example, check_fields
from textenvs.task import SPLITS, Example, Task

# With fewer held-out examples than this, a mean over them says little.
FEW = 20
# Of the order in which the examples of a "shuffled(...)" split are.
SHUFFLE_SEED = 0
_SPLIT = re.compile(
    r"^(?:(?P<name>[\w.-]+)|shuffled\((?P<shuffled>[\w.-]+)\))"
    r"(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?$"
)


def load_examples(
    task: Task,
    dataset: Any = None,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    check: Callable[[Example], None] | None = None,
) -> tuple[Example, ...]:
    """Return the examples of one split.

    Args:
        task: Says which fields an example has, and brings its own data if `dataset` is None.
        dataset: None; a path to a file (.jsonl, .json, .csv, .tsv, each also with .gz, or
            .parquet), to a folder of .parquet files or to one written by
            `datasets.Dataset.save_to_disk`; a hub id; a `datasets.Dataset` or `DatasetDict`; a
            pandas or polars `DataFrame` or an arrow table; a list of `Example` or of rows; or a
            mapping from split names to any of these. A source without splits of its own is all
            "train".
        fields: The columns that hold `prompt`, `references` and whatever else the task reads. A
            nested column has a dotted name: "translation.en".
        split: "train", "validation" or "test" (or what the dataset calls them), optionally a part
            of it as in the `datasets` library, "train[:90%]", "test[100:]", or a part of it after
            a shuffle with a fixed seed: "shuffled(train)[90%:]".
        check: Called with each example; what it raises as a ValueError is told with the row.

    Raises:
        ValueError: For an unknown split, an unreadable or unknown file, an empty dataset, or a row
            that lacks a field or does not pass the check.
        TypeError: If `dataset` is of another type.
    """
    match = _match(split)
    name = match["name"] or match["shuffled"]
    check_fields(task, fields)
    if dataset is None:
        if name not in SPLITS:
            raise ValueError(f"Unknown split {name!r}: expected one of {', '.join(SPLITS)}.")
        rows: Sequence[Any] = task.examples(name)
        source = type(task).__name__
    else:
        rows, source = _read(dataset, name)
    order = np.arange(len(rows))
    if match["shuffled"]:
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
    order = order[_part(len(rows), match["start"]) : _part(len(rows), match["stop"])]
    if not len(order):
        raise ValueError(f"The dataset {source} has no examples in split {split!r}.")
    if match["shuffled"] and len(order) < FEW:
        gym.logger.warn(
            "%s",
            f"Only {len(order)} of the {len(rows)} examples of {source} are in {split!r}: a mean "
            "over so few says little. Hold out more of them, or other data.",
        )
    # Row by row, a datasets.Dataset would be read many times slower than at once.
    chosen = rows.select(order) if hasattr(rows, "select") else [rows[i] for i in order.tolist()]
    columns = {**task.fields, **(fields or {})}
    required = (*task.required_fields, *(fields or ()))
    # Errors name rows as a user counts them: from 1, and in a CSV file after the header.
    first = 2 if is_csv(source) else 1
    examples = []
    for row, i in zip(chosen, order.tolist(), strict=True):
        own = isinstance(row, Example)
        if own and check is None:
            examples.append(row)
            continue
        where = f"{source}, row {first + i}"
        example = row if own else as_example(row, columns, required, where)
        if check is not None:
            try:
                check(example)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: {error}") from error
        examples.append(example)
    return tuple(examples)


def whole_split(split: str) -> str:
    """Return the name of the split that a split is a part of.

    Raises:
        ValueError: If it is malformed.
    """
    match = _match(split)
    return str(match["name"] or match["shuffled"])


def splits_of(dataset: Any, split: str) -> list[str]:
    """Return the splits of a source, as far as they are known without asking anybody else.

    Args:
        dataset: What `load_examples` takes.
        split: The split that is wanted, which exists in any case.
    """
    if dataset is None:
        return list(SPLITS)
    opened, _ = _open(dataset)
    return [str(name) for name in opened] if isinstance(opened, Mapping) else [whole_split(split)]


def class_names(dataset: Any, split: str, column: str) -> tuple[str, ...] | None:
    """Return the names that a `datasets.Dataset` has for the whole numbers of a column, if any."""
    opened, _ = _open(dataset)
    rows = opened.get(whole_split(split)) if isinstance(opened, Mapping) else opened
    names = getattr((getattr(rows, "features", None) or {}).get(column), "names", None)
    return None if names is None else tuple(map(str, names))


def _match(split: str) -> re.Match[str]:
    match = _SPLIT.match(str(split))
    if match is None:
        raise ValueError(
            "split must look like 'train', 'train[:90%]' or 'shuffled(train)[:90%]', but it is "
            f"{split!r}."
        )
    return match


def _read(dataset: Any, split: str) -> tuple[Sequence[Any], str]:
    """Return the rows of a source's split and a name for the source."""
    opened, source = _open(dataset)
    if isinstance(opened, Mapping):  # a DatasetDict is one, too
        if split not in opened:
            raise ValueError(
                f"Unknown split {split!r}: this dataset has {', '.join(map(str, opened))}."
            )
        rows, own = _read(opened[split], "train")
        # Rows that were read from a file with splits have no name of their own.
        return rows, own if source == "" or isinstance(opened[split], (str, Path)) else source
    if isinstance(opened, str):
        return _from_hub(opened, split), opened
    if split != "train":
        raise ValueError(
            f"Unknown split {split!r}: {source} has no splits, so all of it is 'train'. Pass "
            f"dataset={{'train': ..., {split!r}: ...}}, or a part of it, such as "
            "split='shuffled(train)[90%:]'."
        )
    return opened, source


def _open(dataset: Any) -> tuple[Any, str]:
    """Return a source's rows, or a mapping of them by split, or a hub id; and the source's name."""
    if isinstance(dataset, Mapping):
        return dataset, ""
    if isinstance(dataset, (str, Path)):
        path = Path(dataset).expanduser()
        if path.is_dir():
            return read_folder(path), str(path)
        if not path.is_file() and not looks_like_file(path):
            return str(dataset), str(dataset)
        return read_file(path), str(path)
    source = type(dataset).__name__
    if hasattr(dataset, "notna"):
        return _rows_of_frame(dataset), source
    for convert in ("to_dicts", "to_pylist"):  # polars, arrow
        if hasattr(dataset, convert):
            return getattr(dataset, convert)(), source
    if isinstance(dataset, Sequence) or hasattr(dataset, "select"):
        return dataset, source
    raise TypeError(
        "dataset must be None, a path, a hub id, a datasets.Dataset, a DataFrame, a list of "
        "Example or rows, or a mapping from split names to these, but it is a "
        f"{type(dataset).__name__}."
    )


def _rows_of_frame(frame: Any) -> list[dict[str, Any]]:
    """Return the rows of a pandas DataFrame."""
    # A missing value is a number there, and makes floats of the whole numbers around it.
    gaps = frame.columns[frame.isna().any()]
    whole = frame.assign(**{name: frame[name].convert_dtypes() for name in gaps})
    return whole.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[no-any-return]


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
