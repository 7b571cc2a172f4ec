"""How speed changes with context, slots, model, threads and spread of lengths: the pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import pytest
import torch as th

from agents.rollouts.vec_env import engine_of
from benchmarks.measuring import Comparison, Side
from benchmarks.peers import generation
from benchmarks.report import Point
from benchmarks.workload import Shape, agent, rollout, update

ROUNDS = 2
CORES = os.cpu_count() or 1


def sides(
    shape: Shape, lengths: tuple[int, int] | None = None, batches: int = 1
) -> dict[str, Side]:
    """Return our rollout and `generate` on the like."""
    n_steps = batches * shape.response

    plain = agent(shape, lengths=lengths, n_steps=n_steps)
    model = plain.policy.backbone.model  # type: ignore[union-attr]
    spread = lengths or (shape.response, shape.response)
    return {
        "rollout": rollout(plain),
        "generate": generation(model, engine_of(plain.env), shape.slots, spread, batches),
    }


def measure(
    compare: Comparison, points: list[Point], picture: str, x: str, at: float, s: Mapping[str, Side]
) -> None:
    """Measure the sides, and add them to a picture."""
    for who, rates in compare.run(s, ROUNDS).items():
        points.append(Point(picture, x, at, who, median(rates)))


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("response", [32, 64, 128, 256])
def test_context(compare: Comparison, points: list[Point], shape: Shape, response: int) -> None:
    shape = replace(shape, response=response, lengths=(1, response))
    both = sides(shape) | {"update": update(agent(shape, batch_size=shape.slots * 64))}
    measure(compare, points, "by_context", "tokens of a response", response, both)


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("slots", [1, 4, 16, 64, 256])
def test_slots(compare: Comparison, points: list[Point], shape: Shape, slots: int) -> None:
    measure(compare, points, "by_slots", "slots", slots, sides(replace(shape, slots=slots)))


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("hidden", [64, 128, 256, 512])
def test_model_size(compare: Comparison, points: list[Point], shape: Shape, hidden: int) -> None:
    shape = replace(shape, hidden=hidden)
    measure(compare, points, "by_width", "width of the model", hidden, sides(shape))


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("spread", [0, 16, 32, 56])
def test_spread(compare: Comparison, points: list[Point], shape: Shape, spread: int) -> None:
    shape = replace(shape, response=64)
    both = sides(shape, (64 - spread, 64 + spread))
    measure(compare, points, "by_spread", "lengths: 64 tokens, plus or minus", spread, both)


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("threads", sorted({1, *(2**i for i in range(1, 5) if 2**i <= CORES)}))
def test_threads(compare: Comparison, points: list[Point], shape: Shape, threads: int) -> None:
    before = th.get_num_threads()
    th.set_num_threads(threads)
    try:
        both = sides(shape) | {"update": update(agent(shape))}
        measure(compare, points, "by_threads", "threads", threads, both)
    finally:
        th.set_num_threads(before)
