from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from agents import PPO, Run, RunSpec
from agents.cli.main import main
from agents.training.comparison import Comparison, contestants, read_result
from agents.training.folder import CONFIG, SUMMARY
from agents.training.held_out import HeldOut
from agents.tuning.spaces import space
from tests.test_readme import BLOCK, ROOT

TASK = "tests.agents.training.test_imitation:Spell"
HOURS = 3600.0 * 5
SMALL: dict[str, Any] = {"timesteps": 64, "num_envs": 4, "n_steps": 8, "warm_start": 0}
SMALL |= {"eval_examples": 4, "device": "cpu", "max_new_tokens": 3}


class Own(PPO):
    """An algorithm that is not in the package."""


def specs(*algos: str, **options: Any) -> dict[str, RunSpec]:
    common = {**SMALL, "group_size": 2, "eval_freq": 32, **options}
    return contestants(algos, env=TASK, **common)


def test_contestants_differ_in_their_algorithm_alone(tmp_path: Path) -> None:
    found = specs("ppo", "grpo:dapo", "sft", kl_coef=0.3, gae_lambda=0.9)
    assert list(found) == ["ppo", "grpo:dapo", "sft"]
    assert found["ppo"].gae_lambda == 0.9 and found["ppo"].kl_coef == 0.3
    assert found["grpo:dapo"].recipe == "dapo" and found["grpo:dapo"].kl_coef == 0.3
    assert found["sft"].kl_coef is None and found["sft"].gae_lambda == 0.95  # it has neither
    assert {spec.timesteps for spec in found.values()} == {64}
    text = "env: Other-v0\nalgo: rloo\nlearning_rate: 1e-3\ntimesteps: 999\nmodel: gpt2\n"
    (tmp_path / "mine.yaml").write_text(text)
    found = specs("a2c", "rloo", str(tmp_path / "mine.yaml"), kl_coef=0.3)
    assert list(found) == ["a2c", "rloo", "mine"] and found["mine"].env == TASK
    assert (found["mine"].algo, found["mine"].learning_rate) == ("rloo", 1e-3)
    assert found["rloo"].learning_rate is None and found["mine"].kl_coef == 0.3
    assert found["mine"].timesteps == 64 and found["mine"].model == "tiny"
    assert specs("ppo", "expert_iteration", keep_best=2)["expert_iteration"].keep_best == 2
    with pytest.raises(ValueError, match="Two contestants are called 'rloo'"):
        specs("rloo", "rloo")
    with pytest.raises(ValueError, match="at least one algorithm and one seed"):
        Comparison({}, range(3), Path("x"))


def test_an_algorithm_of_your_own(tmp_path: Path) -> None:
    name = f"{__name__}:Own"
    found = specs(name, "a2c", n_epochs=4, clip_range=0.2)
    assert found[name].algo == name and found[name].recipe is None
    (own, other) = Comparison(found, range(1), tmp_path).train()
    assert (own.algo, other.algo) == (name, "a2c")
    (folder,) = (path for path in tmp_path.iterdir() if "Own" in path.name)
    run = Run.open(folder / "seed-0")
    assert run.spec.clip_range == 0.2  # what was a default once was given here
    assert type(run.load_agent()) is Own and "target_kl" in space(name)
    for algo, message in (
        ("nowhere:Own", "is 'nowhere:Own', which there is not. Could not import"),
        (f"{__name__}:RunSpec", "is no algorithm: it takes"),
    ):
        with pytest.raises(ValueError, match=f"^algo {re.escape(message)}|^algo .*{message}"):
            RunSpec(TASK, algo=algo)


def test_finished_runs_are_reused_and_others_go_on(tmp_path: Path) -> None:
    comparison = Comparison(specs("a2c", "sft"), range(2), tmp_path)
    lines: list[str] = []
    results = comparison.train(workers=0, say=lines.append)
    assert lines[0] == "0 of 4 runs are finished already." and lines[-1].startswith("[4/4] ")
    assert [(r.algo, r.seed) for r in results] == [("a2c", 0), ("sft", 0), ("a2c", 1), ("sft", 1)]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(SUMMARY)}
    (tmp_path / "sft" / "seed-1" / SUMMARY).unlink()
    assert len(comparison.results()) == 3
    again = comparison.train(workers=0, say=lines.append)
    assert "3 of 4 runs are finished already." in lines
    changed = {p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert changed == {tmp_path / "sft" / "seed-1" / SUMMARY}
    assert again[0] == results[0] and again[3].after == results[3].after
    with pytest.raises(ValueError, match=r"goes on with its own options, .*timesteps=64"):
        Comparison(specs("a2c", timesteps=96), range(2), tmp_path).train(workers=0)


def test_one_that_fails_does_not_keep_the_others(tmp_path: Path) -> None:
    found = specs("a2c", "sft")
    found["broken"] = RunSpec(TASK, **{**SMALL, "dataset": str(tmp_path / "none.jsonl")})
    with pytest.raises(ValueError, match=r"(?s)Some runs failed.*broken, seed 0: .*none\.jsonl"):
        Comparison(found, range(1), tmp_path / "all").train(workers=0)
    assert len(Comparison(found, range(1), tmp_path / "all").results()) == 2


@pytest.mark.parametrize("algo", ["ppo", "a2c"])
def test_a_curve_is_what_the_log_says(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play, clock, passed = HeldOut.play, time.perf_counter, [0.0]

    def slowly(self: HeldOut) -> Any:
        passed[0] += HOURS
        return play(self)

    monkeypatch.setattr(HeldOut, "play", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    run = Run.create(RunSpec(TASK, **SMALL, algo=algo, eval_freq=32), tmp_path / "run")
    run.train()
    rows = run.metrics()
    result = read_result("ppo", 0, run)
    assert [point.tokens for point in result.curve] == [0, 32, 64]
    held_out = [row["eval/mean_reward"] for row in rows if row["eval/mean_reward"] is not None]
    assert [point.reward for point in result.curve] == held_out
    assert result.curve[-1].reward == run.summary()["after"]["mean_reward"]
    first, second = (row for row in rows if row["time/rollout_tokens_per_second"])
    rollouts = [32 / row["time/rollout_tokens_per_second"] for row in (first, second)]
    update = 32 / second["time/update_tokens_per_second"]  # that of the first rollout
    expected = np.cumsum([0, rollouts[0] + update, rollouts[1] + update])
    assert [point.seconds for point in result.curve] == pytest.approx(expected)
    assert passed[0] > 0 and 0 < expected[-1] < HOURS  # without the evaluations
    assert result.train_reward == second["rollout/ep_rew_mean"]
    assert result.kl == second["kl/per_episode"]


def test_an_interrupt_ends_it_and_it_goes_on(tmp_path: Path) -> None:
    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps >= 32:
                raise KeyboardInterrupt
            return True

    comparison = Comparison(specs("a2c", "sft"), range(1), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.training.stages._callbacks", lambda *_: [Interrupting()])
        with pytest.raises(KeyboardInterrupt):
            comparison.train()
    assert not comparison.results() and not (tmp_path / "sft").exists()
    assert [result.algo for result in comparison.train()] == ["a2c", "sft"]


def test_a_name_is_a_folder_on_any_system(tmp_path: Path) -> None:
    _, place = Comparison(specs("ppo", "grpo:dapo"), range(1), tmp_path).runs().values()
    assert place[1] == tmp_path / "grpo-dapo" / "seed-0"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    out = tmp_path / "compared"
    command = ["compare", TASK, *options, "--algos", "a2c,reinforce", "--out", str(out)]
    main([*command, "--seeds", "1", "--workers", "1"])
    shown = capsys.readouterr().out
    assert "a2c" in shown and "[2/2]" in shown and "comparison.png" in shown
    config = json.loads((out / "a2c" / "seed-0" / CONFIG).read_text())
    assert config["eval_freq"] == 8 and config["algo"] == "a2c" and "algos" not in config
    main([*command, "--seeds", "1", "--workers", "0"])
    assert "2 of 2 runs are finished already." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algos", "ppo,pop"], "Each of algos must be one of ppo, a2c, .*, not 'pop'"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--timesteps", "0"], "timesteps must be at least 1"),
        (["--keep-best", "2"], "None of ppo, .* has keep_best: leave it out"),
        (["--algo", "rloo"], "What is compared has an algo each: say so in algos"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "TextGen-v0", *arguments])

    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    (code,) = [match["code"] for match in BLOCK.finditer(page)]
    exec(compile(code, "comparison.md", "exec"), {})
    assert (tmp_path / "runs" / "compared" / "comparison.png").is_file()
