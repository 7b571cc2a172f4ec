"""Held-out examples while a run trains: the curve, samples, the best model, early stop."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from agents import Run, RunSpec, evaluate_model
from agents.reports.curves import plot_learning_curve
from agents.training.evaluation import Evaluation
from agents.training.held_out import HeldOut
from textenvs import Example, Transcript, Turn
from textenvs.envs.playing import Episode

SPEC = RunSpec(
    "TextGen-v0",
    timesteps=320,
    num_envs=4,
    n_steps=16,
    batch_size=32,
    max_new_tokens=6,
    warm_start=0,
    eval_examples=6,
    seed=3,
    device="cpu",
    eval_freq=128,
    checkpoint_freq=0,
    trace_episodes=0,
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What the run below tells while it trains."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Run:
    run = Run.create(SPEC, tmp_path_factory.mktemp("runs") / "run")
    run.train(on_log=rows.append)
    return run


def weights(run: Run) -> bytes:
    return (run.folder / "model" / "model.safetensors").read_bytes()


def curve(run: Run) -> list[tuple[int, float]]:
    rows = run.metrics()
    return [
        (row["time/total_timesteps"], row["eval/mean_reward"])
        for row in rows
        if row["eval/mean_reward"] is not None
    ]


def test_curve(run: Run, rows: list[dict[str, Any]]) -> None:
    summary = run.summary()
    assert [step for step, _ in curve(run)] == [0, 128, 256, 320]
    assert curve(run)[0][1] == summary["before"]["mean_reward"]
    assert curve(run)[-1][1] == summary["after"]["mean_reward"]
    rollouts = [row for row in run.metrics() if row["rollout/ep_rew_mean"] is not None]
    assert [row["time/total_timesteps"] for row in rollouts] == [64, 128, 192, 256, 320]
    told = [row for row in rows if "eval/mean_reward" in row]
    assert [(row["time/total_timesteps"], row["eval/mean_reward"]) for row in told] == curve(run)
    assert len(rows) == len(run.metrics()) and not [
        k for row in rows for k in row if "samples" in k
    ]
    assert plot_learning_curve(run) is not None


def test_evaluating_changes_nothing(run: Run, tmp_path: Path) -> None:
    without = Run.create(replace(SPEC, eval_freq=0), tmp_path / "run")
    without.train()
    assert weights(without) == weights(run)
    rollouts = [row for row in run.metrics() if row["eval/mean_reward"] is None]
    for own, row in zip(rollouts, without.metrics(), strict=True):
        assert repr({name: own[name] for name in row if name[:5] != "time/"}) == repr(
            {name: value for name, value in row.items() if name[:5] != "time/"}
        )
    assert not (without.folder / "best_model").exists() and "best" not in without.summary()


def test_samples_over_time(run: Run) -> None:
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").open()]
    assert [sample["num_timesteps"] for sample in samples] == [0] * 4 + [128] * 4 + [256] * 4 + [
        320
    ] * 4
    assert [s["example"] for s in samples[:4]] == [s["example"] for s in samples[4:8]]
    after = {each["example"]: each for each in run.transcripts("after")}
    for sample in samples[-4:]:
        assert sample == {"num_timesteps": 320, **after[sample["example"]]}
    events = b"".join(path.read_bytes() for path in run.folder.glob("events.out.tfevents.*"))
    assert b"samples/3" in events and samples[4]["turns"][0]["text"].encode() in events


def test_best_model(run: Run) -> None:
    best = run.summary()["best"]
    assert (best["timesteps"], best["mean_reward"]) == max(curve(run), key=lambda point: point[1])
    AutoModelForCausalLM.from_pretrained(run.folder / best["model"])
    options: dict[str, Any] = {"max_examples": 6, "max_new_tokens": 6, "device": "cpu"}
    played = evaluate_model(run.folder / best["model"], "TextGen-v0", **options)
    assert played.mean == pytest.approx(best["mean_reward"])


def episode(reward: float) -> Episode:
    transcript = Transcript(Example("Go on:"), (Turn("user", "Go on:"), Turn("agent", "yes")))
    return Episode(0, transcript=transcript, reward=reward)


def test_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = iter([0.5, 0.7, 0.6, 0.7, 0.2])
    monkeypatch.setattr(HeldOut, "play", lambda self: Evaluation([episode(next(rewards))]))
    stopped = Run.create(replace(SPEC, eval_freq=64, patience=2), tmp_path / "run")
    lines: list[str] = []
    summary = stopped.train(lines.append)
    # The best was at 64; 128 and 192 were no better, and one step of each slot comes after.
    assert summary["stopped_early"] and summary["timesteps"] == 192 + 4 and stopped.is_finished
    assert summary["best"]["timesteps"] == 64 and [step for step, _ in curve(stopped)][-1] == 192
    assert [line for line in lines if line.startswith("Stopped early: 2 evaluations in a row")]


def test_patience_needs_evaluations() -> None:
    with pytest.raises(ValueError, match=r"^patience needs eval_freq"):
        replace(SPEC, eval_freq=0, patience=2)
    with pytest.raises(ValueError, match=r"^patience must be at least 1"):
        replace(SPEC, patience=0)


class FakeTracker(ModuleType):
    """What wandb and trackio have in common."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.began: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **kwargs: Any) -> None:
        self.began.append(kwargs)

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished += 1


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = [FakeTracker(name) for name in ("wandb", "trackio")]
    for tracker in trackers:
        monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    spec = replace(SPEC, timesteps=64, report_to=("wandb", "trackio"))
    run = Run.create(spec, tmp_path / "run")
    run.train()
    assert not list(run.folder.glob("events.out.tfevents.*"))  # TensorBoard was not named
    for tracker in trackers:
        (began,) = tracker.began
        assert began["config"]["env"] == "TextGen-v0" and began["name"].startswith("run-")
        assert began["resume"] == "allow" and tracker.finished == 1
        assert [step for step, _ in tracker.rows] == [0, 64, 64]
        assert tracker.rows[1][1]["rollout/ep_rew_mean"] == run.metrics()[1]["rollout/ep_rew_mean"]
        assert all(type(value) is float for _, row in tracker.rows for value in row.values())
    wandb, trackio = (tracker.began[0] for tracker in trackers)
    assert (wandb["project"], trackio["project"]) == ("textenvs", "mine")
    assert wandb["id"] == wandb["name"] and wandb["dir"] == str(run.folder) and "id" not in trackio


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tracker_that_is_not_installed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    report_to: Any = (name,)
    run = Run.create(replace(SPEC, report_to=report_to), tmp_path / "run")
    with pytest.raises(ImportError, match=rf"pip install 'textenvs\[{name}\]'"):
        run.train()
    assert not run.folder.exists()
    with pytest.raises(ValueError, match=r"report_to must be one of tensorboard, wandb, trackio"):
        replace(SPEC, report_to=("wandbb",))  # type: ignore[arg-type]
