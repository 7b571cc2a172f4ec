"""A training run from start to end, and the folder that it leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.logger import configure

from agents import parallel
from agents.algorithms.ppo import PPO
from agents.files import (
    atomic_path,
    read_json,
    read_jsonl,
    remove_leftovers,
    write_json,
    write_jsonl,
)
from agents.reports.curves import plot_learning_curve
from agents.rollouts.vec_env import engine_of
from agents.training.checkpoints import CheckpointCallback
from agents.training.evaluation import evaluate_split, summarize
from agents.training.imitation import warm_start
from agents.training.logs import PROGRESS, continue_log
from textenvs.registration import load_task, register_task, task_ids

Say = Callable[[str], None]

CONFIG, SUMMARY, AGENT, MODEL = "config.json", "summary.json", "agent.zip", "model"
CHECKPOINT = "checkpoint.zip"
BEFORE, AFTER = "samples_before.jsonl", "samples_after.jsonl"
CURVE = "learning_curve.png"


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
        checkpoint_freq: After how many tokens to write a checkpoint, about. 0: never.
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
    checkpoint_freq: int

    @property
    def own_reward(self) -> bool:
        """Whether the reward is the task's own."""
        return self.env_kwargs.get("reward") is None


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
    """Run a plan and return its summary, with the records of both evaluations as `samples`.

    An interrupt (Ctrl-C) ends the training early and is otherwise harmless: everything is
    written as at the regular end, and the summary says `interrupted`.

    With several ranks the main one evaluates, writes and returns the summary.

    Args:
        plan: What to do.
        folder: The run's folder; it must be new or empty.
        config: The user's own settings, kept for the record.
        say: Called with lines for the user.
        progress: Whether to show progress bars.

    Returns:
        On other ranks than the main one, an empty one.
    """
    parallel.run_on_all(lambda: _is_free(folder))
    return _from_the_start(plan, folder, config, say, progress)


def resume(
    plan: Plan, folder: Path, config: dict[str, Any], say: Say, progress: bool
) -> dict[str, Any]:
    """Go on with a killed or interrupted run from its last checkpoint, and return its summary.

    The result is that of the uninterrupted run. Without a checkpoint the run starts again, warm
    start included.

    Args:
        plan: The run's.
        folder: The run's.
        config: The run's.
        say: Called with lines for the user.
        progress: Whether to show progress bars.

    Returns:
        On other ranks than the main one, an empty one.
    """
    if parallel.is_main():
        remove_leftovers(folder)
    if not (folder / CHECKPOINT).is_file():
        say("There is no checkpoint yet: the run starts again from its beginning.")
        if parallel.is_main():
            for log in folder.glob("events.out.tfevents.*"):
                log.unlink()
        return _from_the_start(plan, folder, config, say, progress)
    envs, held_out = make_environments(plan)
    model = PPO.load(folder / CHECKPOINT, env=envs, device=plan.ppo_kwargs["device"])
    say(f"Going on from the checkpoint at {model.num_timesteps:,} tokens.")
    seconds = continue_log(model, folder) if parallel.is_main() else 0.0
    return _to_the_end(plan, folder, model, held_out, say, progress, seconds)


def is_finished(folder: Path) -> bool:
    """Return whether a run has come to its regular end."""
    summary = folder / SUMMARY
    return summary.is_file() and not read_json(summary)["interrupted"]


def _is_free(folder: Path) -> bool:
    """Return True.

    Raises:
        ValueError: If the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"The run folder {folder} is a file or not empty: choose another, or go on with a run "
            "by --resume."
        )
    return True


def _from_the_start(
    plan: Plan, folder: Path, config: dict[str, Any], say: Say, progress: bool
) -> dict[str, Any]:
    envs, held_out = make_environments(plan)
    model = PPO("TransformerPolicy", envs, seed=plan.seed, **plan.ppo_kwargs)
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {**config, "resolved": _resolved(envs)})
    if plan.warm_start_kwargs["passes"]:
        say("Warm start: imitating the task's demonstrations ...")
    warm_start(model, progress=progress, seed=plan.seed, **plan.warm_start_kwargs)
    if parallel.is_main():  # The others wait for it in `learn`.
        say(f"Playing up to {plan.eval_examples} held-out examples ...")
        before = evaluate_split(model, held_out, plan.eval_examples)
        write_jsonl(folder / BEFORE, before.records())
        say(f"Mean held-out reward before: {show(before.summary(), plan.own_reward)}")
        model.set_logger(configure(str(folder), ["csv", "tensorboard"]))
    return _to_the_end(plan, folder, model, held_out, say, progress)


def _to_the_end(
    plan: Plan,
    folder: Path,
    model: PPO,
    held_out: gym.Env[Any, Any],
    say: Say,
    progress: bool,
    earlier_seconds: float = 0.0,
) -> dict[str, Any]:
    """Train up to the plan's total, evaluate, and write what a run leaves behind."""
    say(f"Training on {plan.timesteps:,} tokens ...")
    checkpoints = None
    if plan.checkpoint_freq:
        save_freq = math.ceil(plan.checkpoint_freq / (plan.num_envs * parallel.count()))
        name = Path(CHECKPOINT).stem
        checkpoints = CheckpointCallback(save_freq, str(folder), name, replace=True)
    interrupted, started = False, time.perf_counter()
    try:
        model.learn(
            max(0, plan.timesteps - model.num_timesteps),
            callback=checkpoints,
            reset_num_timesteps=False,
            progress_bar=progress,
        )
    except KeyboardInterrupt:
        interrupted = True
        say("Interrupted: writing what has been learned so far ...")
    if not parallel.is_main():
        return {}
    seconds = earlier_seconds + time.perf_counter() - started
    with atomic_path(folder / AGENT) as temporary:
        model.save(temporary)
    model.policy.save_pretrained(folder / MODEL)  # type: ignore[operator]
    evaluation = evaluate_split(model, held_out, plan.eval_examples)
    write_jsonl(folder / AFTER, evaluation.records())
    samples = read_jsonl(folder / BEFORE), evaluation.records()
    before, after = map(summarize, samples)
    say(f"Mean held-out reward after: {show(after, plan.own_reward)}")
    model.logger.close()
    plot_learning_curve(
        folder / PROGRESS,
        folder / CURVE,
        plan.env_id,
        {
            "held out, before": (0, before["mean_reward"], before["standard_error"]),
            "held out, after": (
                model.num_timesteps,
                after["mean_reward"],
                after["standard_error"],
            ),
        },
    )
    summary = {
        "env_id": plan.env_id,
        "seed": plan.seed,
        "timesteps": model.num_timesteps,
        "interrupted": interrupted,
        "processes": parallel.count(),
        "device": str(model.device),
        "before": before,
        "after": after,
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(model.num_timesteps / seconds, 1),
    }
    write_json(folder / SUMMARY, summary)
    if not interrupted:
        (folder / CHECKPOINT).unlink(missing_ok=True)  # the agent is the same
    return {**summary, "samples": samples}


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


def show(summary: dict[str, Any], success: bool = True) -> str:
    """Return an evaluation's mean with its standard error, as text.

    Args:
        summary: The evaluation's.
        success: Whether to tell the success rate, too. The task's success says little about a
            reward that is not the task's.
    """
    rate = summary["success_rate"] if success else None
    return (
        f"{summary['mean_reward']:.3f} ± {summary['standard_error']:.3f} "
        f"(n={summary['examples']})" + ("" if rate is None else f", success {rate:.0%}")
    )


def _resolved(envs: Any) -> dict[str, Any]:
    """Return what the environment settled by itself and an evaluation must repeat."""
    engine = engine_of(envs)
    return {
        "max_prompt_tokens": engine.max_prompt_tokens,
        "max_new_tokens": engine.max_new_tokens,
        "vocabulary": int(engine.action_space.n),
    }
