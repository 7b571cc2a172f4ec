"""Algorithms side by side: the same environment, model, budget and seeds, a run for each."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.training.configs import FORMATS, read_options
from agents.training.folder import is_run
from agents.training.logs import HELD_OUT, STEP
from agents.training.pool import run_all, train_to_the_end
from agents.training.registry import (
    ALGORITHMS,
    algorithm_class,
    algorithm_options,
    keywords,
    policy_options,
)
from agents.training.run import Run
from agents.training.spec import RunSpec
from agents.training.stages import Say

# How many evaluations a run has on its way where nothing is said.
EVALUATIONS = 8


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
        """Of rollouts and updates; NaN where the log tells no seconds."""
        end = self.curve[-1]
        return end.tokens / end.seconds if end.seconds else math.nan

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

        specs = contestants(["ppo", "grpo"], env="TextGen-v0", timesteps=32_768)
        Comparison(specs, seeds=range(3), folder=Path("runs/compared")).train()

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
            (name, seed): (replace(spec, seed=seed), self.folder / _plain(name) / f"seed-{seed}")
            for seed in self.seeds
            for name, spec in self.specs.items()
        }

    def train(
        self, workers: int = 0, threads: int = 1, say: Say = lambda line: None
    ) -> list[Result]:
        """Train what is not finished yet, and return what came out.

        Runs that are finished are taken as they are; those that were killed or interrupted go on
        from their checkpoints.

        Args:
            workers: How many runs at a time, in processes of their own; a script that asks for
                some needs `if __name__ == "__main__":`. 0: in this process.
            threads: Of each process: two processes of two threads on two cores take several times
                as long as two of one.
            say: Called with a line for each run that has ended.

        Raises:
            ValueError: If the folder has other runs; if runs failed, when the others are finished.
            KeyboardInterrupt: If it was interrupted.
        """
        every = self.runs()
        todo = [
            (name, spec, folder)
            for (name, _), (spec, folder) in every.items()
            if not (is_run(folder) and Run.open(folder, spec).is_finished)
        ]
        say(f"{len(every) - len(todo)} of {len(every)} runs are finished already.")
        failures = []
        for number, (name, failure) in enumerate(run_all(_train, todo, workers, threads), 1):
            say(f"[{number}/{len(todo)}] {name}" + (f" failed. {failure}" if failure else ""))
            failures += [f"{name}: {failure}"] if failure else []
        if failures:
            raise ValueError("Some runs failed.\n" + "\n".join(failures))
        return self.results()

    def results(self) -> list[Result]:
        """Return what came of the runs that are finished.

        Raises:
            ValueError: If the folder has other runs.
        """
        opened = {
            key: Run.open(folder, spec)
            for key, (spec, folder) in self.runs().items()
            if is_run(folder)
        }
        return [read_result(*key, run) for key, run in opened.items() if run.is_finished]


def _plain(name: str) -> str:
    """Return a name that a folder may have on any system."""
    return name.replace(":", "-")


def contestants(algos: Iterable[str], **options: Any) -> dict[str, RunSpec]:
    """Return what is compared: a specification for each algorithm, else the same.

    Args:
        algos: Names of algorithms; "grpo:dapo" is one with a recipe, "package.module:Class" one of
            your own. A file of options (see
            `read_options`) counts with those of its algorithm and policy; it is called as its name
            says, or its folder's, if that is "best".
        **options: Of `RunSpec`, what they have in common. What an algorithm does not have is left
            out for it.

    Raises:
        TypeError: For options that there are not.
        ValueError: If there is no such algorithm, two have one name, or nobody has an option.
    """
    for name in ("algo", "recipe"):
        if options.pop(name, None) is not None:
            raise ValueError(f"What is compared has an {name} each: say so in algos.")
    of_algorithms, used = algorithm_options(), set[str]()
    found: dict[str, RunSpec] = {}
    for given in algos:
        if Path(given).suffix in FORMATS:
            path = Path(given)
            name = path.stem if path.stem != "best" else path.parent.name
            may = (of_algorithms | policy_options() | GROUPING | {"algo", "recipe"}) - COMMON
            own = {k: v for k, v in read_options(path).items() if k in may}
        else:
            algo, _, recipe = given.partition(":")
            if algo not in ALGORITHMS:
                algo, recipe = given, ""
            name, own = given, {"algo": algo, **({"recipe": recipe} if recipe else {})}
        if name in found:
            raise ValueError(f"Two contestants are called {name!r}: leave one out, or rename it.")
        algo = own.get("algo", RunSpec.algo)
        missing = of_algorithms - set(keywords(algorithm_class(algo, "Each of algos")))
        common = {k: v for k, v in options.items() if k not in missing}
        used |= common.keys()
        found[name] = RunSpec(**{**common, **own})
    unused = sorted(options.keys() - used) if found else []
    if unused:
        raise ValueError(f"None of {', '.join(found)} has {', '.join(unused)}: leave it out.")
    return found


# What a file's options may change besides those of algorithm and policy, and what never.
GROUPING = {"group_size", "sampling"}
COMMON = {"model", "seed", "device"}


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


def _train(what: tuple[str, RunSpec, Path]) -> tuple[str, str | None]:
    """Start a run, or go on with it, and return its name and how it failed, if it did."""
    name, spec, folder = what
    failure = None
    try:
        train_to_the_end(spec, folder)
    except (ValueError, TypeError, ImportError) as error:
        failure = str(error)
    except Exception:  # a user's, or one of ours: where it was is worth to know
        failure = traceback.format_exc()
    return f"{name}, seed {spec.seed}", failure
