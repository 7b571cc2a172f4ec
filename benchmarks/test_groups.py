"""A whole iteration of GRPO, reference included, against TRL's `GRPOTrainer`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.measuring import Comparison, Row
from benchmarks.peers import trl_group_iteration
from benchmarks.workload import EVERY_OPTION, Shape, group_agent, iteration

GROUP_SIZE = 8
PEER = "TRL 1.12's `GRPOTrainer`, fp32"
# The prompt, in tokens, of the longer shape; its response is longer, too.
LONG = (256, 64)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.benchmark(group="groups")
def test_against_trl(
    compare: Comparison, shape: Shape, rows: list[Row], long: bool, small: bool
) -> None:
    if long and not small:
        shape = replace(shape, prompt=LONG[0], response=LONG[1])
    what = (
        f"GRPO iteration, {shape.episodes} x ({shape.prompt} + {shape.response}) tokens, groups of "
        f"{GROUP_SIZE}"
    )
    try:
        peer = trl_group_iteration(shape, GROUP_SIZE)
    except ImportError:
        reason = "TRL 1.12 is not installed (pip install 'textenvs[bench]')"
        rows.append(Row(what, PEER, skipped=reason))
        pytest.skip(reason)
    variants: dict[str, dict[str, Any]] = {"fp32": {}, "every option": EVERY_OPTION}
    targets = (3.0, None) if long else (1.6, 2.0)
    sides = {
        name: iteration(group_agent(shape, GROUP_SIZE, policy_kwargs))
        for name, policy_kwargs in variants.items()
    }
    rates = compare.run({**sides, "trl": peer}, 3, warmups=2)
    for name, target in zip(sides, targets, strict=True):
        compare.row(rates, name, "trl", f"{what}, {name}", PEER, target=target)
