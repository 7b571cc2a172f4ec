from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agents import RunSpec
from benchmarks.report import table_of_agents, write_agents
from benchmarks.training import train


class Timed:
    calls = 0

    def __call__(self, learn: Callable[[], object]) -> None:
        self.calls += 1
        learn()


def test_a_training_and_its_row(tmp_path: Path) -> None:
    spec = RunSpec("TextGen-v0", algo="a2c", num_envs=4, n_steps=8, timesteps=64, warm_start=0)
    trained = train(spec, timed := Timed())
    assert timed.calls == 1 and trained.tokens == 64
    assert trained.rollout > 0 and trained.update > 0
    assert trained.before != trained.after and trained.after[1] > 0
    assert f"| TextGen-v0 | a2c | 64 | {trained.rollout:,.0f} |" in table_of_agents([trained])
    write_agents(tmp_path, [trained], {"time": "now", "load": None})
    assert "| a2c |" in (tmp_path / "agents.md").read_text()
