"""The table of the docs that tells what each kind of model can do: its rows, as they are found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch as th
import transformers

from agents.models.backbone import Capabilities
from agents.models.lora import Adapter
from agents.models.probes import NO_STEPS

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
TESTED = transformers.__version__.startswith("5.23.")
# What follows from a "no" before.
FOLLOWS = ("it does not pack", NO_STEPS)
DONE = {"caches": "cached", "packs": "packed", "shares": "shared", "compiles": "compiled"}


def row_of(name: str, capabilities: Capabilities, lora: bool) -> str:
    """Return a model's row."""
    can = vars(capabilities)
    cells = ["no" if can[what] else "yes" for what in ("caches", "packs", "shares", "compiles")]
    cells.append("yes" if lora else "no")
    why = [f"not {done}: {told(can[what])}" for what, done in DONE.items() if can[what]]
    why = [reason for reason in why if not reason.endswith(FOLLOWS)]
    return f"| {name} | {' | '.join(cells)} | {'; '.join(why)} |"


def told(reason: str) -> str:
    """Return a reason without what differs from machine to machine."""
    reason = re.sub(r"the results differ by up to .*", "it computes something else", reason)
    reason = re.sub(r"^((?!Value)\w*Error): .*", r"it fails (\1)", reason, flags=re.DOTALL)
    return reason.removeprefix("ValueError: ").split(" and is not")[0]


def takes_an_adapter(model: transformers.PreTrainedModel, forward: Callable[[], th.Tensor]) -> bool:
    """Return whether a model computes with a LoRA adapter, whose parameters alone are trained."""
    before = forward()
    try:
        Adapter(model, {"r": 2})
    except ValueError:
        return False
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    th.testing.assert_close(forward(), before)
    with th.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    after = forward()
    after.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    return not th.allclose(after, before)
