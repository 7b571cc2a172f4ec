"""The README's code runs as it stands."""

import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from agents.cli.main import main
from textenvs.checks import check_text_env

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    found = BLOCK.finditer((ROOT / "README.md").read_text())
    return [(match["info"].strip(), match["code"]) for match in found]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user, with the README's task in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for info, code in blocks():
        if info.startswith("file="):
            (tmp_path / info.removeprefix("file=")).write_text(code)
    return tmp_path


def test_the_three_lines_and_the_training_example_run(project: Path) -> None:
    shorter = {"200_000": "256", "num_envs=64": "num_envs=4, max_new_tokens=8"}
    shorter["num_envs=16"] = "num_envs=4, split='train[:2%]'"
    names: dict[str, object] = {}
    for info, code in blocks():
        if info:
            continue
        for long, short in shorter.items():
            code = code.replace(long, short)
        exec(compile(code, "README.md", "exec"), names)
    assert (project / "agent.zip").is_file()
    assert (project / "my-model" / "model.safetensors").is_file()


def test_the_task_is_an_environment_and_trains(project: Path) -> None:
    code = (project / "counting.py").read_text()
    assert len(code.splitlines()) < 30
    main(
        "train counting:Counting --timesteps 128 --num-envs 4 --n-steps 16 --warm-start 1 "
        "--eval-examples 8 --no-progress --run-dir run".split()
    )
    assert (project / "run" / "summary.json").is_file()
    assert gym.make_vec("Counting-v0", num_envs=3).num_envs == 3
    check_text_env(gym.make("Counting-v0").unwrapped)
    del gym.registry["Counting-v0"], sys.modules["counting"]
