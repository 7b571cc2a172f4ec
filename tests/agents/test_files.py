from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agents.files import (
    atomic_path,
    json_line,
    read_json,
    read_jsonl,
    remove_leftovers,
    write_json,
    write_jsonl,
    write_text,
)


def test_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failing_block_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(OSError), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("half")
        raise OSError
    assert (path / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failing_block_leaves_nothing_where_there_was_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError), atomic_path(tmp_path / "notes.txt") as temporary:
        temporary.write_text("half")
        raise OSError
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "model"
    left = tmp_path / f".model.{os.getpid()}.tmp"
    left.mkdir()
    (left / "weights").write_text("half")
    with atomic_path(path) as temporary:
        assert temporary == left
        temporary.mkdir()
    assert list(path.iterdir()) == [] and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = {".hidden", ".tmp.zip", "a.12.tmp.zip", ".git"}
    for name in (*kept, ".agent.12.tmp.zip", ".notes.345.tmp"):
        (tmp_path / name).write_text("")
    for name in (".model.12.tmp", ".model.12.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_json_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"seed": 3, "folder": Path("runs"), "fields": ("a", "b"), "name": "Käse"})
    expected = {"seed": 3, "folder": "runs", "fields": ["a", "b"], "name": "Käse"}
    assert read_json(path) == expected


def test_jsonl_is_read_back_whatever_the_text(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    # Line separators of Unicode end no line of a JSONL file.
    records = [{"text": "one\ntwo"}, {"text": "a\u2028b\x85c"}, {"text": ""}]
    write_jsonl(path, records)
    assert path.read_text(encoding="utf-8").count("\n") == 3
    assert read_jsonl(path) == records
    write_jsonl(path, [])
    assert read_jsonl(path) == []


def test_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(json_line({"a": 1}) + json_line({"a": 2})[:-3])
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a"')
    assert read_jsonl(path) == []


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    nan, infinity = float("nan"), float("inf")
    content = {"mean": 0.5, "error": nan, "all": [1, nan, (-infinity, "nan")]}
    expected = {"mean": 0.5, "error": None, "all": [1, None, [None, "nan"]]}
    write_json(tmp_path / "summary.json", content)
    write_jsonl(tmp_path / "samples.jsonl", [content])
    for name in ("summary.json", "samples.jsonl"):
        text = (tmp_path / name).read_text()
        assert json.loads(text, parse_constant=pytest.fail) == expected
