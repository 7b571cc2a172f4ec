"""docs/extending.md: its code runs as it stands, and the tests that it promises are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from tests.test_readme import BLOCK, ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def test_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules), set(gym.registry)
    names: dict[str, object] = {}
    try:
        for match in BLOCK.finditer(PAGE):
            info = match["info"].strip()
            if info:
                (tmp_path / info.removeprefix("file=")).write_text(match["code"], encoding="utf-8")
            else:
                exec(compile(match["code"], "extending.md", "exec"), names)
    finally:
        for path in tmp_path.glob("*.py"):
            if path.stem not in before[0]:
                sys.modules.pop(path.stem, None)
        for env_id in set(gym.registry) - before[1]:
            del gym.registry[env_id]
    # What is printed is what the page says.
    comment = re.search(r"print\(info\[\"reward_terms\"\]\)  # (.*)", PAGE)
    assert comment is not None and capsys.readouterr().out.strip() == comment[1]


def test_tests_that_it_promises_exist() -> None:
    names = set(re.findall(r"`(test_\w+)`", PAGE))
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert names and all(f"def {name}(" in code for name in names)
