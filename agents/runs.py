"""A training run from start to end, and the folder that it leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.logger import configure

from agents.evaluation import Evaluation, evaluate_split
from agents.files import atomic_path, write_text
from agents.imitation import warm_start
from agents.plots import plot_learning_curve
from agents.ppo import PPO
from agents.vec_env import engine_of
from textenvs.registration import load_task, register_task, task_ids

Say = Callable[[str], None]

CONFIG, SUMMARY, AGENT, MODEL = "config.json", "summary.json", "agent.zip", "model"
BEFORE, AFTER = "samples_before.jsonl", "samples_after.jsonl"
CURVE, PROGRESS = "learning_curve.png", "progress.csv"


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Args:
        env_id: A registered id.
        timesteps: How many tokens to train on.
        num_envs: How many episodes run side by side.
        env_kwargs: For `gym.make` and `gym.make_vec`, without `split`.
        eval_kwargs: What differs from them in the held-out environment.
        train_split: What to train on.
        eval_split: What is held out.
        eval_examples: How many held-out examples to play, at most.
        ppo_kwargs: For `agents.PPO`.
        warm_start_kwargs: For `agents.warm_start`.
        seed: Of everything.
    """

    env_id: str
    timesteps: int
    num_envs: int
    env_kwargs: dict[str, Any]
    eval_kwargs: dict[str, Any]
    train_split: str
    eval_split: str
    eval_examples: int
    ppo_kwargs: dict[str, Any]
    warm_start_kwargs: dict[str, Any]
    seed: int


def resolve_env_id(env: str) -> str:
    """Return a registered id for an id or for "package.module:Task", which is registered.

    Raises:
        ValueError: If there is no such environment.
    """
    if env in task_ids():
        return env
    load_task(env)  # raises if there is none; importing a module may register its task, too
    env_id = f"{env.rpartition(':')[2].rpartition('.')[2]}-v0"
    if env_id not in task_ids():
        register_task(env_id, env)
    return env_id


def train(
    plan: Plan, folder: Path, config: dict[str, Any], say: Say, progress: bool
) -> dict[str, Any]:
    """Run a plan and return its summary.

    An interrupt (Ctrl-C) ends the training early and is otherwise harmless: everything is
    written as at the regular end, and the summary says `interrupted`.

    Args:
        plan: What to do.
        folder: The run's folder; it must be new or empty.
        config: The user's own settings, kept for the record.
        say: Called with lines for the user.
        progress: Whether to show progress bars.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"The run folder {folder} is a file or not empty: choose another.")
    envs, held_out = make_environments(plan)
    own_reward = plan.env_kwargs.get("reward") is None
    model = PPO("TransformerPolicy", envs, seed=plan.seed, **plan.ppo_kwargs)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {**config, "resolved": _resolved(envs)})
    if plan.warm_start_kwargs["passes"]:
        say("Warm start: imitating the task's demonstrations ...")
    warm_start(model, progress=progress, seed=plan.seed, **plan.warm_start_kwargs)
    say(f"Playing up to {plan.eval_examples} held-out examples ...")
    before = evaluate_split(model, held_out, plan.eval_examples)
    write_jsonl(folder / BEFORE, before)
    say(f"Mean held-out reward before: {show(before, own_reward)}")
    model.set_logger(configure(str(folder), ["csv", "tensorboard"]))
    say(f"Training on {plan.timesteps:,} tokens ...")
    interrupted, started = False, time.perf_counter()
    try:
        model.learn(plan.timesteps, progress_bar=progress)
    except KeyboardInterrupt:
        interrupted = True
        say("Interrupted: writing what has been learned so far ...")
    seconds = time.perf_counter() - started
    with atomic_path(folder / AGENT) as temporary:
        model.save(temporary)
    model.policy.save_pretrained(folder / MODEL)  # type: ignore[operator]
    after = evaluate_split(model, held_out, plan.eval_examples)
    write_jsonl(folder / AFTER, after)
    say(f"Mean held-out reward after: {show(after, own_reward)}")
    model.logger.close()
    plot_learning_curve(
        folder / PROGRESS,
        folder / CURVE,
        plan.env_id,
        {
            "held out, before": (0, before.mean, before.standard_error),
            "held out, after": (model.num_timesteps, after.mean, after.standard_error),
        },
    )
    summary = {
        "env_id": plan.env_id,
        "seed": plan.seed,
        "timesteps": model.num_timesteps,
        "interrupted": interrupted,
        "device": str(model.device),
        "before": before.summary(),
        "after": after.summary(),
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(model.num_timesteps / seconds, 1),
    }
    write_json(folder / SUMMARY, summary)
    return {**summary, "evaluations": (before, after)}


def make_environments(plan: Plan) -> tuple[Any, gym.Env[Any, Any]]:
    """Return the vector environment to train on and the held-out one, of the same budgets.

    Where no prompt budget is given, it is made for the longest prompt of both.
    """

    def make_both(budgets: dict[str, int]) -> tuple[Any, Any]:
        kwargs = {**plan.env_kwargs, **budgets}
        held_out_kwargs = {**kwargs, **plan.eval_kwargs}
        return (
            gym.make_vec(plan.env_id, plan.num_envs, split=plan.train_split, **kwargs),
            gym.make(plan.env_id, split=plan.eval_split, **held_out_kwargs),
        )

    envs, held_out = make_both({})
    longest = [engine_of(env).max_prompt_tokens for env in (envs, held_out)]
    if longest[0] != longest[1]:
        envs, held_out = make_both({"max_prompt_tokens": max(longest)})
    return envs, held_out


def show(evaluation: Evaluation, success: bool = True) -> str:
    """Return a mean with its standard error, as text.

    Args:
        evaluation: The episodes.
        success: Whether to tell the success rate, too. The task's success says little about a
            reward that is not the task's.
    """
    rate = evaluation.success_rate if success else None
    return (
        f"{evaluation.mean:.3f} ± {evaluation.standard_error:.3f} (n={len(evaluation.episodes)})"
        + ("" if rate is None else f", success {rate:.0%}")
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_jsonl(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation's transcripts, a line each."""
    lines = (json.dumps(record, ensure_ascii=False) for record in evaluation.records())
    write_text(path, "".join(line + "\n" for line in lines))


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def _resolved(envs: Any) -> dict[str, Any]:
    """Return what the environment settled by itself and an evaluation must repeat."""
    engine = engine_of(envs)
    return {
        "max_prompt_tokens": engine.max_prompt_tokens,
        "max_new_tokens": engine.max_new_tokens,
        "vocabulary": int(engine.action_space.n),
    }
