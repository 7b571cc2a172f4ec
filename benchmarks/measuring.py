"""Measure several ways to do the same thing in turns, and hold their ratios to targets.

What is compared runs in rounds, A B C A B C ..., so that the noise of a shared machine meets all of
it alike; a ratio is taken within each round, and the median over the rounds reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

# How many units of work each side did in a second, round by round.
Rates = dict[str, list[float]]


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Side:
    """One of the things compared.

    Args:
        run: What is timed.
        work: How much a run does, in the unit that all sides share.
        prepare: Runs before each timing, and is not timed.
    """

    run: Callable[[], Any]
    work: float = 1.0
    prepare: Callable[[], Any] = nothing

    def rate(self) -> float:
        """Run once; return the work done in a second."""
        self.prepare()
        gc.collect()
        started = time.perf_counter()
        self.run()
        return self.work / (time.perf_counter() - started)


@dataclass(frozen=True)
class Row:
    """A line of the table: a ratio (or a plain figure) with its spread and its target.

    Args:
        what: What was measured.
        against: What it was compared with; "" for a plain figure.
        ratios: One figure for each round.
        target: What it should reach. None: it is only reported.
        bound: Whether the target is the least or the most.
        unit: The unit of `ours` and `theirs`, or of a plain figure.
        ours: Our median rate, in that unit.
        theirs: The peer's.
        skipped: Why there are no figures.
    """

    what: str
    against: str = ""
    ratios: tuple[float, ...] = ()
    target: float | None = None
    bound: Literal["least", "most"] = "least"
    unit: str = "tokens/s"
    ours: float | None = None
    theirs: float | None = None
    skipped: str = ""

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is nothing to say."""
        if self.target is None or not self.ratios:
            return None
        least = self.bound == "least"
        return self.ratio >= self.target if least else self.ratio <= self.target

    def summary(self) -> dict[str, Any]:
        """Return everything as plain data."""
        known: dict[str, Any] = {**asdict(self), "ratios": list(self.ratios)}
        if self.ratios:
            known |= {"ratio": self.ratio, "met": self.met}
        return known


@dataclass
class Comparison:
    """Times sides in turns, pytest-benchmark the first of them, and gathers the rows.

    Args:
        benchmark: pytest-benchmark's fixture.
        rows: Where the rows go.
        most_rounds: At most so many rounds are run, whatever a benchmark asks for.
    """

    benchmark: Any
    rows: list[Row] = field(default_factory=list)
    most_rounds: int | None = None

    def run(self, sides: Mapping[str, Side], rounds: int = 7, warmups: int = 1) -> Rates:
        """Run all sides to warm up, then in rounds; return their rates."""
        rounds = min(rounds, self.most_rounds or rounds)
        (name, first), *others = sides.items()

        def before() -> None:
            for other, side in others:
                rates[other].append(side.rate())
            first.prepare()
            gc.collect()

        def timed() -> None:
            started = time.perf_counter()
            first.run()
            rates[name].append(first.work / (time.perf_counter() - started))

        rates: Rates = {name: [] for name in sides}
        self.benchmark.pedantic(timed, setup=before, rounds=rounds, warmup_rounds=warmups)
        self.benchmark.extra_info["rates"] = {k: median(v[warmups:]) for k, v in rates.items()}
        return {name: values[warmups:] for name, values in rates.items()}

    def row(self, rates: Rates, ours: str, theirs: str, what: str, against: str, **kw: Any) -> Row:
        """Add the row that compares two sides, by what they do in a second or by what it costs."""
        pairs = zip(rates[ours], rates[theirs], strict=True)
        ratios = tuple(own / other for own, other in pairs)
        return self.add(
            Row(what, against, ratios, ours=median(rates[ours]), theirs=median(rates[theirs]), **kw)
        )

    def add(self, row: Row) -> Row:
        """Add a row; pytest-benchmark's file gets it, too."""
        self.rows.append(row)
        if self.benchmark is not None:
            self.benchmark.extra_info.setdefault("rows", []).append(row.summary())
        return row
