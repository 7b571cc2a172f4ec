"""Do the defaults do harm? Every task, warm-started and not, small and large models, as a table.

    python -m benchmarks.defaults --seeds 3 --jobs 2

Every cell is a run with the command line's defaults on one CPU thread, but for its length. It tells
the largest and the median approximate KL of its updates, how far the mean reward of a rollout fell
below that of the first one, and the held-out reward before and after. `--settings` compares with
other options; "former" is what the defaults were before they were measured here.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from agents import RunSpec, evaluate_split, warm_start
from benchmarks.learnability import machine

ROOT = Path(__file__).parent.parent
README_TASK = "README's task"
# The environment, how often its demonstrations are imitated first (None: as the command line does),
# and the size of the model.
CASES: dict[str, tuple[str, int | None, str]] = {
    "TextGen": ("TextGen-v0", None, "tiny"),
    "TextGen, not warm-started": ("TextGen-v0", 0, "tiny"),
    "TextGen, smaller model": ("TextGen-v0", 8, "smaller"),
    "TextGen, larger model": ("TextGen-v0", 8, "larger"),
    "Dialogue": ("Dialogue-v0", None, "tiny"),
    "Dialogue, not warm-started": ("Dialogue-v0", 0, "tiny"),
    "Translation": ("Translation-v0", None, "tiny"),
    "Translation, warm-started little": ("Translation-v0", 1, "tiny"),
    "TextClassification": ("TextClassification-v0", None, "tiny"),
    "TextClassification, not warm-started": ("TextClassification-v0", 0, "tiny"),
    README_TASK: (README_TASK, None, "tiny"),
    "README's task, not warm-started": (README_TASK, 0, "tiny"),
}
# Every token is an episode there, with a prompt to read.
SHORTER = {"TextClassification-v0": 4}
SIZES: dict[str, dict[str, Any]] = {
    "smaller": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "larger": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6},
}
FORMER: dict[str, Any] = {
    "n_steps": 128,
    "learning_rate": LinearSchedule(3e-4, 0.0, 1.0),
    "fit_critic": False,
    "whiten_floor": 0.0,
    "target_kl": float("inf"),
    "vf_detach": False,
    "warmup_steps": 0,
}
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "former": FORMER}


@dataclass(frozen=True)
class Options:
    """What to run."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which tasks and models."""
    settings: tuple[str, ...] = ("default",)
    """Which of the settings to compare, or options of PPO such as target_kl=0.03,vf_coef=0.1."""
    seeds: int = 3
    """How many seeds, from 0 on."""
    timesteps: int = 32_768
    """Tokens of each run; a quarter of them where a label is one token."""
    jobs: int = 2
    """How many runs at a time."""
    out: Path = Path("benchmarks/results/defaults")
    """Where the table goes, as .md and .json; runs that are there already are not made again."""


class Watch(BaseCallback):
    """Notes each rollout's mean episode reward, and each update's approximate KL."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[float] = []
        self.kls: list[float] = []
        self._episodes: list[float] = []

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self._episodes += [info["episode"]["r"] for info in infos if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.rewards.append(float(np.mean(self._episodes)) if self._episodes else float("nan"))
        self._episodes = []
        self._note_update()

    def _on_training_end(self) -> None:
        self._note_update()

    def _note_update(self) -> None:
        kl = self.logger.name_to_value.get("train/approx_kl")
        if kl is not None:
            self.kls.append(float(kl))


def run(case: str, settings: tuple[str, ...], seed: int, timesteps: int) -> list[dict[str, Any]]:
    """Warm-start once in this process, and train from there with each setting."""
    import torch

    torch.set_num_threads(1)
    env, passes, size = CASES[case]
    with TemporaryDirectory() as folder:
        if env == README_TASK:
            env = _readme_task(Path(folder))
        tokens = timesteps // SHORTER.get(env, 1)
        spec = RunSpec(env, timesteps=tokens, warm_start=passes, seed=seed, device="cpu")
        test = gym.make(spec.env_id, **spec.env_kwargs(held_out=True))

        def make(**kwargs: Any) -> Any:
            train: Any = gym.make_vec(spec.env_id, num_envs=spec.num_envs, **spec.env_kwargs())
            kwargs = {**spec.algorithm_kwargs(), **kwargs}
            if size in SIZES:
                kwargs["policy_kwargs"]["model"] = _config(train, SIZES[size])
            return spec.algorithm("TransformerPolicy", train, **kwargs)

        start = make()
        if passes != 0:
            warm_start(start, **{**spec.warm_start_kwargs(), "progress": False})
        before = evaluate_split(start, test, max_examples=spec.eval_examples)
        weights = start.policy.backbone.state_dict()
        results = []
        for setting in settings:
            model, watch = make(**_setting(setting)), Watch()
            model.policy.backbone.load_state_dict(weights)
            started = time.perf_counter()
            model.learn(tokens, callback=watch)
            minutes = (time.perf_counter() - started) / 60
            after = evaluate_split(model, test, max_examples=spec.eval_examples)
            results.append(
                {
                    "case": case,
                    "setting": setting,
                    "seed": seed,
                    "timesteps": timesteps,
                    "before": [before.mean, before.standard_error],
                    "after": [after.mean, after.standard_error],
                    "rewards": watch.rewards,
                    "kls": watch.kls,
                    "minutes": minutes,
                }
            )
    return results


def _readme_task(folder: Path) -> str:
    """Write the README's task into a folder, and return its name for a run."""
    code = re.search(
        r"```python file=counting.py\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert code is not None, "The README has no counting.py."
    (folder / "counting.py").write_text(code[1])
    sys.path.insert(0, str(folder))
    return "counting:Counting"


def _config(env: Any, size: dict[str, Any]) -> Any:
    from agents.models.loading import tiny_config

    spaces = env.single_observation_space
    positions = sum(spaces[key].shape[0] for key in ("prompt", "response"))
    config = tiny_config(int(env.single_action_space.n), positions)
    config.update(size)
    config.layer_types = None
    return config


def _setting(setting: str) -> dict[str, Any]:
    if setting in SETTINGS:
        return SETTINGS[setting]
    pairs = (pair.split("=") for pair in setting.split(","))
    return {name: json.loads(value) for name, value in pairs}


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: means over seeds, and the worst."""
    lines = [
        "| case | setting | seeds | held out before | after | worst change | mean of rollouts | "
        "deepest fall | KL: largest | median |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, setting in dict.fromkeys((r["case"], r["setting"]) for r in results):
        rows = [r for r in results if (r["case"], r["setting"]) == (case, setting)]
        before, after = (np.array([r[key][0] for r in rows]) for key in ("before", "after"))
        # A rollout may be shorter than any of its episodes.
        curve = np.nanmean([r["rewards"] for r in rows], axis=0)
        fall = max(np.nanmax(_known(r)[0] - _known(r)) for r in rows)
        kls = np.concatenate([r["kls"] for r in rows])
        lines.append(
            f"| {case} | {setting} | {len(rows)} | {before.mean():.3f} | {after.mean():.3f} | "
            f"{min(after - before):+.3f} | {np.nanmean(curve):.3f} | {fall:.3f} | {max(kls):.3f} | "
            f"{np.median(kls):.3f} |"
        )
    return "\n".join(lines) + "\n"


def _known(result: dict[str, Any]) -> Any:
    """Return the mean rewards of the rollouts in which an episode ended."""
    rewards = np.array(result["rewards"])
    return rewards[~np.isnan(rewards)]


def main() -> None:
    """Run everything and write the table."""
    options = tyro.cli(Options)
    os.environ["OMP_NUM_THREADS"] = "1"
    json_file = options.out.with_suffix(".json")
    results: list[dict[str, Any]] = json.loads(json_file.read_text()) if json_file.exists() else []
    done = {(r["case"], r["setting"], r["seed"], r["timesteps"]) for r in results}
    todo = [
        (case, missing, seed, options.timesteps)
        for seed in range(options.seeds)
        for case in options.cases
        if (
            missing := tuple(
                setting
                for setting in options.settings
                if (case, setting, seed, options.timesteps) not in done
            )
        )
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.defaults " + " ".join(sys.argv[1:])
    head = f"# Defaults\n\n`{command.strip()}` on {machine()}.\n\n"
    runs = len(options.cases) * len(options.settings) * options.seeds

    def write() -> None:
        made = f"{len(results)} of {runs} runs so far.\n\n" if len(results) < runs else ""
        options.out.with_suffix(".md").write_text(head + made + table(results))

    if results:
        write()
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, *work) for work in todo]):
            results = sorted([*results, *future.result()], key=_place)
            json_file.write_text(json.dumps(results, indent=2) + "\n")
            write()


def _place(result: dict[str, Any]) -> tuple[int, int, str, int]:
    settings = list(SETTINGS)
    at = settings.index(result["setting"]) if result["setting"] in settings else len(settings)
    return list(CASES).index(result["case"]), at, result["setting"], result["seed"]


if __name__ == "__main__":
    main()
