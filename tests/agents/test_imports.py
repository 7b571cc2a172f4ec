"""Which way imports go: textenvs never imports agents, and no module the command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Who may import a module of the same package: the layers of each, the lowest first.
LAYERS = {
    "agents": [
        {"ranks"},
        {
            "adapters",
            "buffers",
            "files",
            "fitting",
            "generators",
            "kl",
            "kv_cache",
            "packing",
            "sampling",
            "statistics",
        },
        {"decoding", "vec_env"},
        {"backbones", "callbacks", "env_state", "logs", "plots"},
        {"policies", "resume"},
        {"late_rewards", "shaping", "update"},
        {"evaluation", "imitation", "ppo"},
        {"runs"},
        {"options"},
        {"cli"},
    ],
}
HEAVY = {"torch", "transformers", "datasets", "evaluate", "tokenizers", "stable_baselines3"}


def for_types_only(tree: ast.Module) -> list[ast.AST]:
    """What is in a tree for the type checker alone."""
    return [
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    ]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file names, wherever it does, and whether it does so at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = for_types_only(tree)
    inside = [
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    ]
    for node in ast.walk(tree):
        early = node not in inside and node not in checked
        if isinstance(node, ast.Import):
            yield from ((alias.name, early) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from ((f"{node.module}.{alias.name}", early) for alias in node.names)


def runtime_imports(path: Path) -> Iterator[str]:
    """The modules that a file imports at any time, and not for its types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types = {ast.unparse(node) for node in for_types_only(tree) if isinstance(node, ast.ImportFrom)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and ast.unparse(node) not in types:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_textenvs_never_imports_agents() -> None:
    assert len(files("textenvs")) > 15
    for path in files("textenvs"):
        names = {name.split(".")[0] for name, _ in imports(path)}
        assert not names & {"agents", "stable_baselines3", "tests", "benchmarks"}, path


def test_agents_import_textenvs() -> None:
    # What is forbidden above exists the other way round, so that the test sees imports at all.
    assert any(
        name.startswith("textenvs.") for path in files("agents") for name, _ in imports(path)
    )


def test_textenvs_imports_nothing_heavy_at_once() -> None:
    for path in files("textenvs"):
        early = {name.split(".")[0] for name, early in imports(path) if early}
        assert not early & HEAVY, path


@pytest.mark.parametrize("package", list(LAYERS))
def test_modules_import_lower_layers_only(package: str) -> None:
    level = {module: i for i, layer in enumerate(LAYERS[package]) for module in layer}
    modules = {path.stem for path in files(package)} - {"__init__"}
    assert modules == set(level)
    for path in files(package):
        if path.stem == "__init__":
            continue
        for name in runtime_imports(path):
            parts = name.split(".")
            if parts[0] == package and parts[1] in level:
                assert level[parts[1]] < level[path.stem], f"{path} imports {name}"


def test_import_of_textenvs_loads_nothing_heavy() -> None:
    code = f"import sys, textenvs; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
