"""Several processes train one agent: two of them do together what one would do alone."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from accelerate.state import AcceleratorState, PartialState
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents import (
    GRPO,
    NLPO,
    PPO,
    CheckpointCallback,
    ExpertIteration,
    ReinforcePlusPlus,
    evaluate_split,
    parallel,
    warm_start,
)
from agents.cli.main import main
from agents.models import causal
from agents.models.loading import tiny_config
from agents.rollouts.buffer import Sequence
from tests.agents.agents import (
    ITERATION,
    NUM_ENVS,
    PLAIN_STEPS,
    EachStep,
    Update,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import gpt2
from tests.agents.training.test_imitation import Spell

ROOT = Path(__file__).parents[3]
RANKS = 2
# Nothing here waits so long, unless a rank waits for one that does something else.
BARRIER_TIMEOUT = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Run a function in processes launched as torchrun does, and return what each returned."""
    port, context = free_port(), get_context("fork")
    files = [folder / f"rank{rank}.pickle" for rank in range(RANKS)]
    processes: list[Any] = [
        context.Process(target=as_rank, args=(rank, port, file, function, args))
        for rank, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + BARRIER_TIMEOUT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [process.kill() for process in processes if process.is_alive()]
    assert not hanging, "the ranks wait for each other"
    results = [pickle.loads(file.read_bytes()) for file in files]
    for result in results:
        if isinstance(result, AssertionError):
            raise result
    return results


def as_rank(rank: int, port: int, file: Path, function: Callable[..., Any], args: Any) -> None:
    names: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank}
    names |= {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    th.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process before the fork
    try:
        result = function(*args)
    except BaseException:
        result = AssertionError(traceback.format_exc())
    file.write_bytes(pickle.dumps(result))


# Two ranks with half of a rollout each, and one process with all of it.

SETTLED: dict[str, Any] = {"kl_coef": 0.3, "kl_target": 0.01, "whiten_rewards": True}
GROUPS: dict[str, Any] = {
    "env": {"group_size": 2},
    "episodes_per_slot": 2,
    "batch_size": ITERATION,
    "micro_batch_size": 20,
    "max_grad_norm": 1e9,
}
CASES: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.02, "micro_batch_size": 8, "batch_size": ITERATION},
    "free": {"max_grad_norm": 1e9, "micro_batch_size": 20, "clip_range_vf": 0.2},
    "not whitened": {"normalize_advantage": False, "kl_in": "loss", "max_grad_norm": 1e9},
    "by sequence": {"micro_batch_size": 20, "max_grad_norm": 1e9},
    "by length": {"max_grad_norm": 1e9},
    "groups": {
        **GROUPS,
        "cls": GRPO,
        "recipe": "gspo",
        "scale": "batch",
        "clip_range": 0.05,
        "clip_range_high": 0.05,
    },
    "normalized": {**GROUPS, "cls": ReinforcePlusPlus, "baseline": "group"},
    "kept": {**GROUPS, "cls": ExpertIteration, "keep_best": 0, "threshold": -1e9},
    "masked": {"cls": NLPO, "top_mask": 0.6, "max_grad_norm": 1e9, "batch_size": ITERATION},
}
# What is another when the rollout is there.
CHANGES: dict[str, dict[str, Any]] = {
    "kept": {"keep_best": 1},
    "by sequence": {"aggregation": "sequence"},
    "by length": {"aggregation": "constant", "constant_length": 8},
}


def played(case: str) -> Any:
    """An agent with a rollout whose rewards are not settled yet; its reference is another model."""
    policy = {"model": gpt2(), **PLAIN_STEPS}
    model = make_agent(policy=policy, learning_rate=0.02, ent_coef=0.02, **CASES[case])
    collect(model)
    whiten = case not in ("groups", "normalized", "kept")  # which do not take it
    vars(model).update({**SETTLED, "whiten_rewards": whiten, **CHANGES.get(case, {})})
    model.set_reference()
    shake(model.reference)
    return model


def keep_half(model: Any, rank: int) -> None:
    """Leave a rank its half of the slots."""
    buffer, own = model.rollout_buffer, slice(rank * NUM_ENVS // 2, (rank + 1) * NUM_ENVS // 2)
    for name, array in vars(buffer).items():
        if isinstance(array, np.ndarray) and array.ndim == 2 and array.shape[1] == NUM_ENVS:
            setattr(buffer, name, array[:, own].copy())
    for name in ("last_values", "last_dones", "lengths", "first_episodes"):
        setattr(buffer, name, getattr(buffer, name)[own])
    buffer.n_envs = NUM_ENVS // 2
    buffer.sequences = [s for s in buffer.sequences if own.start <= s.env < own.stop]
    for sequence in buffer.sequences:
        sequence.env -= own.start
        sequence.group //= RANKS  # as a rank by itself counts those of its slots


def minibatch_of(sequence: Sequence) -> int:
    """Divide sequences so that the second rank has nothing in the third minibatch."""
    slot = sequence.env + parallel.rank() * NUM_ENVS // 2
    return {0: 0, 1: 1 + (sequence.segments[0].start > 0), 2: 0, 3: 1}[slot]


def settle_and_train(model: Any) -> dict[str, Any]:
    """Do everything that follows a rollout; two epochs, in one minibatch or in fixed ones."""
    buffer = model.rollout_buffer
    model.complete_rollout(buffer)
    buffer.drop_unfinished()  # so that no two slots have the same number of tokens
    shake(model.policy)
    if model.batch_size < ITERATION:
        split = [[s for s in buffer.sequences if minibatch_of(s) == i] for i in range(3)]
        buffer.minibatches = lambda *_: [batch for batch in split if batch]
    update = train(model)
    return {
        "update": update,
        "weights": weights(model.policy),
        "rewards": buffer.rewards,
        "kl_coef": model.kl_coef,
        "tokens": buffer.num_actions(),
    }


def halves(models: dict[str, Any]) -> dict[str, Any]:
    parallel.BUCKET = 5000  # so that there are several, of one tensor and of many
    for model in models.values():
        keep_half(model, parallel.rank())
    return {case: settle_and_train(model) for case, model in models.items()}


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks and what one process made of the same rollouts."""
    models = {case: played(case) for case in CASES}
    together = launch(halves, tmp_path_factory.mktemp("updates"), models)
    alone = {case: settle_and_train(model) for case, model in models.items()}
    return {case: (alone[case], [of_rank[case] for of_rank in together]) for case in CASES}


@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_make_the_update_of_one(updates: dict[str, Any], case: str) -> None:
    one, two = updates[case]
    ours: Update = one["update"]
    assert len({rank["tokens"] for rank in two}) == 2
    assert sum(rank["tokens"] for rank in two) == one["tokens"]
    assert np.abs(one["rewards"] - np.hstack([rank["rewards"] for rank in two])).max() < 1e-5
    norm = ours.log["train/grad_norm"]
    assert (norm > 2 * CASES[case]["max_grad_norm"]) == (case == "clipped")
    for rank in two:
        assert rank["kl_coef"] == pytest.approx(one["kl_coef"], 1e-6) != SETTLED["kl_coef"]
        theirs: Update = rank["update"]
        whole = case in ("clipped", "groups", "normalized", "masked", "kept")
        assert len(theirs.gradients) == (2 if whole else 6)
        assert ours.difference(theirs) < 1e-4
        for name, value in ours.log.items():
            if name.startswith(("train/", "kl/")):
                assert theirs.log[name] == pytest.approx(value, 1e-4, 1e-6), name
        moved = max(float((one["weights"][k] - v).abs().max()) for k, v in rank["weights"].items())
        assert moved < 1e-5
    assert same(two[0]["weights"], two[1]["weights"])


# Two ranks that learn.

KL: dict[str, Any] = {"kl_coef": 0.1, "kl_target": 2.0, "target_kl": 0.002}


def seeds(model: Any) -> list[int]:
    return list(model.env.unwrapped.env.np_random_seed)


def learned(folder: Path) -> dict[str, Any]:
    """Learn for two iterations of all ranks."""
    model = make_agent(**KL, learning_rate=0.02, policy=PLAIN_STEPS)
    first, sampling = weights(model.policy), [th.initial_seed()]
    model.set_logger(configure(str(folder / str(parallel.rank())), ["csv"]))
    progress: list[float] = []
    model.policy.optimizer.register_step_pre_hook(
        lambda *_: progress.append(model._current_progress_remaining)
    )
    model.learn(2 * RANKS * ITERATION, progress_bar=True)
    th.manual_seed(7)  # as a script may do
    other = make_agent(seed=None)
    sampling.append(th.initial_seed())
    other.learn(RANKS * ITERATION)
    other.set_random_seed(20)
    sampling.append(th.initial_seed())
    return {
        "first": first,
        "weights": weights(model.policy),
        "actions": model.rollout_buffer.actions,
        "unseeded actions": other.rollout_buffer.actions,
        "unseeded weights": weights(other.policy),
        "seeds": seeds(model),
        "sampling": sampling,
        "timesteps": model.num_timesteps,
        "progress": progress,
        "kl_coef": model.kl_coef,
        "updates": model._n_updates,
        "reference": weights(model.reference),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("learned")
    return launch(learned, folder, folder), folder


def test_ranks_stay_equal_and_play_differently(pair: Any) -> None:
    (first, second), _ = pair
    assert same(first["first"], second["first"])
    assert same(first["weights"], second["weights"])
    assert same(first["unseeded weights"], second["unseeded weights"])
    assert same(first["reference"], second["reference"])
    assert not same(first["first"], first["weights"])
    for kind in ("actions", "unseeded actions"):
        assert not np.array_equal(first[kind], second[kind])
    assert (first["sampling"], second["sampling"]) == ([0, 7, 20], [1, 8, 21])
    assert sorted(first["seeds"] + second["seeds"]) == list(range(RANKS * NUM_ENVS))
    # The first rank begins as one process does.
    assert same(first["first"], weights(make_agent().policy))


def test_ranks_count_and_stop_together(pair: Any) -> None:
    (first, second), _ = pair
    for name in ("timesteps", "kl_coef", "updates", "progress"):
        assert first[name] == second[name], name
    assert first["timesteps"] == 2 * RANKS * ITERATION
    assert first["progress"][0] == 1.0 and first["progress"][-1] == 0.5
    assert first["kl_coef"] != KL["kl_coef"]
    # target_kl has ended both updates before their last step.
    assert len(first["progress"]) < 2 * 2 * ITERATION // 32


def test_main_rank_logs_for_all(pair: Any) -> None:
    _, folder = pair
    with (folder / "0" / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["time/total_timesteps"]) for row in rows]
    assert steps == [RANKS * ITERATION, 2 * RANKS * ITERATION]
    assert (folder / "1" / "progress.csv").read_text() == ""


def ended() -> dict[Any, Any]:
    """End training in ways that only one rank knows of."""
    late = parallel.rank() == 1
    outcomes: dict[Any, Any] = {}
    for name, event in EVENTS.items():
        model = make_agent()
        try:
            model.learn(3 * RANKS * ITERATION, callback=OnStep(30, event) if late else None)
            outcomes[name] = "learned"
        except (Exception, KeyboardInterrupt) as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        outcomes[name] += f" {model.num_timesteps}"
        outcomes[name, "weights"] = weights(model.policy)
    with pytest.raises(ValueError, match=r"rank 1 has .*'n_epochs': 3"):
        make_agent(n_epochs=2 + late).learn(ITERATION)
    with pytest.raises(ValueError, match="expected one process for 'MlpPolicy', but "):
        PPO("MlpPolicy", "CartPole-v1")
    with pytest.raises(KeyboardInterrupt):  # outside of `learn` it is what it always is
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    return outcomes


def stop(model: Any) -> bool:
    return False


def diverge(model: Any) -> bool:
    raise ValueError("training has diverged")


def interrupt(model: Any) -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return True


EVENTS = {"stop": stop, "diverge": diverge, "interrupt": interrupt}


class OnStep(BaseCallback):
    """Lets something happen after so many steps."""

    def __init__(self, step: int, event: Callable[[Any], bool]) -> None:
        super().__init__()
        self.step, self.event = step, event

    def _on_step(self) -> bool:
        return self.n_calls != self.step or self.event(self.model)


def test_what_ends_one_rank_ends_all(tmp_path: Path) -> None:
    first, second = launch(ended, tmp_path)
    whole, part = 2 * RANKS * ITERATION, RANKS * ITERATION
    steps = part + NUM_ENVS * 24 + NUM_ENVS * 6  # one rank stopped in its second rollout
    assert first["stop"] == second["stop"] == f"learned {steps}"
    failure = "ended the training of all by ValueError: training has diverged"
    assert first["diverge"].startswith(f"RuntimeError: Rank 1 {failure}")
    assert second["diverge"].startswith("ValueError: training has diverged")
    assert first["interrupt"].startswith("KeyboardInterrupt")
    assert second["interrupt"].startswith("KeyboardInterrupt")
    for name in EVENTS:
        assert same(first[name, "weights"], second[name, "weights"])
    assert steps < whole


# Saving, and going on.


def state(model: Any) -> dict[str, Any]:
    return {
        "weights": weights(model.policy),
        "timesteps": model.num_timesteps,
        "kl_coef": model.kl_coef,
        "actions": model.rollout_buffer.actions,
        "returns": [float(info["r"]) for info in model.ep_info_buffer],
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Learn at a stretch, and with interruptions at a checkpoint and between two `learn`."""
    settings: dict[str, Any] = {"kl_coef": 0.1, "kl_target": 2.0}
    half = 2 * RANKS * ITERATION
    whole = make_agent(**settings).learn(2 * half)
    part = make_agent(**settings)
    # The callback of the main rank alone, as many do it.
    checkpoints = CheckpointCallback(24, str(folder / "checkpoints"), "agent")
    part.learn(half, callback=checkpoints if parallel.is_main() else None)
    part.save(folder / "agent")
    part.policy.save_pretrained(folder / "model")
    memory = io.BytesIO()
    part.save(memory)
    PartialState().wait_for_everyone()  # until the main one has written
    states = {"whole": state(whole)}
    files = {"after learn": "agent.zip", "checkpoint": f"checkpoints/agent_{half // 2}_steps.zip"}
    for name, file in files.items():
        env = make_agent().env.unwrapped.env
        loaded: Any = PPO.load(folder / file, env=env, device="cpu")
        loaded.learn(2 * half - loaded.num_timesteps, reset_num_timesteps=False)
        states[name] = state(loaded)
    started = make_agent(env={"task": Spell}, policy={"allowed_tokens": None})
    before = weights(started.policy)
    warm_start(started, passes=1, progress=False, cache=folder / f"cache{parallel.rank()}")
    assert not same(before, weights(started.policy))
    states["warm start"] = {"weights": weights(started.policy)}
    evaluate_split(started, gym.make("TextGen-v0", task=Spell, max_new_tokens=8), 2)
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("saved")
    return launch(resumed, folder, folder), folder


@pytest.mark.parametrize("saved_at", ["after learn", "checkpoint"])
def test_resumed_ranks_go_on_exactly(saved: Any, saved_at: str) -> None:
    for states in saved[0]:
        whole, loaded = dict(states["whole"]), dict(states[saved_at])
        assert same(whole.pop("weights"), loaded.pop("weights"))
        assert np.array_equal(whole.pop("actions"), loaded.pop("actions"))
        assert whole == loaded
    first, second = (states["whole"]["returns"] for states in saved[0])
    assert first != second


def test_main_rank_writes(saved: Any) -> None:
    _, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {"agent.zip", "model", "checkpoints", "cache0"} <= names
    assert "cache1" not in names and not [name for name in names if name.startswith(".")]
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_main_rank_fits_for_all(saved: Any, tmp_path: Path) -> None:
    first, second = (states["warm start"]["weights"] for states in saved[0])
    assert same(first, second)
    alone = make_agent(env={"task": Spell}, policy={"allowed_tokens": None})
    warm_start(alone, passes=1, progress=False, cache=tmp_path)
    assert same(first, weights(alone.policy))


def test_another_number_of_processes_starts_new_episodes(saved: Any) -> None:
    loaded: Any = PPO.load(saved[1] / "agent", env=make_agent().env.unwrapped.env, device="cpu")
    assert loaded.num_timesteps == 2 * RANKS * ITERATION
    with pytest.warns(UserWarning, match="2 processes saved it, and 1 go on"):
        loaded.learn(ITERATION, reset_num_timesteps=False)


def test_one_process_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(parallel, "_state", None)  # It is not even asked for.
    model = make_agent(**KL, whiten_rewards=True)
    handlers = []
    model.learn(ITERATION, callback=EachStep(lambda _: handlers.append(signal.getsignal(2))))
    assert not th.distributed.is_initialized()
    assert set(handlers) == {signal.default_int_handler}
    assert (parallel.count(), parallel.rank(), parallel.is_main()) == (1, 0, True)


# The command line under torchrun.

QUICK = "--num-envs 4 --n-steps 8 --batch-size 16 --timesteps 256 --warm-start 0 --eval-examples 4"
QUICK += " --max-new-tokens 8 --device cpu --no-progress --checkpoint-freq 64 --kl-target 3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run folder and what torchrun did to make it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    torchrun += ["--master-port", str(free_port()), "-m", "agents.cli"]
    place = tmp_path_factory.mktemp("torchrun")
    done = subprocess.run(
        [*torchrun, "train", "TextGen-v0", *QUICK.split()],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (place / "runs" / "TextGen-v0").iterdir()
    return folder, done


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_torchrun_leaves_one_run_folder(run: tuple[Path, Any]) -> None:
    folder, done = run
    assert done.stdout.count("Run folder: ") == 1
    assert "destroy_process_group" not in done.stderr
    names = {path.name for path in folder.iterdir()}
    assert {"agent.zip", "model", "summary.json", "learning_curve.png"} <= names
    assert "checkpoint.zip" not in names and not [name for name in names if name[0] == "."]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["timesteps"], summary["processes"]) == (256, RANKS)
    assert [row["time/total_timesteps"] for row in log(folder)] == ["64", "128", "192", "256"]


def command_line(stop_after: int, *arguments: str) -> int | str | None:
    """Run the command line; a stop is one of the process, after so many updates."""
    causal.tiny_config = tiny_config  # as torchrun's, which knows nothing of tests
    original = PPO.train

    def train_or_stop(self: PPO) -> None:
        original(self)
        if self.rollouts_learned == stop_after:
            raise SystemExit("stopped")

    PPO.train = train_or_stop  # type: ignore[method-assign]
    try:
        main([*arguments])
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.slow
def test_resumed_run_is_the_whole_one(run: tuple[Path, Any], tmp_path: Path) -> None:
    whole, resumed = run[0], tmp_path / "run"
    train = ["train", "TextGen-v0", *QUICK.split(), "--run-dir"]
    assert launch(command_line, tmp_path, 0, *train, str(whole)) == [2, 2]  # It is not empty.
    assert launch(command_line, tmp_path, 3, *train, str(resumed)) == ["stopped", "stopped"]
    assert (resumed / "checkpoint.zip").is_file() and not (resumed / "agent.zip").exists()
    assert launch(command_line, tmp_path, 0, "train", "--resume", str(resumed)) == [None, None]
    for name in ("model/model.safetensors", "samples_after.jsonl"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    figures = [
        [{k: v for k, v in row.items() if k[:5] != "time/"} for row in log(folder)]
        for folder in (whole, resumed)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 4
