"""Which way imports go: textenvs never imports agents, folders import in one order, no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The folders of each package, the lowest first; a module of the package's own folder is named
# alone. Each imports from those before it, and from itself. Nothing else may be imported, not even
# for types.
ORDER = {
    "agents": [
        *({"compat"}, {"files"}, {"rng"}, {"parallel"}),
        *({"decoding"}, {"models"}, {"policies"}, {"rollouts"}, {"learning"}, {"algorithms"}),
        *({"training"}, {"reports"}, {"tuning"}, {"cli"}),
    ],
    "textenvs": [
        *(
            {"text"},
            {"task", "spaces", "importing"},
            {"registration"},
            {"data"},
            {"constraints"},
        ),
        *({"rewards"}, {"envs", "tasks"}, {"wrappers", "checks"}),
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


def place(package: str, path: Path) -> str:
    """The folder of a package that a file is in, or the file itself where there is none."""
    inside = path.relative_to(ROOT / package)
    return inside.parts[0] if len(inside.parts) > 1 else path.stem


def arrows(package: str) -> dict[Path, set[Path]]:
    """The files of a package that each of its files imports, for types or otherwise."""
    by_name = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files(package)}
    return {
        path: {
            by_name[name]
            for imported, _ in imports(path)
            for name in (imported, imported.rpartition(".")[0])
            if name in by_name
        }
        for path in files(package)
    }


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


@pytest.mark.parametrize("package", list(ORDER))
def test_folders_import_in_their_order(package: str) -> None:
    level = {name: i for i, names in enumerate(ORDER[package]) for name in names}
    assert {place(package, path) for path in files(package)} - {"__init__"} == set(level)
    for path, targets in arrows(package).items():
        for target in targets if path.parent != ROOT / package or path.stem != "__init__" else ():
            here, there = place(package, path), place(package, target)
            assert there == here or level[there] < level[here], f"{path} imports {target}"


@pytest.mark.parametrize("package", list(ORDER))
def test_files_import_in_no_circle(package: str) -> None:
    graph = {path: targets - {path} for path, targets in arrows(package).items()}
    assert sum(map(len, graph.values())) > len(graph)
    while leaves := [path for path, targets in graph.items() if not targets & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph, sorted(map(str, graph))


def test_import_of_textenvs_loads_nothing_heavy() -> None:
    code = f"import sys, textenvs; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
