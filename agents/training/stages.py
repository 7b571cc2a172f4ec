"""What a run does, from its start or its last checkpoint to its end."""

from __future__ import annotations

import math
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from agents import parallel
from agents.files import (
    atomic_path,
    read_json,
    read_jsonl,
    remove_leftovers,
    write_json,
    write_jsonl,
)
from agents.models.loading import check_device
from agents.policies.export import write_card
from agents.rollouts.traces import TraceCallback, drop_traces
from agents.rollouts.vec_env import engine_of
from agents.training.checkpoints import CheckpointCallback
from agents.training.checks import check_rewards
from agents.training.evaluation import reward_text, summarize
from agents.training.folder import (
    AFTER,
    AGENT,
    BEFORE,
    BEST,
    CHECKPOINT,
    CONFIG,
    EVENTS,
    MODEL,
    PROGRESS,
    SAMPLES,
    SUMMARY,
    TRACES,
)
from agents.training.held_out import HeldOut, HeldOutCallback
from agents.training.imitation import default_passes, warm_start
from agents.training.logs import CallingOutput, OnLog, continue_log, open_log, read_metrics
from agents.training.spec import RunSpec
from agents.training.trackers import TrackerOutput, load_trackers
from textenvs.envs.engine import TextEngine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Listener:
    """Whom a run tells how it goes.

    Args:
        say: Called with lines for the user.
        on_log: Called with each row of the log.
        progress: Whether to show progress bars.
    """

    say: Say = lambda line: None
    on_log: OnLog = lambda row: None
    progress: bool = False


def start(spec: RunSpec, folder: Path, listener: Listener) -> None:
    """Train a new agent.

    An interrupt (Ctrl-C) ends the training early and is otherwise harmless: everything is
    written as at the regular end, and the summary says `interrupted`.

    With several ranks the main one evaluates and writes.

    Args:
        spec: What to do.
        folder: The run's.
        listener: Whom to tell.
    """
    say = listener.say
    check_device(spec.device, spec.spell("device"))
    load_trackers(spec.report_to)
    envs, held_out = make_environments(spec)
    check_rewards(envs, held_out)
    model = spec.algorithm("TransformerPolicy", envs, **spec.algorithm_kwargs())
    passes = default_passes(model) if spec.warm_start is None else spec.warm_start
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        own = {**spec.to_config(), "resolved": {**_resolved(envs), "warm_start": passes}}
        write_json(folder / CONFIG, {"run_id": uuid.uuid4().hex[:8], **config, **own})
    if passes:
        times = "once" if passes == 1 else f"{passes} times"
        say(f"Warm start: imitating the demonstration of each example {times} ...")
    warm_start(model, progress=listener.progress, **{**spec.warm_start_kwargs(), "passes": passes})
    evaluations = HeldOut(model, held_out, folder, spec.eval_examples)
    if parallel.is_main():  # The others wait for it in `learn`.
        say(f"Playing up to {spec.eval_examples} held-out examples ...")
        before = evaluations.play()
        write_jsonl(folder / BEFORE, before.records())
        say(f"Mean held-out reward before: {reward_text(before.summary(), spec.own_reward)}")
        open_log(model, folder, *_outputs(spec, folder, listener))
        if spec.eval_freq:
            evaluations.add(before)
    _to_the_end(spec, evaluations, listener)


def resume(spec: RunSpec, folder: Path, listener: Listener) -> None:
    """Go on with a killed or interrupted run from its last checkpoint; see `start`.

    The result is that of the uninterrupted run. Without a checkpoint the run starts again, warm
    start included.
    """
    if parallel.is_main():
        remove_leftovers(folder)
    say = listener.say
    if not (folder / CHECKPOINT).is_file():
        say("There is no checkpoint yet: the run starts again from its beginning.")
        if parallel.is_main():
            for log in (*folder.glob(EVENTS), *(folder / n for n in (TRACES, SAMPLES, PROGRESS))):
                log.unlink(missing_ok=True)
        start(spec, folder, listener)
        return
    check_device(spec.device, spec.spell("device"))
    load_trackers(spec.report_to)
    envs, held_out = make_environments(spec)
    check_rewards(envs, held_out)
    model = spec.algorithm.load(folder / CHECKPOINT, env=envs, device=spec.device)
    say(f"Going on from the checkpoint at {model.num_timesteps:,} tokens.")
    seconds = 0.0
    if parallel.is_main():
        seconds = continue_log(model, folder, *_outputs(spec, folder, listener))
        for name in (TRACES, SAMPLES):
            drop_traces(folder / name, model.num_timesteps)
    evaluations = HeldOut(model, held_out, folder, spec.eval_examples)
    _to_the_end(spec, evaluations, listener, seconds)


@contextmanager
def no_leftovers(folder: Path) -> Iterator[None]:
    """Remove what a run has written that fails before its first rollout is learned from.

    It can then be tried again in the same folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        kept = any((folder / name).is_file() for name in (AGENT, CHECKPOINT))
        if parallel.is_main() and not kept and not read_metrics(folder / PROGRESS):
            for path in folder.iterdir() if folder.is_dir() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in made:
                with suppress(OSError):  # Somebody else has written there meanwhile.
                    path.rmdir()
        raise


def make_environments(spec: RunSpec) -> tuple[Any, gym.Env[Any, Any]]:
    """Return the vector environment to train on and the held-out one, of the same budgets.

    Where no prompt budget is given, it is made for the longest prompt of both. Labels are those of
    what is trained on.
    """

    def make_both(**same: Any) -> tuple[Any, Any]:
        own, held_out = ({**spec.env_kwargs(held_out=which), **same} for which in (False, True))
        return gym.make_vec(spec.env_id, spec.num_envs, **own), gym.make(spec.env_id, **held_out)

    envs, held_out = make_both()
    engines = [engine_of(env) for env in (envs, held_out)]
    same: dict[str, Any] = {}
    choices = engines[0].task.choices
    if choices and choices != engines[1].task.choices:
        same["choices"] = tuple(choices)
        envs, held_out = make_both(**same)
        engines = [engine_of(env) for env in (envs, held_out)]
    longest = [engine.max_prompt_tokens for engine in engines]
    if longest[0] != longest[1]:
        envs, held_out = make_both(**same, max_prompt_tokens=max(longest))
    _tell_of_splits(spec, *engines)
    return envs, held_out


def _tell_of_splits(spec: RunSpec, trained: TextEngine, held_out: TextEngine) -> None:
    """Warn of a task that holds nothing out."""
    if spec.dataset is not None:
        return
    known = set(map(repr, trained.examples))
    if all(repr(example) in known for example in held_out.examples):
        warnings.warn(
            f"{spec.env_id} trains on all {len(held_out.examples)} examples that it holds out: the "
            "held-out reward shows what was learned by heart. Let Task.examples(split) return "
            "others for each split (textenvs.split_examples does), or give held-out data of their "
            "own (dataset=, eval_dataset=).",
            stacklevel=2,
        )


def _to_the_end(
    spec: RunSpec, held_out: HeldOut, listener: Listener, earlier_seconds: float = 0.0
) -> None:
    """Train up to the specified total, evaluate, and write what a run leaves behind."""
    model, folder, say = held_out.model, held_out.folder, listener.say
    say(f"Training on {spec.timesteps:,} tokens ...")
    interrupted, started = False, time.perf_counter()
    try:
        model.learn(
            max(0, spec.timesteps - model.num_timesteps),
            callback=_callbacks(spec, held_out),
            log_interval=1,  # SB3's A2C has 100
            reset_num_timesteps=False,
            progress_bar=listener.progress,
        )
    except KeyboardInterrupt:
        interrupted = True
        say("Interrupted: writing what has been learned so far ...")
    if not parallel.is_main():
        return
    seconds = earlier_seconds + time.perf_counter() - started
    stuck = held_out.is_stuck(spec.patience)
    if stuck:
        say(f"Stopped early: {spec.patience} evaluations in a row were no better than the best.")
    with atomic_path(folder / AGENT) as temporary:
        model.save(temporary)
    model.policy.save_pretrained(folder / MODEL)
    evaluation = held_out.play()
    ended = not interrupted and not stuck  # and not with an evaluation of these very weights
    if spec.eval_freq and ended and held_out.history[-1][0] < model.num_timesteps:
        held_out.add(evaluation)
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
    if held_out.best is not None:
        steps, reward = held_out.best
        summary["best"] = {"timesteps": steps, "mean_reward": reward, "model": BEST}
        summary["stopped_early"] = stuck
    write_json(folder / SUMMARY, summary)
    if not interrupted:
        (folder / CHECKPOINT).unlink(missing_ok=True)  # the agent is the same


def _outputs(spec: RunSpec, folder: Path, listener: Listener) -> tuple[bool, list[KVWriter]]:
    """Return whether TensorBoard's log is written, and where else rows of the log go."""
    config = read_json(folder / CONFIG)
    trackers = [TrackerOutput(each, folder, config) for each in load_trackers(spec.report_to)]
    return "tensorboard" in spec.report_to, [*trackers, CallingOutput(listener.on_log)]


def _callbacks(spec: RunSpec, held_out: HeldOut) -> list[BaseCallback]:
    """Return what runs along with the training; a checkpoint comes behind an evaluation."""
    callbacks: list[BaseCallback] = []
    folder = held_out.folder
    if spec.eval_freq:
        callbacks.append(HeldOutCallback(held_out, spec.eval_freq, spec.patience))
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
        "choices": None if engine.task.choices is None else list(engine.task.choices),
    }
