"""A whole iteration of PPO, reference and value included, against TRL's `PPOTrainer`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.measuring import Comparison, Row
from benchmarks.peers import trl_iteration
from benchmarks.workload import EVERY_OPTION, Shape, agent, iteration

EPOCHS, MINIBATCHES = 4, 4
PEER = "TRL 1.12's `PPOTrainer`, fp32"


@pytest.mark.benchmark(group="iteration")
def test_against_trl(compare: Comparison, shape: Shape, rows: list[Row]) -> None:
    what = (
        f"PPO iteration, {shape.episodes} x ({shape.prompt} + {shape.response}) tokens, "
        f"{EPOCHS} epochs x {MINIBATCHES} minibatches"
    )
    try:
        peer = trl_iteration(shape, EPOCHS, MINIBATCHES)
    except ImportError:
        reason = "TRL 1.12 is not installed (pip install 'textenvs[bench]')"
        rows.append(Row(what, PEER, skipped=reason))
        pytest.skip(reason)
    variants: dict[str, dict[str, Any]] = {
        "fp32": {},
        "every option": EVERY_OPTION,
        "fp32, a critic of its own, as TRL's": {"value_model": "copy"},
    }
    targets = (2.2, None, 1.25)
    sides = {
        name: iteration(
            agent(
                shape,
                shape.episodes,
                batch_size=shape.episodes * shape.response // MINIBATCHES,
                n_epochs=EPOCHS,
                kl_coef=0.05,
                policy_kwargs=policy_kwargs,
            )
        )
        for name, policy_kwargs in variants.items()
    }
    # The second time, too: only then is a prefill compiled, as the first one makes room.
    rates = compare.run({**sides, "trl": peer}, 3, warmups=2)
    for name, target in zip(sides, targets, strict=True):
        compare.row(rates, name, "trl", f"{what}, {name}", PEER, target=target)
