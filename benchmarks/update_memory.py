"""How much memory an update takes by its tokens, with the logits in chunks and all at once.

    python -m benchmarks.update_memory

Each cell is an update of one minibatch by a small Llama with GPT-2's vocabulary (50,257), in a
process of its own on the CPU: the process's peak less what it held before the update.
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tyro

VOCABULARY = 50_257


@dataclass(frozen=True)
class Options:
    """What to measure."""

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens to an update."""
    out: Path = Path("benchmarks/results/update_memory")
    """Where table and picture go, as .md, .json and .png."""


def measure(tokens: int, chunked: bool) -> float:
    """Return the memory of one update in MiB, beyond what was held before."""
    import gymnasium as gym
    import psutil  # type: ignore[import-untyped]
    import torch as th
    from transformers import LlamaConfig

    import textenvs  # noqa: F401 (registers the ids)
    from agents import PPO
    from agents.rollouts.statistics import peak_memory
    from benchmarks.workload import rollout

    n_steps = 32
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    envs: Any = gym.make_vec("TextGen-v0", num_envs=tokens // n_steps, max_new_tokens=n_steps)
    model = PPO(
        "TransformerPolicy",
        envs,
        n_steps=n_steps,
        batch_size=tokens,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"model": config, "head_chunk": None if chunked else tokens},
    )
    policy: Any = model.policy
    rollout(model).run()
    # The environment has fewer tokens than the model; in the update all of the model's count.
    policy.vocab_size = VOCABULARY
    # Gradients and the optimizer's state are there before and after; they are not what is measured.
    for parameter in policy.parameters():
        parameter.grad = th.zeros_like(parameter)
    policy.optimizer.step()
    before: float = psutil.Process().memory_info().rss / 2**20
    model.train()
    peak = peak_memory(model.device)
    assert peak is not None, "The peak is not known on this system."
    return max(0.0, peak - before)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| tokens | tokens x vocabulary in float32, MiB | in chunks, MiB | at once, MiB |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        "| " + " | ".join(f"{row[k]:,.0f}" for k in ("tokens", "logits", "chunked", "whole")) + " |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch
    import transformers
    from rich.console import Console

    from agents.files import atomic_path, write_text

    options = tyro.cli(Options, description=__doc__)
    console = Console()
    rows = []
    for tokens in options.tokens:
        row: dict[str, Any] = {"tokens": tokens, "logits": tokens * VOCABULARY * 4 / 2**20}
        for name, chunked in (("chunked", True), ("whole", False)):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row[name] = pool.submit(measure, tokens, chunked).result()
            console.print(f"{tokens:,} tokens, {name}: {row[name]:,.0f} MiB")
        rows.append(row)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_text(
        options.out.with_suffix(".json"),
        json.dumps({"rows": rows, "versions": versions}, indent=2) + "\n",
    )
    write_text(
        options.out.with_suffix(".md"),
        "# Memory of an update\n\n"
        f"`python -m benchmarks.update_memory`, a vocabulary of {VOCABULARY:,}, one minibatch.\n\n"
        f"{table(rows)}\n"
        f"{platform.machine()} CPU, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".\n\n![Memory by tokens](update_memory.png)\n",
    )
    figure, axis = plt.subplots(figsize=(5, 3.6))
    x = [row["tokens"] for row in rows]
    for name, label in (("whole", "logits at once"), ("chunked", "logits in chunks")):
        axis.plot(x, [row[name] for row in rows], marker="o", label=label)
    axis.plot(x, [row["logits"] for row in rows], "k:", label="one array of logits")
    axis.set_xlabel("tokens in the update")
    axis.set_ylabel("memory of the update, MiB")
    axis.set_ylim(0)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(options.out.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=120)
    console.print(table(rows))


if __name__ == "__main__":
    main()
