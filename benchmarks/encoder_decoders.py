"""Do encoder-decoders learn to translate by RL? Held-out reward before and after, as a table.

    python -m benchmarks.encoder_decoders --pairs en-fr.jsonl --fields prompt=en references=fr

A small T5 and a small Marian from configs begin with imitation, once for both algorithms, and go on
with PPO and with GRPO on `Translation-v0` and, where a file is given, on its pairs of sentences.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tyro

from agents import Run, RunSpec
from benchmarks.learnability import KEYS, learned, machine

WIDTH, LAYERS, HEADS = 128, 3, 4
# Of a tokenizer that is trained on the pairs; the embedded one knows no other language.
PIECES = 2000
# Sentences that the budgets hold.
CHARACTERS, TOKENS = 100, 40
# How often demonstrations are imitated first, those of the task and a file's.
PASSES = {"T5": (12, 24), "Marian": (2, 16)}
COMMON: dict[str, Any] = {
    **{"warm_start_learning_rate": 2e-3, "kl_coef": 0.02, "eval_examples": 500, "device": "cpu"},
    **{"num_envs": 32, "group_size": None},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"episodes_per_slot": 2, "gae_lambda": 1.0, "learning_rate": 6e-4},
    "grpo": {"group_size": 8, "learning_rate": 3e-4},
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    pairs: Path | None = None
    """A .jsonl or .jsonl.gz file of pairs of sentences."""
    fields: tuple[str, str] = ("prompt=en", "references=fr")
    """Which of its columns to read."""
    models: tuple[str, ...] = ("T5", "Marian")
    """Which models."""
    algos: tuple[str, ...] = tuple(ALGORITHMS)
    """Which algorithms."""
    seeds: int = 1
    """How many seeds, from 0 on."""
    timesteps: int = 65_536
    """Tokens of each run."""
    jobs: int = 2
    """How many runs at a time."""
    out: Path = Path("benchmarks/results/encoder_decoders")
    """Where the table goes, as .md and .json; runs that are there already are not made again."""


def run(name: str, case: dict[str, Any], options: Options) -> dict[str, Any]:
    """Train once in this process; return the run's summary, with some responses."""
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = _pairs(options, folder) if case["pairs"] else {}
        torch.manual_seed(case["seed"])
        save_model(case["model"], folder / "model", _tokenizer(data))
        spec = RunSpec(
            "Translation-v0",
            algo=case["algo"],
            model=str(folder / "model"),
            seed=case["seed"],
            timesteps=options.timesteps,
            warm_start=PASSES[case["model"]][case["pairs"]],
            **{**COMMON, **ALGORITHMS[case["algo"]], **data},
        )
        finished = Run.create(spec, folder / "run")
        summary = finished.train()
        rows = (finished.folder / "samples_after.jsonl").read_text().splitlines()
    said = [json.loads(row) for row in rows[:4]]
    minutes = (time.perf_counter() - started) / 60
    return {**case, **summary, "name": name, "minutes": minutes, "said": said}


def save_model(kind: str, folder: Path, tokenizer: Any) -> None:
    """Write a small model from a config, with its tokenizer beside it."""
    from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    model: Any
    if kind == "T5":
        options |= {"d_kv": WIDTH // HEADS, "d_ff": 3 * WIDTH, "num_heads": HEADS}
        model = T5ForConditionalGeneration(T5Config(num_layers=LAYERS, **options))
    else:
        for half in ("encoder", "decoder"):
            options |= {f"{half}_layers": LAYERS, f"{half}_attention_heads": HEADS}
            options |= {f"{half}_ffn_dim": 3 * WIDTH}
        # As the released ones are: sinusoids would drown embeddings that are not scaled.
        options |= {"scale_embedding": True, "activation_function": "swish"}
        model = MarianMTModel(MarianConfig(max_position_embeddings=512, **options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pairs(options: Options, folder: Path) -> dict[str, Any]:
    """Write the pairs that are short enough into a folder; return the options that read them."""
    assert options.pairs is not None
    opened = gzip.open if options.pairs.suffix == ".gz" else open
    columns = [field.partition("=")[2] for field in options.fields]
    with opened(options.pairs, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    short = [row for row in rows if all(len(row[name]) <= CHARACTERS for name in columns)]
    written = folder / "pairs.jsonl"
    written.write_text("\n".join(json.dumps(row) for row in short), encoding="utf-8")
    return {
        "dataset": str(written),
        "fields": options.fields,
        "template": "{prompt}",
        "max_new_tokens": TOKENS,
        # chrF alone pays for length: what never ends would earn the most.
        "reward": ("chrf", "0.2*missing_eos_penalty"),
    }


def _tokenizer(data: dict[str, Any]) -> Any:
    """Return the embedded tokenizer, or one that is trained on pairs."""
    from textenvs.text.loading import embedded_tokenizer

    embedded: Any = embedded_tokenizer()
    if not data:
        return embedded
    rows = [json.loads(line) for line in Path(data["dataset"]).read_text().splitlines()]
    texts = (row[field.partition("=")[2]] for row in rows for field in data["fields"])
    return embedded.train_new_from_iterator(texts, PIECES)


COLUMNS = [
    *("task", "model", "algorithm", "seed", "before", "after", "rise/error"),
    *("tokens", "ended", "well formed", "minutes"),
]


def table(summaries: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, and below it what was said."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * len(COLUMNS)}",
    ]
    texts = []
    for s in sorted(summaries, key=lambda s: s["name"]):
        before, after = s["before"], s["after"]
        cells = [f"{s[k]['mean_reward']:.3f} ± {s[k]['standard_error']:.3f}" for k in KEYS]
        error = math.hypot(before["standard_error"], after["standard_error"])
        rise = (after["mean_reward"] - before["mean_reward"]) / error
        tokens = ", ".join(f"{s[k]['response_tokens']:.1f}" for k in KEYS)
        ended = ", ".join(f"{s[k]['stopped_by_eos']:.0%}" for k in KEYS)
        formed = [s[k]["observed"].get("well_formed") for k in KEYS]
        shown = "" if None in formed else ", ".join(f"{share:.0%}" for share in formed)
        task = "pairs" if s["pairs"] else "Translation-v0"
        lines.append(
            f"| {task} | {s['model']} | {s['algo']} | {s['seed']} | {cells[0]} | {cells[1]} | "
            f"{rise:+.1f}{'' if learned(s) else ' (not learned)'} | {tokens} | "
            f"{ended} | {shown} | {s['minutes']:.1f} |"
        )
        texts += [f"\n{s['name']}:\n"]
        texts += [
            f"- {row['turns'][0]['text']!r} → {row['turns'][1]['text']!r} ({row['reward']:.2f})"
            for row in s["said"]
        ]
    return "\n".join([*lines, *texts]) + "\n"


def main() -> None:
    """Run everything and write the table."""
    options = tyro.cli(Options)
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = (False,) if options.pairs is None else (False, True)
    cases = {
        f"{'pairs' if pairs else 'Translation-v0'}, {model}, {algo}, seed {seed}": {
            **{"pairs": pairs, "model": model, "algo": algo, "seed": seed},
        }
        for seed in range(options.seeds)
        for pairs in tasks
        for model in options.models
        for algo in options.algos
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    file = options.out.with_suffix(".json")
    done = json.loads(file.read_text()) if file.is_file() else []
    summaries = [summary for summary in done if summary["name"] in cases]
    known = {summary["name"] for summary in summaries}
    head = (
        "# Encoder-decoders\n\n`python -m benchmarks.encoder_decoders"
        f"{' --pairs ...' if options.pairs else ''}` on {machine()}: {options.timesteps:,} tokens "
        "each.\n\n"
    )
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        todo = [pool.submit(run, n, c, options) for n, c in cases.items() if n not in known]
        for future in as_completed(todo):
            summaries.append(future.result())
            options.out.with_suffix(".md").write_text(head + table(summaries))
            file.write_text(json.dumps(summaries, indent=2) + "\n")


if __name__ == "__main__":
    main()
