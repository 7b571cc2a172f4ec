"""Each algorithm on each environment, and any of your own beside them.

    pytest benchmarks/test_agents.py --agent my.module:MyPPO --env TextGen-v0

All train on the same few tokens from the same warm start. pytest-benchmark times the training; the
table has tokens a second of rollouts and updates, and the held-out reward before and after. So few
tokens tell whether an algorithm learns and what it costs, and not which is best: that is what
`textenvs compare` is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agents import RunSpec
from agents.training.registry import ALGORITHMS
from benchmarks.training import SHARES, Training, train
from textenvs.registration import task_ids

TOKENS = 8192
SMALL: dict[str, Any] = {"timesteps": 64, "num_envs": 8, "warm_start": 0, "eval_examples": 2}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take the algorithms and environments that the command line adds or names."""
    config = metafunc.config
    metafunc.parametrize("env", config.getoption("--env") or task_ids())
    metafunc.parametrize("algo", [*ALGORITHMS, *config.getoption("--agent")])


@pytest.mark.benchmark(group="agents")
def test_training(
    algo: str,
    env: str,
    benchmark: Any,
    trainings: list[Training],
    pytestconfig: pytest.Config,
    small: bool,
) -> None:
    tokens: int = pytestconfig.getoption("--tokens") or TOKENS
    spec = RunSpec(env, algo=algo, num_envs=32, eval_examples=128, device="cpu")
    spec = replace(spec, timesteps=max(1, int(tokens * SHARES.get(spec.env_id, 1))))
    if small:
        spec = replace(spec, **SMALL)

    def timed(learn: Callable[[], object]) -> None:
        benchmark.pedantic(learn, rounds=1)

    training = train(spec, timed)
    benchmark.extra_info["training"] = vars(training)
    trainings.append(training)
    assert training.tokens >= spec.timesteps
