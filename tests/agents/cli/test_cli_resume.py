"""`textenvs train --resume`: a run that was killed ends as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch as th

from agents import PPO, Run, RunSpec
from agents.cli.main import main

SMALL = ["--num-envs", "8", "--n-steps", "16", "--timesteps", "640", "--batch-size", "64"]
QUICK = [*SMALL, "--warm-start", "0", "--eval-examples", "6", "--no-progress", "--device", "cpu"]
# The same in Python.
SPEC = RunSpec(
    "TextGen-v0",
    num_envs=8,
    n_steps=16,
    timesteps=640,
    batch_size=64,
    warm_start=0,
    eval_examples=6,
    device="cpu",
    checkpoint_freq=256,
    kl_target=3,
    target_kl=float("inf"),
    eval_freq=256,
)
OFTEN = [*QUICK, "--checkpoint-freq", "256", "--kl-target", "3", "--eval-freq", "256"]
OFTEN += ["--target-kl", "inf"]


def log(folder: Path) -> list[dict[str, str]]:
    """The rows of progress.csv without what the machine decides."""
    with (folder / "progress.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = "time/total_timesteps"
    return [{k: v for k, v in row.items() if k == kept or k[:5] != "time/"} for row in rows]


def files(folder: Path) -> set[str]:
    """The names in a folder; of TensorBoard's files, each part of a run leaves one."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in names if not name.startswith("events.out.tfevents")}


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert files(ours) == files(theirs)
    for model in ("model", "best_model"):
        weights = f"{model}/model.safetensors"
        assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert log(ours) == log(theirs)
    assert (ours / "traces.jsonl").read_text().count("\n") == 5 * 4
    for name in (
        "samples_before.jsonl",
        "samples_after.jsonl",
        "traces.jsonl",
        "samples.jsonl",
        "model/config.json",
    ):
        assert (ours / name).read_text() == (theirs / name).read_text()
    summaries = []
    for folder in (ours, theirs):
        summary = json.loads((folder / "summary.json").read_text())
        assert summary.pop("training_seconds") >= 0 and summary.pop("tokens_per_second") > 0
        summaries.append(summary)
    assert summaries[0] == summaries[1] and summaries[0]["timesteps"] == 640
    agents = [PPO.load(folder / "agent", device="cpu") for folder in (ours, theirs)]
    optimizers = [agent.policy.optimizer.state_dict()["state"] for agent in agents]
    for i, own in optimizers[0].items():
        assert all(th.equal(own[name], optimizers[1][i][name]) for name in own)
    assert agents[0].kl_coef == agents[1].kl_coef


def train(folder: Path, *extra: str) -> None:
    main(["train", "TextGen-v0", *OFTEN, "--run-dir", str(folder), *extra])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    assert not (folder / "checkpoint.zip").exists()
    return folder


def train_until_killed(folder: Path, updates: int, half_row: bool) -> None:
    original = PPO.train

    def killed(self: PPO) -> None:
        original(self)
        if self._n_updates >= updates * self.n_epochs:
            if half_row:
                for name, half in (("progress.csv", "1,2"), ("traces.jsonl", '{"num_times')):
                    with (folder / name).open("a") as file:
                        file.write(half)
            os.kill(os.getpid(), signal.SIGKILL)

    PPO.train = killed  # type: ignore[method-assign]
    train(folder)


def run_until_killed(folder: Path, updates: int, half_row: bool = False) -> None:
    process = get_context("fork").Process(
        target=train_until_killed, args=(folder, updates, half_row)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run_until_killed(folder, updates=4, half_row=True)
    assert (folder / "checkpoint.zip").is_file() and not (folder / "summary.json").exists()
    # Of 4 rollouts, 2 evaluations and a row that is cut off, 3 are younger than the checkpoint.
    assert len(log(folder)) == 7
    (folder / ".checkpoint.123.tmp.zip").write_bytes(b"half")
    main(["train", "--resume", str(folder)])
    assert "Going on from the checkpoint at 256 tokens" in capsys.readouterr().out
    assert_same_run(folder, whole)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(["train", "--resume", str(folder)])
    assert "finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_killed_before_the_first_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run_until_killed(folder, updates=1)
    main(["train", "--resume", str(folder)])
    assert "starts again from its beginning" in capsys.readouterr().out
    assert_same_run(folder, whole)


def test_interrupted_twice(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    original = PPO.train

    def interrupted(self: PPO) -> None:
        original(self)
        if self.num_timesteps >= stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(PPO, "train", interrupted)
    stop = 384
    train(folder)
    assert json.loads((folder / "summary.json").read_text())["interrupted"] is True
    stop = 512
    main(["train", "--resume", str(folder), "--checkpoint-freq", "128"])
    assert json.loads((folder / "summary.json").read_text())["timesteps"] == 512
    monkeypatch.undo()
    main(["train", "--resume", str(folder), "--no-progress"])
    assert_same_run(folder, whole)


def test_killed_after_training(whole: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def say(line: str) -> None:
        if line.startswith("Mean held-out reward after"):
            raise Stop

    folder = tmp_path / "run"
    with pytest.raises(Stop):
        Run.create(SPEC, folder).train(say)
    assert not (folder / "summary.json").exists()
    main(["train", "--resume", str(folder), "--no-progress"])
    assert_same_run(folder, whole)


def test_killed_before_the_learning_curve(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    copytree(whole, folder)
    (folder / "learning_curve.png").unlink()
    main(["train", "--resume", str(folder)])
    assert "finished: nothing to do" in capsys.readouterr().out
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "5"], "own options, seed=0, but was given seed=5"),
        (["--timesteps", "9", "--model", "x"], "was given timesteps=9, model='x'"),
        (["--run-dir", "elsewhere"], "elsewhere"),
        (["Dialogue-v0"], "env='TextGen-v0', but was given env='Dialogue-v0'"),
    ],
)
def test_other_options_are_refused(
    arguments: list[str], message: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--resume", str(whole), *arguments])
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and message in error and "may change" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "/no/run"], "/no/run is no run folder"),
        ([], "needs an environment"),
        (["TextGen-v0", "--checkpoint-freq", "-1"], "--checkpoint-freq must be at least 0"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.fixture(autouse=True)
def same_path() -> Any:
    """Whatever `main` puts in front of the module path goes again."""
    before = list(sys.path)
    yield
    sys.path[:] = before
