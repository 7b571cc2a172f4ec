from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from agents import Run, RunSpec

SPEC = RunSpec(
    "TextGen-v0",
    timesteps=256,
    num_envs=8,
    n_steps=16,
    batch_size=64,
    max_new_tokens=8,
    warm_start=0,
    eval_examples=6,
    seed=3,
    device="cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.create(SPEC, tmp_path_factory.mktemp("runs") / "run")
    run.train()
    return run


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_creating_writes_nothing(tmp_path: Path) -> None:
    run = Run.create(SPEC, tmp_path / "run")
    assert run.spec is SPEC and not list(tmp_path.iterdir()) and not run.is_finished
    with pytest.raises(ValueError, match="Did you mean 'TextGen-v0'"):
        Run.create(replace(SPEC, env="TextGen-v1"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="choose another"):
        Run.create(SPEC, tmp_path)
    with pytest.raises(ValueError, match="choose another"):
        Run.create(SPEC, tmp_path / "notes.txt")
    # Whoever is first has it.
    other = Run.create(SPEC, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="choose another"):
        other.train()


def test_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Run.create(SPEC).folder
    assert folder.parent == Path("runs/TextGen-v0") and len(folder.name) == 15


def test_opened_run_is_the_run(run: Run) -> None:
    opened = Run.open(str(run.folder))
    assert (opened.spec, opened.folder) == (run.spec, run.folder)
    assert opened.is_finished and opened.summary() == run.summary()
    before = times(run.folder)
    assert opened.train() == run.train() == run.summary()  # It is finished.
    opened.metrics(), opened.transcripts("after"), opened.evaluate(max_examples=2, device="cpu")
    assert times(run.folder) == before


def test_files(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    names -= {name for name in names if name.startswith("events.out.tfevents")}
    assert names == {
        *("config.json", "progress.csv", "summary.json", "agent.zip", "model"),
        *("samples_before.jsonl", "samples_after.jsonl", "traces.jsonl"),
    }


def test_metrics(run: Run) -> None:
    metrics = run.metrics()
    assert [row["time/total_timesteps"] for row in metrics] == [128, 256]
    with (run.folder / "progress.csv").open(newline="") as file:
        for row, text in zip(metrics, csv.DictReader(file), strict=True):
            assert row.keys() == text.keys()
            assert all(float(text[name]) == row[name] for name in row if text[name])
            assert all(row[name] is None for name in row if not text[name])


def test_transcripts_and_summary(run: Run) -> None:
    summary = run.summary()
    for when in ("before", "after"):
        transcripts = run.transcripts(when)
        rewards = [transcript["reward"] for transcript in transcripts]
        assert len(rewards) == 6
        assert sum(rewards) / 6 == pytest.approx(summary[when]["mean_reward"])
    with pytest.raises(ValueError, match="'before' or 'after', not 'now'"):
        run.transcripts("now")  # type: ignore[arg-type]


def test_traces(run: Run, tmp_path: Path) -> None:
    traces = run.traces()
    assert [trace["num_timesteps"] for trace in traces] == [128] * 4 + [256] * 4
    assert run.traces(stop=256) == run.traces(0, 129) == traces[:4]
    assert run.traces(start=129) == traces[4:]
    untraced = Run.create(replace(SPEC, trace_episodes=0), tmp_path / "run")
    untraced.train()
    assert untraced.traces() == [] and not (untraced.folder / "traces.jsonl").exists()
    weights = "model/model.safetensors"
    assert (untraced.folder / weights).read_bytes() == (run.folder / weights).read_bytes()
    assert untraced.transcripts("after") == run.transcripts("after")


def test_agent_and_evaluation(run: Run) -> None:
    evaluation = run.evaluate(max_examples=6, device="cpu")
    assert evaluation.records() == run.transcripts("after")
    assert len(run.evaluate(split="train", max_examples=2, device="cpu").episodes) == 2
    env: Any = gym.make_vec("TextGen-v0", num_envs=8, max_new_tokens=8)
    model = run.load_agent(env, device="cpu")
    assert type(model) is run.spec.algorithm and model.num_timesteps == 256
    assert model.learn(128, reset_num_timesteps=False).num_timesteps == 384


def test_what_is_not_there_yet(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ValueError, match=r"no run folder.*config\.json"):
        Run.open(tmp_path)
    new = Run.create(SPEC, tmp_path / "run")
    assert new.metrics() == []
    for read in (new.summary, lambda: new.transcripts("before"), new.load_agent):
        with pytest.raises(ValueError, match="yet"):
            read()


def test_what_may_change(run: Run) -> None:
    spec = replace(run.spec, checkpoint_freq=1, device="auto")
    assert Run.open(run.folder, spec).spec is spec
    with pytest.raises(ValueError, match="own options, seed=3, but was given seed=4"):
        Run.open(run.folder, replace(spec, seed=4))


@pytest.mark.parametrize("stage", ["Playing", "Training"])
def test_interrupted_before_the_training(run: Run, tmp_path: Path, stage: str) -> None:
    def interrupt(line: str) -> None:
        if line.startswith(stage):
            raise KeyboardInterrupt

    lines: list[str] = []
    broken = Run.create(SPEC, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        broken.train(interrupt)
    broken.train(lines.append)
    assert "starts again from its beginning" in lines[0]
    assert broken.transcripts("after") == run.transcripts("after")
    assert [row["train/loss"] for row in broken.metrics()] == [
        row["train/loss"] for row in run.metrics()
    ]


def test_run_that_nothing_is_read_from_but_numbers(run: Run, tmp_path: Path) -> None:
    """A run of a task that cannot be imported here can be opened all the same."""
    for name in ("summary.json", "progress.csv"):
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    config = (run.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("TextGen-v0", "somewhere:Else"))
    opened = Run.open(tmp_path)
    assert opened.spec.env == "somewhere:Else"
    assert opened.metrics() == run.metrics() and opened.summary() == run.summary()
