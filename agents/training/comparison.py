"""Algorithms side by side: the same environment, model, budget and seeds, a run for each."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th

from agents.training.configs import FORMATS, read_options
from agents.training.folder import is_finished, is_run
from agents.training.logs import HELD_OUT, STEP
from agents.training.registry import algorithm_options, keywords
from agents.training.run import Run
from agents.training.spec import RunSpec

Say = Callable[[str], None]


class Point(NamedTuple):
    """How good a run was at some time.

    Args:
        tokens: Of training so far.
        seconds: Of rollouts and updates so far; evaluations, logs and checkpoints do not count.
        reward: The mean held-out reward.
    """

    tokens: float
    seconds: float
    reward: float


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Args:
        algo: The contestant.
        seed: The seed.
        curve: From the start to the end.
        before: The summary of the held-out examples before training; see `summarize`.
        after: The same afterwards.
        train_reward: The mean reward of the last training episodes. None: there were none.
        kl: The KL to the start in nats per episode at the end. None: there was no reference.
    """

    algo: str
    seed: int
    curve: tuple[Point, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    train_reward: float | None
    kl: float | None

    @property
    def tokens_per_second(self) -> float:
        """Of rollouts and updates."""
        return self.curve[-1].tokens / max(self.curve[-1].seconds, 1e-9)

    def reached(self, threshold: float) -> Point | None:
        """Return the first point of the curve, between its evaluations, at a held-out reward."""
        previous: Point | None = None
        for point in self.curve:
            if point.reward >= threshold:
                if previous is None:
                    return point
                share = (threshold - previous.reward) / (point.reward - previous.reward)
                tokens, seconds = (
                    before + share * (after - before)
                    for before, after in zip(previous[:2], point[:2], strict=True)
                )
                return Point(tokens, seconds, threshold)
            previous = point
        return None


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in their algorithm and their seed, in one folder.

        specs = contestants(RunSpec("TextGen-v0", timesteps=32_768), ["ppo", "grpo"])
        Comparison(specs, seeds=range(3), folder=Path("runs/compared")).train(workers=2)

    Args:
        specs: By name, what each contestant does.
        seeds: The seeds of each.
        folder: Where the runs are: FOLDER/NAME/seed-N.

    Raises:
        ValueError: If there is nothing to compare.
    """

    specs: Mapping[str, RunSpec]
    seeds: Sequence[int]
    folder: Path

    def __post_init__(self) -> None:
        """Refuse to compare nothing."""
        if not self.specs or not len(self.seeds):
            raise ValueError("A comparison needs at least one algorithm and one seed.")

    def runs(self) -> dict[tuple[str, int], tuple[RunSpec, Path]]:
        """Return what is run and where, by contestant and seed; seed by seed."""
        return {
            (name, seed): (replace(spec, seed=seed), self.folder / name / f"seed-{seed}")
            for seed in self.seeds
            for name, spec in self.specs.items()
        }

    def train(
        self, workers: int = 1, threads: int = 1, say: Say = lambda line: None
    ) -> list[Result]:
        """Train what is not finished yet, and return what came out.

        Runs that are finished are taken as they are; those that were killed go on.

        Args:
            workers: How many runs at a time, in processes of their own. 0: in this process.
            threads: Of each process: two processes of two threads on two cores take several times
                as long as two of one.
            say: Called with a line for each run that has ended.

        Raises:
            ValueError: If the folder has other runs.
            RuntimeError: If runs failed; the others are finished.
        """
        todo = [
            (spec, folder, threads)
            for spec, folder in self.runs().values()
            if not _is_done(spec, folder)
        ]
        say(f"{len(self.runs()) - len(todo)} of {len(self.runs())} runs are finished already.")
        failures = []
        for number, (name, failure) in enumerate(_train_all(todo, workers), 1):
            say(f"[{number}/{len(todo)}] {name}" + (" failed" if failure else ""))
            failures += [f"{name}: {failure}"] if failure else []
        if failures:
            raise RuntimeError("Some runs failed.\n" + "\n".join(failures))
        return self.results()

    def results(self) -> list[Result]:
        """Return what came of the runs that are finished."""
        return [
            read_result(name, seed, Run.open(folder))
            for (name, seed), (_, folder) in self.runs().items()
            if is_run(folder) and is_finished(folder)
        ]


def contestants(spec: RunSpec, algos: Iterable[str]) -> dict[str, RunSpec]:
    """Return what is compared: a specification for each algorithm, else the same.

    An option that an algorithm does not have is left out for it.

    Args:
        spec: What they have in common.
        algos: Names of algorithms; "grpo:dapo" is one with a recipe, "tuned.yaml" a file of options
            (see `read_options`), whose environment does not count.

    Raises:
        ValueError: If there is no such algorithm, or two have one name.
    """
    defaults = {field.name: field.default for field in fields(spec)}
    every = algorithm_options()
    found: dict[str, RunSpec] = {}
    for given in algos:
        name, own = given, dict[str, Any]()
        if Path(given).suffix in FORMATS:
            name, own = Path(given).stem, read_options(given)
            own.pop("env", None)
        else:
            algo, _, recipe = given.partition(":")
            own = {"algo": algo, "recipe": recipe or None}
        if name in found:
            raise ValueError(f"Two contestants are called {name!r}: leave one out, or rename it.")
        algorithm = replace(RunSpec(spec.env), algo=own.get("algo", spec.algo)).algorithm
        missing = every - set(keywords(algorithm))
        changes: dict[str, Any] = {k: v for k, v in defaults.items() if k in missing}
        found[name] = replace(spec, **{**changes, **own})
    return found


def read_result(algo: str, seed: int, run: Run) -> Result:
    """Return what came of a finished run."""
    rows, summary = run.metrics(), run.summary()
    before, after, end = summary["before"], summary["after"], summary["timesteps"]
    rewards = {row[STEP]: row[HELD_OUT] for row in rows if row.get(HELD_OUT) is not None}
    rewards = {0: before["mean_reward"], **rewards, end: after["mean_reward"]}
    seconds = np.interp(list(rewards), *_clock(rows))
    curve = map(Point, rewards, seconds.tolist(), rewards.values())
    return Result(
        algo,
        seed,
        tuple(curve),
        before,
        after,
        # Of demonstrations it would be what the demonstrator has earned.
        None if run.spec.algo == "sft" else _last(rows, "rollout/ep_rew_mean"),
        _last(rows, "kl/per_episode"),
    )


def _clock(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return how many tokens there were at the end of each iteration, and after how many seconds.

    A row tells how fast its rollout was, and the update before it; of the last update, which no row
    tells, it is taken that it was as fast as the one before.
    """
    rows = [row for row in rows if row.get("time/rollout_tokens_per_second")]
    updates = [row.get("time/update_tokens_per_second") for row in rows[1:]]
    tokens, seconds = [0.0], [0.0]
    for row, update in zip(rows, [*updates, *updates[-1:]] or [None], strict=False):
        fresh = row[STEP] - tokens[-1]
        speeds = [row["time/rollout_tokens_per_second"], update]
        tokens.append(row[STEP])
        seconds.append(seconds[-1] + sum(fresh / speed for speed in speeds if speed))
    return tokens, seconds


def _last(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Return the last number of a column, if it has any."""
    return next((row[column] for row in reversed(rows) if row.get(column) is not None), None)


def _is_done(spec: RunSpec, folder: Path) -> bool:
    """Return whether a run is finished; one of another specification is refused."""
    if not is_run(folder):
        return False
    return Run.open(folder, spec).is_finished


def _train_all(
    todo: Sequence[tuple[RunSpec, Path, int]], workers: int
) -> Iterator[tuple[str, str | None]]:
    """Train, and yield the name of each run when it has ended, and how it failed if it did."""
    if not workers:
        yield from map(_train, todo)
    elif todo:
        # Spawned, as torch wants it; at an interrupt they end, and go on where they were later.
        with multiprocessing.get_context("spawn").Pool(min(workers, len(todo))) as pool:
            yield from pool.imap_unordered(_train, todo)


def _train(what: tuple[RunSpec, Path, int]) -> tuple[str, str | None]:
    """Start a run, or go on with it."""
    spec, folder, threads = what
    name = f"{folder.parent.name}, seed {spec.seed}"
    before = th.get_num_threads()
    th.set_num_threads(threads)
    try:
        run = Run.open(folder, spec) if is_run(folder) else Run.create(spec, folder)
        return name, "interrupted" if run.train()["interrupted"] else None
    except Exception as error:
        return name, "".join(traceback.format_exception_only(error)).strip()
    finally:
        th.set_num_threads(before)
