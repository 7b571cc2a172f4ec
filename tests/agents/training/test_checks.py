"""What a run refuses before anything long begins, and what a run that failed leaves behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from agents import PPO, CheckpointCallback, Run, RunSpec, evaluate_model
from agents.algorithms.checks import check_finite
from agents.models.loading import check_device
from agents.rollouts.vec_env import engine_of
from agents.training import stages
from agents.training.checks import check_rewards
from textenvs import Example, Task, Transcript, register_task

SPEC = RunSpec(
    "TextGen-v0",
    timesteps=128,
    num_envs=4,
    n_steps=16,
    batch_size=32,
    max_new_tokens=6,
    warm_start=0,
    eval_examples=2,
    device="cpu",
)


@pytest.mark.parametrize("labels", ["012", ("bad", "fine", "good")])
def test_labels_are_those_that_are_trained_on(labels: Any, tmp_path: Path) -> None:
    """Also where what is held out has fewer of them, or could be read as others."""
    for name, used in (("train", labels), ("held_out", labels[:2]), ("other", labels[1:])):
        rows = [{"text": f"This is it, {i}", "label": used[i % len(used)]} for i in range(30)]
        if labels == "012":
            rows = [{**row, "label": int(row["label"])} for row in rows]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out", "other")}
    spec = replace(SPEC, env="TextClassification-v0", dataset=files["train"], max_new_tokens=2)
    run = Run.create(replace(spec, eval_dataset=files["held_out"]), tmp_path / "run")
    envs, held_out = stages.make_environments(run.spec)
    assert engine_of(held_out).task.choices == tuple(labels) == engine_of(envs).task.choices
    assert held_out.action_space == envs.single_action_space
    run.train()
    for dataset in (None, files["other"]):
        played = run.evaluate(dataset=dataset, max_examples=20)
        assert {e.transcript.response for e in played.episodes if e.transcript} <= set(labels)
        assert 0 < played.mean < 1


def test_a_task_that_holds_nothing_out(tmp_path: Path) -> None:
    class Same(Task):
        max_new_tokens = 4

        def examples(self, split: str) -> list[Example]:
            own = [Example("once")] if split == self.more else []
            return [Example(f"Example {i}:") for i in range(9)] + own

        def score(self, transcripts: Sequence[Transcript]) -> list[float]:
            return [0.0] * len(transcripts)

        more = ""

    register_task("Same-v0")(Same)
    try:
        with pytest.warns(UserWarning, match="trains on all 9 examples that it holds out"):
            stages.make_environments(replace(SPEC, env="Same-v0"))
        Same.more = "test"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stages.make_environments(replace(SPEC, env="Same-v0"))
    finally:
        del gym.registry["Same-v0"]


@pytest.mark.skipif(th.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sees no such device here: choose one of auto, cpu"):
        check_device(device)
    run = Run.create(replace(SPEC, device=device), tmp_path / "run")
    with pytest.raises(ValueError, match=f"^device is '{device}'"):
        run.train()
    assert not run.folder.exists()
    with pytest.raises(ValueError, match="sees no such device"):
        evaluate_model("tiny", "TextGen-v0", device=device)


def test_devices_that_are_there() -> None:
    for device in ("auto", "cpu", "cpu:0"):
        check_device(device)
    with pytest.raises(ValueError, match=r"^--device must be auto, cpu, cuda"):
        check_device("gpu", "--device")


def failing(transcripts: Any) -> list[float]:
    """A reward that needs something that is not there."""
    return [{"a": 1.0}["b"] for _ in transcripts]


def test_failing_reward_is_found_before_the_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "warm_start", lambda *_, **__: pytest.fail("too late"))
    spec = replace(SPEC, reward=(f"{__name__}:failing",), warm_start=3)
    run = Run.create(spec, tmp_path / "runs" / "run")
    with pytest.raises(ValueError, match="'failing' failed with KeyError: 'b'"):
        run.train()
    assert not list(tmp_path.iterdir())  # nothing is left, so that it can be tried again


def test_rewards_are_checked_without_a_trace() -> None:
    env: Any = gym.make_vec("Dialogue-v0", num_envs=2)
    env.reset(seed=0)
    before = env.unwrapped.get_state()
    drawn = th.get_rng_state()
    check_rewards(env, gym.make("TextGen-v0", dataset=[{"prompt": "No reference:"}]))
    assert th.equal(th.get_rng_state(), drawn)
    assert repr(env.unwrapped.get_state()) == repr(before)


@pytest.mark.parametrize("existing", [False, True])
def test_failed_run_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    folder = tmp_path / "run"
    if existing:
        folder.mkdir()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PPO, "collect_rollouts", fail)
    with pytest.raises(OSError, match="no space"):
        Run.create(SPEC, folder).train()
    assert folder.exists() == existing and not (existing and list(folder.iterdir()))
    monkeypatch.undo()
    assert Run.create(SPEC, folder).train()["timesteps"] == 128


def test_failure_after_something_was_learned_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PPO.train

    def fail_at_the_end(self: PPO) -> None:
        original(self)
        if self.num_timesteps == 128:
            raise OSError("no space left on device")

    monkeypatch.setattr(PPO, "train", fail_at_the_end)
    run = Run.create(replace(SPEC, checkpoint_freq=0), tmp_path / "run")
    with pytest.raises(OSError, match="no space"):
        run.train()
    assert len(run.metrics()) == 2 and (run.folder / "config.json").is_file()


@pytest.mark.parametrize("what", ["weight", "optimizer"])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, what: str) -> None:
    class Diverging(PPO):
        """Its second update ruins it."""

        def train(self) -> None:
            super().train()
            if self.num_timesteps == 128:
                (parameter, *_) = self.policy.parameters()
                state = self.policy.optimizer.state[parameter]["exp_avg"]
                with th.no_grad():
                    (parameter if what == "weight" else state).view(-1)[-1] = float("nan")

    envs: Any = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=6)
    model = Diverging("TransformerPolicy", envs, n_steps=16, batch_size=32, device="cpu")
    callback = CheckpointCallback(1, str(tmp_path), replace=True)
    with pytest.raises(ValueError, match=r"has diverged: .* is not finite after 128 tokens"):
        model.learn(320, callback=callback)
    saved = PPO.load(tmp_path / "rl_model.zip", device="cpu")
    assert saved.num_timesteps == 64
    check_finite(saved)
    before = (tmp_path / "rl_model.zip").read_bytes()
    with pytest.raises(ValueError, match="an agent like that is not saved"):
        model.save(tmp_path / "rl_model.zip")
    assert (tmp_path / "rl_model.zip").read_bytes() == before


def test_diverged_run_keeps_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PPO.train

    def ruin(self: PPO) -> None:
        original(self)
        if self.num_timesteps == 128:  # the last update
            with th.no_grad():
                next(self.policy.parameters()).fill_(float("inf"))

    monkeypatch.setattr(PPO, "train", ruin)
    run = Run.create(replace(SPEC, checkpoint_freq=64), tmp_path / "run")
    with pytest.raises(ValueError, match="diverged"):
        run.train()
    assert not (run.folder / "agent.zip").exists() and not run.is_finished
    assert run.load_agent(device="cpu").num_timesteps == 64
