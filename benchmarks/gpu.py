"""Rollouts and updates on a GPU: against `model.generate`, and against what the card can do.

    python -m benchmarks.gpu

Our trunk computes in bfloat16 (`policy_kwargs={"autocast": "bfloat16"}`); `generate` has a model
that is bfloat16 altogether, the fastest that its users would take. The card's matrix rate and
memory bandwidth are measured, not taken from a data sheet: a product of two large bfloat16
matrices, and a copy. Results are written on a GPU only.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
import tyro
from rich.console import Console
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from agents import PPO
from agents.files import write_text
from agents.rollouts.vec_env import engine_of
from benchmarks.measuring import Side
from benchmarks.peers import generation
from benchmarks.report import machine, versions
from benchmarks.workload import Shape, agent, rollout, update


@dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("gpt2-small", "llama-1b")
    """Which shapes; see MODELS."""
    batches: tuple[int, ...] = (64, 256, 1024)
    """Episodes side by side."""
    prompt: int = 64
    """Tokens of a prompt."""
    response: int = 128
    """Tokens of a response."""
    minibatch: int = 8192
    """Response tokens of an update."""
    rounds: int = 3
    """How often each is measured."""
    compile: bool = True
    """Whether rollouts run compiled programs, captured as graphs."""
    device: str = "cuda"
    """Where."""
    out: Path = Path("benchmarks/results")
    """The folder of the results, gpu_<device>.md and .json."""

    @property
    def positions(self) -> int:
        """How many positions a model must have."""
        return self.prompt + self.response


def tiny(positions: int) -> PretrainedConfig:
    """Return a model to try this program with."""
    return Shape(vocabulary=64, hidden=32, layers=2).config(positions)


def gpt2_small(positions: int) -> PretrainedConfig:
    """Return GPT-2's smallest shape, 124 million parameters."""
    return GPT2Config(n_positions=max(1024, positions), bos_token_id=None, eos_token_id=None)


def llama_1b(positions: int) -> PretrainedConfig:
    """Return a Llama of about 1.1 billion parameters, with four queries to each key."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=max(2048, positions),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


MODELS: dict[str, Callable[[int], PretrainedConfig]] = {
    "tiny": tiny,
    "gpt2-small": gpt2_small,
    "llama-1b": llama_1b,
}


def make(name: str, slots: int, options: Options, **kwargs: Any) -> PPO:
    """Return an agent with a model of some shape."""
    config = MODELS[name](options.positions)
    shape = Shape(
        slots, prompt=options.prompt, response=options.response, vocabulary=config.vocab_size
    )
    return agent(
        shape,
        config=config,
        device=options.device,
        policy_kwargs={"autocast": "bfloat16", "compile": options.compile},
        **kwargs,
    )


def measure_rollout(name: str, batch: int, options: Options) -> dict[str, Any]:
    """Measure a rollout of an episode in each slot, in turns with `generate` on the same model."""
    model = make(name, batch, options)
    network: Any = model.policy.backbone.model  # type: ignore[union-attr]
    own = rollout(model)
    lengths = (options.response, options.response)
    cast = copy.deepcopy(network).to(th.bfloat16)
    peer = generation(cast, engine_of(model.env), batch, lengths)
    for side in (own, peer):  # to warm up
        side.run()
    pairs = [(timed(own, options), timed(peer, options)) for _ in range(options.rounds)]
    rate = median(ours for ours, _ in pairs)
    moved = bytes_a_step(network, batch, options) * rate / batch
    return {
        "model": name,
        "batch": batch,
        "tokens_per_second": rate,
        "generate_tokens_per_second": median(theirs for _, theirs in pairs),
        "ratios": [ours / theirs for ours, theirs in pairs],
        "bytes_per_second": moved,
    }


def measure_update(name: str, options: Options) -> dict[str, Any]:
    """Measure an update of one minibatch."""
    model = make(name, max(1, options.minibatch // options.response), options)
    own = update(model)
    own.run()
    rate = median(timed(own, options) for _ in range(options.rounds))
    network: Any = model.policy.backbone.model  # type: ignore[union-attr]
    # A sequence's tokens all go through the trunk, its actions alone through the head.
    head = network.get_output_embeddings().weight.numel()
    trunk = network.num_parameters() - head
    flops = 6 * (trunk * options.positions / options.response + head)
    return {"model": name, "tokens_per_second": rate, "flops_per_second": flops * rate}


def timed(side: Side, options: Options) -> float:
    """Return a side's rate, with all that it started on the device."""
    synchronize(options)
    started = time.perf_counter()
    side.run()
    synchronize(options)
    return side.work / (time.perf_counter() - started)


def synchronize(options: Options) -> None:
    """Wait for the device."""
    if options.device.startswith("cuda"):
        th.cuda.synchronize()


def bytes_a_step(network: Any, batch: int, options: Options) -> float:
    """Return the least that a decode step reads: weights once, each row's keys and values.

    All in bfloat16; a context has its mean length over the response.
    """
    config = network.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = config.hidden_size // config.num_attention_heads
    context = options.prompt + options.response / 2
    cache = 2 * config.num_hidden_layers * heads * head_size * context * batch
    return float(2 * (network.num_parameters() + cache))


def matrix_rate(options: Options) -> float:
    """Return how many operations a second a large bfloat16 matrix product does."""
    size = 8192 if options.device.startswith("cuda") else 256
    a = th.randn(size, size, device=options.device, dtype=th.bfloat16)
    return best(lambda: a @ a, options) * 2 * size**3


def bandwidth(options: Options) -> float:
    """Return how many bytes a second a copy reads and writes."""
    size = 2**30 if options.device.startswith("cuda") else 2**22
    a = th.empty(size, dtype=th.uint8, device=options.device)
    b = th.empty_like(a)
    return best(lambda: b.copy_(a), options) * 2 * size


def best(run: Callable[[], Any], options: Options, times: int = 10) -> float:
    """Return how often a second something can be done."""
    side = Side(lambda: [run() for _ in range(times)], times)
    timed(side, options)
    return max(timed(side, options) for _ in range(5))


def report(results: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    matrix, memory = results["matrix_rate"], results["bandwidth"]
    options = results["options"]
    lines = [
        f"# {results['device']}",
        "",
        f"`python -m benchmarks.gpu`: {options['prompt']} + {options['response']} tokens; "
        + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        + ".",
        "",
        f"Measured: {matrix / 1e12:.3g} TFLOP/s in matrix products, {memory / 1e9:,.0f} GB/s in "
        "copies.",
        "",
        "| rollout of | batch | tokens/s | `generate`, tokens/s | ratio | of the bandwidth |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in results["rollouts"]:
        spread = f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f}"
        lines.append(
            f"| {r['model']} | {r['batch']} | {r['tokens_per_second']:,.0f} "
            f"| {r['generate_tokens_per_second']:,.0f} | {median(r['ratios']):.2f} ({spread}) "
            f"| {r['bytes_per_second'] / memory:.1%} |"
        )
    lines += [
        "",
        "| update of | response tokens/s | TFLOP/s | of the matrix rate |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['model']} | {r['tokens_per_second']:,.0f} | {r['flops_per_second'] / 1e12:.3g} "
        f"| {r['flops_per_second'] / matrix:.1%} |"
        for r in results["updates"]
    ]
    return "\n".join(lines) + "\n"


def measure(options: Options) -> dict[str, Any]:
    """Measure everything."""
    device = machine()["gpu"] if options.device.startswith("cuda") else options.device
    return {
        "device": device,
        "options": {**asdict(options), "out": str(options.out)},
        "versions": versions(),
        "matrix_rate": matrix_rate(options),
        "bandwidth": bandwidth(options),
        "rollouts": [
            measure_rollout(name, batch, options)
            for name in options.models
            for batch in options.batches
        ],
        "updates": [measure_update(name, options) for name in options.models],
    }


def main() -> None:
    """Measure, print, and on a GPU write."""
    options = tyro.cli(Options, description=__doc__)
    results = measure(options)
    Console().print(report(results))
    if options.device.startswith("cuda"):
        path = options.out / f"gpu_{results['device'].replace(' ', '_')}"
        write_text(path.with_suffix(".md"), report(results))
        write_text(path.with_suffix(".json"), json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
