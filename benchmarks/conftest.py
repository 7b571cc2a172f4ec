"""Gathers what the benchmarks measure, and writes it when a whole session is over."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# Before anything that reads them is imported: nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from benchmarks import report
from benchmarks.measuring import Comparison, Row
from benchmarks.report import Point
from benchmarks.training import Training
from benchmarks.workload import SMALL, Shape

ROWS = pytest.StashKey[list[Row]]()
POINTS = pytest.StashKey[list[Point]]()
TRAININGS = pytest.StashKey[list[Training]]()
STARTED = pytest.StashKey[dict[str, Any]]()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's own options."""
    group = parser.getgroup("performance")
    group.addoption(
        "--out", type=Path, help="the folder of the results; by default only a whole run has one"
    )
    group.addoption("--small", action="store_true", help="tiny sizes, to see whether it runs")
    group.addoption("--rounds", type=int, help="the most rounds to run")
    group = parser.getgroup("agents")
    group.addoption(
        "--agent", action="append", default=[], help="module:Class, an algorithm of your own"
    )
    group.addoption("--env", action="append", default=[], help="the environment; default: all")
    group.addoption("--tokens", type=int, help="what each agent trains on; default: 8192")


def pytest_configure(config: pytest.Config) -> None:
    """Start with empty hands."""
    config.stash[ROWS], config.stash[POINTS], config.stash[TRAININGS] = [], [], []
    now = time.strftime("%Y-%m-%d %H:%M")
    config.stash[STARTED] = {"time": now, "load": report.load()}


@pytest.fixture(scope="session")
def small(request: pytest.FixtureRequest) -> bool:
    """Whether the sizes are tiny."""
    return bool(request.config.getoption("--small"))


@pytest.fixture(scope="session")
def shape(small: bool) -> Shape:
    """Return the sizes to measure at."""
    return SMALL if small else Shape()


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Comparison:
    """Return what times sides in turns."""
    config = request.config
    return Comparison(benchmark, config.stash[ROWS], config.getoption("--rounds"))


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Return the table, for rows that nothing was timed for."""
    return request.config.stash[ROWS]


@pytest.fixture
def points(request: pytest.FixtureRequest) -> list[Point]:
    """Return the points of the pictures."""
    points = request.config.stash[POINTS]
    return points


@pytest.fixture
def trainings(request: pytest.FixtureRequest) -> list[Training]:
    """Return the table of agents."""
    trainings = request.config.stash[TRAININGS]
    return trainings


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Print the tables; write everything if nothing was left out and nothing failed."""
    rows, trainings = config.stash[ROWS], config.stash[TRAININGS]
    if rows:
        terminalreporter.section("ratios")
        terminalreporter.write(report.table(rows))
    if trainings:
        terminalreporter.section("agents")
        terminalreporter.write(report.table_of_agents(trainings))
    folder = config.getoption("--out")
    if folder is None and exitstatus == 0 and _whole(config):
        folder = RESULTS
    if folder is not None and (rows or trainings):
        started = config.stash[STARTED]
        if rows:
            points = config.stash[POINTS]
            report.write(folder, rows, points, started)
        if trainings:
            report.write_agents(folder, trainings, started)
        terminalreporter.write_line(f"Written to {folder}.")


def _whole(config: pytest.Config) -> bool:
    """Return whether the session is all of the suite at its full size."""
    options = ("keyword", "markexpr", "--small", "--rounds", "--agent", "--env", "--tokens")
    chosen = any("::" in arg or arg.endswith(".py") for arg in config.args)
    return not chosen and not any(config.getoption(option) for option in options)
