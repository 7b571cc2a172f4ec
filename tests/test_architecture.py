"""docs/architecture.md: an iteration leads through the files and functions that it names."""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import pytest

from agents import PPO
from scripts import draw_architecture
from tests.test_readme import ROOT
from tests.test_structure import ORDER

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
FOLDER = re.compile(r"`(\w+)(?:/|\.py)`")
FILE = re.compile(r"`((?:agents|textenvs)/[\w/]+\.py)`")
SMALL: dict[str, Any] = {"num_envs": 4, "max_new_tokens": 8}


@contextmanager
def calls_recorded(calls: list[tuple[str, str]]) -> Iterator[None]:
    """Append the file and the name of each function of ours, when it is first called."""
    seen: set[Any] = set()

    def record(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in seen:
            seen.add(code)
            path = Path(code.co_filename)
            if path.is_relative_to(ROOT / "agents") or path.is_relative_to(ROOT / "textenvs"):
                calls.append((path.relative_to(ROOT).as_posix(), code.co_name))

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(before)


def test_an_iteration_makes_the_steps_of_the_walk_in_their_order() -> None:
    model = PPO(
        "TransformerPolicy",
        gym.make_vec("TextGen-v0", **SMALL),
        n_steps=16,
        batch_size=32,
        n_epochs=1,
        fit_critic=False,  # which is of the first iteration alone
        device="cpu",
        seed=0,
    )
    calls: list[tuple[str, str]] = []
    with calls_recorded(calls):
        model.learn(4 * 16)
    steps = [(path, name.rpartition(".")[2]) for _, path, name in STEP.findall(PAGE)]
    places = [calls.index(step) for step in steps]
    assert len(places) > 10 and places == sorted(places)
    # No file runs that the page does not name.
    assert {path for path, _ in calls} <= set(FILE.findall(PAGE))


def test_twelve_files_are_enough_and_the_picture_has_them() -> None:
    steps = STEP.findall(PAGE)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    files = {path for _, path, _ in steps}
    assert len(files) == 12
    assert {box.path for box in draw_architecture.BOXES} == files
    assert len(draw_architecture.ARROWS) == len(steps)


def test_what_it_names_exists() -> None:
    for path in FILE.findall(PAGE):
        assert (ROOT / path).is_file(), path
    for _, path, name in STEP.findall(PAGE):
        module = path.removesuffix(".py").replace("/", ".")
        assert callable(pkgutil.resolve_name(f"{module}:{name}"))


@pytest.mark.parametrize("package", list(ORDER))
def test_folders_come_in_import_order(package: str) -> None:
    table = PAGE.partition(f"| folder of `{package}/` |")[2].partition("\n\n")[0]
    level = {name: i for i, names in enumerate(ORDER[package]) for name in names}
    rows = [FOLDER.findall(row.split("|")[1]) for row in table.split("\n")[2:]]
    assert sorted(name for row in rows for name in row) == sorted(level)
    levels = [level[name] for row in rows for name in sorted(row, key=level.__getitem__)]
    assert levels == sorted(levels)


def test_it_can_be_drawn(tmp_path: Path) -> None:
    draw_architecture.draw(tmp_path / "picture.png")
    picture, drawn = (p.read_bytes() for p in (draw_architecture.PICTURE, tmp_path / "picture.png"))
    assert picture[:24] == drawn[:24]  # both are PNGs of one size
