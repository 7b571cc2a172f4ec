"""Writing files and folders so that nobody ever sees half of one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there becomes `path` at the end.

    If the block raises, `path` stays what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    _remove(temporary)  # left by a killed process that had the same id
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir() and temporary.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(old)
            path.rename(old)
            temporary.rename(path)
            _remove(old)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of `atomic_path`; nobody may be writing to the folder."""
    for path in folder.glob(".*"):
        if re.search(r"\.\d+\.(tmp(\.\w+)?|old)$", path.name):
            _remove(path)


def _flush(path: Path) -> None:
    """Have a file on the disk before it takes another one's place, should the machine go down."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all of it or nothing; what JSON has no form for is written as its `str`."""
    text = json.dumps(as_json(content), indent=2, default=str, allow_nan=False)
    write_text(path, text + "\n")


def as_json(content: Any) -> Any:
    """Return content with None for what JSON has no numbers for: NaN and the infinities."""
    if isinstance(content, Mapping):
        return {key: as_json(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [as_json(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON object a line, all of them or nothing."""
    write_text(path, "".join(map(json_line, records)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote, or `json_line` appended.

    A last line without its end is left out: whoever was appending it has been killed.
    """
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n")] if whole else []


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of a JSONL file, with its end."""
    return json.dumps(as_json(record), ensure_ascii=False, allow_nan=False) + "\n"
