"""The README's code runs as it stands, and what the pages name exists."""

import dataclasses
import pkgutil
import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from agents.cli.compare import Compare
from agents.cli.evaluate import Evaluate
from agents.cli.main import main
from agents.cli.train import Train
from agents.cli.tune import Tune
from agents.training.registry import ALGORITHMS
from agents.training.spec import RunSpec
from textenvs.checks import check_text_env

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    shorter = {"49_152": "256", "passes=16": "passes=1"}
    shorter["num_envs=64"] = "num_envs=4, max_new_tokens=8, split='train[:2%]'"
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


@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_the_task_is_an_environment_and_trains(algo: str, project: Path) -> None:
    code = (project / "counting.py").read_text()
    assert len(code.splitlines()) < 30
    main(
        f"train counting:Counting --algo {algo} --timesteps 128 --num-envs 4 --n-steps 16 "
        "--warm-start 1 --eval-examples 8 --no-progress --run-dir run".split()
    )
    assert (project / "run" / "summary.json").is_file()
    assert gym.make_vec("Counting-v0", num_envs=3).num_envs == 3
    check_text_env(gym.make("Counting-v0").unwrapped)
    del gym.registry["Counting-v0"], sys.modules["counting"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]*)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:agents|textenvs|tests|benchmarks|scripts)/[\w/.]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for name in re.findall(r"`((?:agents|textenvs)(?:\.\w+)+)[`(]", text):
        assert pkgutil.resolve_name(name) is not None
    options = {
        f"--{field.name.replace('_', '-')}"
        for command in (Train, Evaluate, Compare, Tune)
        for field in dataclasses.fields(command)
    }
    others = {"--help", "--version", "--nproc-per-node", "--agent", "--env"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= options | others


def test_algorithms_are_found_by_the_names_that_it_gives() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ALGORITHMS:
        assert f"`{name}`" in text
        found = RunSpec("TextGen-v0", algo=name).algorithm.__name__.lower()
        assert found == name.replace("+", "plus").replace("_", "")


def test_anchors_of_links_are_headings() -> None:
    headings = {
        page.name: [
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        ]
        for page in PAGES
    }
    links = [
        link
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)]*\.md)#([\w-]+)\)", page.read_text())
    ]
    assert links
    for path, anchor in links:
        assert anchor in headings[Path(path).name], (path, anchor)
