"""How much memory an iteration of GRPO takes, and one of TRL's `GRPOTrainer`.

    python -m benchmarks.group_memory

Long prompts, eight responses to each, a reference: the shape of `benchmarks/test_groups.py`, each
in a process of its own on the CPU: its peak less what it held before the first iteration.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.learnability import machine

OUT = Path("benchmarks/results/group_memory.md")


def measure(which: str) -> float:
    """Return the memory of an iteration in MiB, beyond what was held before."""
    import psutil  # type: ignore[import-untyped]
    import torch as th

    from agents.rollouts.statistics import peak_memory
    from benchmarks.peers import trl_group_iteration
    from benchmarks.test_groups import GROUP_SIZE, LONG
    from benchmarks.workload import Shape, group_agent, iteration

    shape = replace(Shape(), prompt=LONG[0], response=LONG[1])
    if which == "ours":
        side = iteration(group_agent(shape, GROUP_SIZE))
    else:
        side = trl_group_iteration(shape, GROUP_SIZE)
    before: float = psutil.Process().memory_info().rss / 2**20
    side.run()
    peak = peak_memory(th.device("cpu"))
    assert peak is not None, "The peak is not known on this system."
    return peak - before


def main() -> None:
    """Measure and write."""
    from rich.console import Console

    from agents.files import write_text

    lines = ["| | MiB of an iteration |", "| --- | --- |"]
    for which, name in (("ours", "`agents.GRPO`"), ("trl", "TRL 1.12's `GRPOTrainer`")):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            lines.append(f"| {name} | {pool.submit(measure, which).result():,.0f} |")
    text = "\n".join(lines)
    Console().print(text)
    head = f"# Memory of GRPO\n\n`python -m benchmarks.group_memory` on {machine()}.\n\n"
    write_text(
        OUT, f"{head}64 x (256 + 64) tokens, groups of 8, fp32, with a reference.\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
