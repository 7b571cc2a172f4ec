"""What the performance benchmarks are made of; nothing here is timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from benchmarks.gpu import Options, measure, report
from benchmarks.measuring import Comparison, Row, Side
from benchmarks.peers import TransformerExtractor, bare_training, generation, sb3_agent
from benchmarks.report import Point, table, write
from benchmarks.workload import SMALL, FixedLengths, agent, draw_lengths, rollout


class Pedantic:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, run: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            setup()
            run()


def test_sides_take_turns() -> None:
    calls: list[str] = []
    sides = {
        name: Side(lambda name=name: calls.append(name), 2.0, lambda: calls.append("prepare"))  # type: ignore[misc]
        for name in ("a", "b")
    }
    compare = Comparison(Pedantic(), most_rounds=2)
    rates = compare.run(sides, rounds=5)
    assert calls == ["prepare", "b", "prepare", "a"] * 3  # one of them to warm up
    assert {len(rate) for rate in rates.values()} == {2}
    compare.row(rates, "a", "b", "what", "against", target=1e9)
    (row,) = compare.benchmark.extra_info["rows"]
    assert row["met"] is False and len(row["ratios"]) == 2


def test_row() -> None:
    row = Row("speed", "peer", (1.0, 3.0, 2.0), 2.0, ours=200.0, theirs=0.123)
    assert row.ratio == 2.0 and row.met
    assert not Row("memory", "", (65.0,), 64, "most").met
    assert Row("speed", "peer", skipped="no GPU", target=5).met is None
    text = table([row, Row("speed", "peer", skipped="no GPU")])
    assert "| speed | peer | 2 (1 to 3) | 2 | yes | 200 tokens/s | 0.123 tokens/s |" in text
    assert "not run: no GPU" in text


def test_write(tmp_path: Path) -> None:
    points = [Point("by_slots", "slots", at, "rollout", 100.0 * at) for at in (1, 4, 16)]
    write(tmp_path, [Row("speed", "peer", (1.0,))], points, {"time": "now", "load": 0.5})
    assert "by_slots.png" in (tmp_path / "performance.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "performance.md",
        "performance.json",
        "by_slots.png",
    }


@pytest.mark.parametrize("lengths", [None, SMALL.lengths])
def test_fixed_lengths(lengths: tuple[int, int] | None) -> None:
    env = FixedLengths(SMALL, 4, lengths)
    expected = draw_lengths(np.random.default_rng(0), lengths or (SMALL.response,) * 2, 4)
    env.reset(seed=0)
    seen = np.zeros(4, dtype=int)
    for step in range(1, SMALL.lengths[1] + 1):
        ended = env.step(np.full(4, env.engine.eos_token_id))[2]
        seen[ended & (seen == 0)] = step
    np.testing.assert_array_equal(seen, expected)


def test_extractor_computes_what_our_policy_does() -> None:
    """SB3's features of an observation are our backbone's last hidden states."""
    ours, theirs = agent(SMALL), sb3_agent(SMALL, 4)
    extractor: Any = theirs.policy.features_extractor
    assert isinstance(extractor, TransformerExtractor)
    backbone: Any = ours.policy.backbone
    extractor.model.load_state_dict(backbone.model.base_model.state_dict())
    env = FixedLengths(SMALL, 4)
    env.reset(seed=0)
    for step in range(3):
        observation, *_ = env.step(np.arange(4) + step)
    tensors = {key: th.as_tensor(value) for key, value in observation.items()}
    with th.no_grad():
        expected = backbone.last_hidden(observation)
        actual = extractor({key: value.float() for key, value in tensors.items()})
    th.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_floor_and_generation() -> None:
    model = agent(SMALL, lengths=SMALL.lengths, n_steps=2 * SMALL.lengths[1], batch_size=16)
    rollout(model).run()
    floor = bare_training(model)
    floor.run()
    steps = model.n_steps * model.n_envs
    assert 0.7 * steps < floor.work <= steps
    backbone: Any = model.policy.backbone
    env: Any = FixedLengths(SMALL, 1)
    side = generation(backbone.model, env.engine, 3, SMALL.lengths, batches=2)
    side.run()
    assert side.work == draw_lengths(np.random.default_rng(0), SMALL.lengths, 6).sum()


def test_gpu_program() -> None:
    options = Options(("tiny",), (2,), 4, 8, minibatch=32, rounds=1, compile=False, device="cpu")
    results = measure(options)
    assert results["rollouts"][0]["tokens_per_second"] > 0
    assert "| tiny | 2 |" in report(results)
