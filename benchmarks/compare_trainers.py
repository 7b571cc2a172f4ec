"""Our PPO against SB3's own and TRL's `PPOTrainer`, on Translation-v0, as a table.

    python -m benchmarks.compare_trainers --seeds 0 1 2 --jobs 1

For each seed, one tiny model is warm-started, and each trainer starts from these weights. All have
the same prompts, reward, budget of response tokens, updates, epochs, minibatches, learning rate
(linear to 0), clipping, gamma, lambda, KL penalty and temperature; NOTES says what is left. What a
trainer made of the model is put into a `TransformerPolicy` and plays the held-out examples, each
several times: the chance of a single sampling would hide differences of this size. Runs that are
in the results already are not repeated.
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch as th
import tyro

import textenvs
from agents import PPO, evaluate_split, warm_start
from agents.files import write_json, write_text
from agents.training.evaluation import Predictor, summarize
from benchmarks.learnability import machine
from benchmarks.trainers import ENV_ID, TRAINERS, Settings, Start, import_trl

# Those of `TRAINERS` that are ours.
OURS = ("ours", "whole")
NOTES = """\
What differs, because the trainers are made so:

- SB3's PPO has no KL penalty: a callback takes it off the rewards, by `agents.PPO`'s formula. Its
  learning rate is shifted by one update, since SB3's own timing would spend the last one at 0.
- All critics are a second model from the same weights with a head of zeros (`critic="own"`). Ours
  and SB3's are by default a linear layer on the actor instead (`critic="shared"`).
- TRL clips no gradients (ours: norm 1). Its clipping of values is switched off, since ours has
  none.
- TRL whitens advantages over the whole update, ours and SB3's over each minibatch.
- The updates of TRL and of "whole" hold whole episodes, as many as take the same number of tokens
  in the mean, and each prompt once per pass over the data; "ours" and SB3's hold a fixed number of
  tokens, so that the ends of rollouts cut episodes, and prompts are drawn at random. "ours" leaves
  these tokens out of the update (`whole_episodes=True`), in SB3's V stands for what is to come.
- TRL adds the score one position behind the last token.
"""


@dataclass(frozen=True)
class Options(Settings):
    """What to compare."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of everything: weights, warm start, sampling."""
    trainers: tuple[Literal["ours", "whole", "sb3", "trl"], ...] = ("ours", "whole", "sb3", "trl")
    """Which trainers; "whole" is ours with whole episodes, as TRL has them."""
    jobs: int = 1
    """How many runs at a time, of one thread each."""
    output: Path = Path("benchmarks/results/compare_trainers")
    """Where the results go, as .json and .md."""

    @property
    def settings(self) -> Settings:
        """The settings alone."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})


def run(trainer: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train once in this process; return what is to be known of it."""
    held_out = gym.make(ENV_ID, split="test")
    with TemporaryDirectory() as folder:
        weights = Path(folder) / "model"
        model = PPO(
            "TransformerPolicy",
            gym.make_vec(ENV_ID, settings.num_envs),
            policy_kwargs={"temperature": settings.temperature},
            seed=seed,
            device="cpu",
        )
        warm_start(model, settings.warm_start, progress=False, seed=seed)
        before = evaluate(model, held_out, settings)
        model._text_policy().save_pretrained(weights)
        start = Start(weights, settings, seed, before["response_tokens"])
        trained = TRAINERS[trainer](start)
        after = evaluate(trained.policy, held_out, settings)
    return {
        "trainer": trainer,
        "seed": seed,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
        "before": before,
        "after": after,
        "machine": machine(),
        "versions": versions(trainer),
    }


def evaluate(model: Predictor, held_out: gym.Env[Any, Any], settings: Settings) -> dict[str, Any]:
    """Play each held-out example several times; return `Evaluation.summary` of it all."""
    evaluations = [
        evaluate_split(model, held_out, settings.eval_examples, seed=seed)
        for seed in range(settings.eval_samples)
    ]
    summary = summarize([record for e in evaluations for record in e.records()])
    examples = np.mean([e.rewards for e in evaluations], axis=0)
    summary["standard_error"] = float(examples.std(ddof=1) / math.sqrt(len(examples)))
    return summary


def versions(trainer: str) -> str:
    """Return a trainer's package and its version."""
    if trainer in OURS:
        return f"textenvs {textenvs.__version__}"
    package = {"sb3": "stable_baselines3", "trl": "trl"}[trainer]
    return f"{package} {version(package)}"


def report(results: list[dict[str, Any]], settings: Settings) -> str:
    """Return the tables in Markdown."""
    trainers = [name for name in TRAINERS if any(r["trainer"] == name for r in results)]
    lines = [
        f"# Trainers on {ENV_ID}",
        "",
        f"`python -m benchmarks.compare_trainers` on {results[0]['machine']}; "
        + ", ".join(sorted({r["versions"] for r in results}))
        + ".",
        "",
        "Mean held-out reward ± its standard error over examples; under all seeds, of the mean "
        "over seeds, too.",
        "",
        "| trainer | seed | before | after | success | tokens | tokens an episode | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in trainers:
        own = [r for r in results if r["trainer"] == name]
        lines += [row(name, str(r["seed"]), [r]) for r in own]
        if len(own) > 1:
            lines.append(row(f"**{name}**", "all", own))
    differences = [
        difference(results, ours, theirs)
        for ours in OURS
        for theirs in trainers
        if ours in trainers and theirs not in OURS
    ]
    lines += ["", *filter(None, differences), "", NOTES]
    lines.append(f"Settings: `{json.dumps(asdict(settings))}`")
    return "\n".join(lines) + "\n"


def row(name: str, seed: str, results: list[dict[str, Any]]) -> str:
    """Return a line of the table: a run, or several and their means."""
    cells = []
    for key in ("before", "after"):
        mean, error, over_seeds = pooled([r[key] for r in results])
        spread = "" if over_seeds is None else f" ± {over_seeds:.3f}"
        cells.append(f"{mean:.3f} ± {error:.3f}{spread}")
    success = [
        f"{np.mean([r[key]['success_rate'] for r in results]):.1%}" for key in ("before", "after")
    ]
    cells += [
        ", ".join(success),
        f"{np.mean([r['tokens'] for r in results]):,.0f}",
        f"{np.mean([r['after']['response_tokens'] for r in results]):.1f}",
        f"{np.mean([r['seconds'] for r in results]) / 60:.1f}",
    ]
    return f"| {name} | {seed} | " + " | ".join(cells) + " |"


def pooled(summaries: list[dict[str, Any]]) -> tuple[float, float, float | None]:
    """Return the mean reward, and its standard errors over examples and over seeds."""
    means = [s["mean_reward"] for s in summaries]
    count = len(means)
    error = math.sqrt(sum(s["standard_error"] ** 2 for s in summaries)) / count
    over_seeds = float(np.std(means, ddof=1)) / math.sqrt(count) if count > 1 else None
    return float(np.mean(means)), error, over_seeds


def difference(results: list[dict[str, Any]], name: str, other: str) -> str:
    """Return how much better one of ours is, seed by seed and in the mean."""
    after = {(r["trainer"], r["seed"]): r["after"] for r in results}
    seeds = sorted(seed for who, seed in after if who == other and (name, seed) in after)
    if not seeds:
        return ""
    ours, theirs = ([after[who, seed] for seed in seeds] for who in (name, other))
    gains = [a["mean_reward"] - b["mean_reward"] for a, b in zip(ours, theirs, strict=True)]
    text = f"- {name} less {other}, same seed and examples: {np.mean(gains):+.3f}"
    if len(gains) > 1:
        text += f" ± {np.std(gains, ddof=1) / math.sqrt(len(gains)):.3f} over seeds"
    return text + f" ({', '.join(f'{gain:+.3f}' for gain in gains)})"


def finished(path: Path, settings: Settings) -> list[dict[str, Any]]:
    """Return the runs that a results file holds already.

    Raises:
        ValueError: If they were made with other settings.
    """
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["settings"] != asdict(settings):
        raise ValueError(f"{path} was made with other settings: choose another --output.")
    runs: list[dict[str, Any]] = content["runs"]
    return runs


def compare(options: Options) -> None:
    """Run what is not in the results yet; write them after each run."""
    settings, path = options.settings, options.output.with_suffix(".json")
    results = finished(path, settings)
    done = {(r["trainer"], r["seed"]) for r in results}
    wanted = [(name, seed) for seed in options.seeds for name in options.trainers]
    if any(name == "trl" for name, _ in set(wanted) - done):
        import_trl()
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), th.set_num_threads, (1,)) as pool:
        todo = [job for job in wanted if job not in done]
        errors = []
        for future in as_completed([pool.submit(run, *job, settings) for job in todo]):
            if (error := future.exception()) is not None:
                errors.append(error)  # what else is being measured must not be lost
                continue
            results.append(future.result())
            write(path, results, settings)
    if errors:
        raise errors[0]


def write(path: Path, results: list[dict[str, Any]], settings: Settings) -> None:
    """Write results as JSON and as a table beside it."""
    results.sort(key=lambda r: (list(TRAINERS).index(r["trainer"]), r["seed"]))
    write_json(path, {"settings": asdict(settings), "runs": results})
    write_text(path.with_suffix(".md"), report(results, settings))


if __name__ == "__main__":
    compare(tyro.cli(Options))
