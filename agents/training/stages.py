"""What a run does, from its start or its last checkpoint to its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents import parallel
from agents.files import (
    atomic_path,
    read_json,
    read_jsonl,
    remove_leftovers,
    write_json,
    write_jsonl,
)
from agents.policies.export import write_card
from agents.rollouts.traces import TraceCallback, drop_traces
from agents.rollouts.vec_env import engine_of
from agents.training.checkpoints import CheckpointCallback
from agents.training.evaluation import evaluate_split, reward_text, summarize
from agents.training.folder import (
    AFTER,
    AGENT,
    BEFORE,
    CHECKPOINT,
    CONFIG,
    EVENTS,
    MODEL,
    SUMMARY,
    TRACES,
)
from agents.training.imitation import warm_start
from agents.training.logs import continue_log
from agents.training.spec import RunSpec

Say = Callable[[str], None]


def start(spec: RunSpec, folder: Path, say: Say, progress: bool) -> None:
    """Train a new agent.

    An interrupt (Ctrl-C) ends the training early and is otherwise harmless: everything is
    written as at the regular end, and the summary says `interrupted`.

    With several ranks the main one evaluates and writes.

    Args:
        spec: What to do.
        folder: The run's.
        say: Called with lines for the user.
        progress: Whether to show progress bars.
    """
    envs, held_out = make_environments(spec)
    model = spec.algorithm("TransformerPolicy", envs, **spec.algorithm_kwargs())
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        own = {**spec.to_config(), "resolved": _resolved(envs)}
        write_json(folder / CONFIG, {**config, **own})
    if spec.warm_start:
        say("Warm start: imitating the task's demonstrations ...")
    warm_start(model, progress=progress, **spec.warm_start_kwargs())
    if parallel.is_main():  # The others wait for it in `learn`.
        say(f"Playing up to {spec.eval_examples} held-out examples ...")
        before = evaluate_split(model, held_out, spec.eval_examples)
        write_jsonl(folder / BEFORE, before.records())
        say(f"Mean held-out reward before: {reward_text(before.summary(), spec.own_reward)}")
        model.set_logger(configure(str(folder), ["csv", "tensorboard"]))
    _to_the_end(spec, folder, model, held_out, say, progress)


def resume(spec: RunSpec, folder: Path, say: Say, progress: bool) -> None:
    """Go on with a killed or interrupted run from its last checkpoint; see `start`.

    The result is that of the uninterrupted run. Without a checkpoint the run starts again, warm
    start included.
    """
    if parallel.is_main():
        remove_leftovers(folder)
    if not (folder / CHECKPOINT).is_file():
        say("There is no checkpoint yet: the run starts again from its beginning.")
        if parallel.is_main():
            for log in (*folder.glob(EVENTS), folder / TRACES):
                log.unlink(missing_ok=True)
        start(spec, folder, say, progress)
        return
    envs, held_out = make_environments(spec)
    model = spec.algorithm.load(folder / CHECKPOINT, env=envs, device=spec.device)
    say(f"Going on from the checkpoint at {model.num_timesteps:,} tokens.")
    seconds = 0.0
    if parallel.is_main():
        seconds = continue_log(model, folder)
        drop_traces(folder / TRACES, model.num_timesteps)
    _to_the_end(spec, folder, model, held_out, say, progress, seconds)


def make_environments(spec: RunSpec) -> tuple[Any, gym.Env[Any, Any]]:
    """Return the vector environment to train on and the held-out one, of the same budgets.

    Where no prompt budget is given, it is made for the longest prompt of both.
    """

    def make_both(**budgets: int) -> tuple[Any, Any]:
        own, held_out = ({**spec.env_kwargs(held_out=which), **budgets} for which in (False, True))
        return gym.make_vec(spec.env_id, spec.num_envs, **own), gym.make(spec.env_id, **held_out)

    envs, held_out = make_both()
    longest = [engine_of(env).max_prompt_tokens for env in (envs, held_out)]
    if longest[0] != longest[1]:
        envs, held_out = make_both(max_prompt_tokens=max(longest))
    return envs, held_out


def _to_the_end(
    spec: RunSpec,
    folder: Path,
    model: Any,
    held_out: gym.Env[Any, Any],
    say: Say,
    progress: bool,
    earlier_seconds: float = 0.0,
) -> None:
    """Train up to the specified total, evaluate, and write what a run leaves behind."""
    say(f"Training on {spec.timesteps:,} tokens ...")
    interrupted, started = False, time.perf_counter()
    try:
        model.learn(
            max(0, spec.timesteps - model.num_timesteps),
            callback=_callbacks(spec, folder),
            reset_num_timesteps=False,
            progress_bar=progress,
        )
    except KeyboardInterrupt:
        interrupted = True
        say("Interrupted: writing what has been learned so far ...")
    if not parallel.is_main():
        return
    seconds = earlier_seconds + time.perf_counter() - started
    with atomic_path(folder / AGENT) as temporary:
        model.save(temporary)
    model.policy.save_pretrained(folder / MODEL)
    evaluation = evaluate_split(model, held_out, spec.eval_examples)
    write_jsonl(folder / AFTER, evaluation.records())
    before, after = summarize(read_jsonl(folder / BEFORE)), evaluation.summary()
    say(f"Mean held-out reward after: {reward_text(after, spec.own_reward)}")
    results = {"held-out reward before": reward_text(before, spec.own_reward)}
    results["held-out reward after"] = reward_text(after, spec.own_reward)
    write_card(model.policy, folder / MODEL, results)
    model.logger.close()
    summary = {
        "env_id": spec.env_id,
        "seed": spec.seed,
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


def _callbacks(spec: RunSpec, folder: Path) -> list[BaseCallback]:
    """Return what runs along with the training."""
    callbacks: list[BaseCallback] = []
    if spec.checkpoint_freq:
        save_freq = math.ceil(spec.checkpoint_freq / (spec.num_envs * parallel.count()))
        name = Path(CHECKPOINT).stem
        callbacks.append(CheckpointCallback(save_freq, str(folder), name, replace=True))
    if spec.trace_episodes and parallel.is_main():
        callbacks.append(TraceCallback(folder / TRACES, spec.trace_episodes))
    return callbacks


def _resolved(envs: Any) -> dict[str, Any]:
    """Return what the environment settled by itself and an evaluation must repeat."""
    engine = engine_of(envs)
    return {
        "max_prompt_tokens": engine.max_prompt_tokens,
        "max_new_tokens": engine.max_new_tokens,
        "vocabulary": int(engine.action_space.n),
    }
