from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from agents import Run, RunSpec
from agents.cli.main import main
from agents.training.configs import read_options
from agents.training.folder import SUMMARY
from agents.training.registry import ALGORITHMS
from agents.tuning.picture import HISTORY, plot_search
from agents.tuning.search import BEST, FOUND, STUDY, Search
from agents.tuning.spaces import SPACES, Among
from tests.agents.training.test_comparison import SMALL, TASK
from tests.test_readme import ROOT

OWN: dict[str, Any] = {**SMALL, "eval_split": "validation", "algo": "a2c"}


def search(folder: Path, **options: Any) -> Search:
    return Search(RunSpec(TASK, **{**OWN, **options}), folder, seeds=1)


def test_every_option_that_is_searched_is_one_of_its_algorithm() -> None:
    assert set(SPACES) == set(ALGORITHMS)
    for algo, space in SPACES.items():
        for name, option in space.items():
            ends = option.values if isinstance(option, Among) else (option.low, option.high)
            for value in ends:
                assert getattr(RunSpec("TextGen-v0", **{"algo": algo, name: value}), name) == value


def test_it_tries_what_is_first_then_others_and_keeps_the_best(tmp_path: Path) -> None:
    lines: list[str] = []
    best = search(tmp_path).run(3, workers=0, say=lines.append)
    found = json.loads((tmp_path / FOUND).read_text())
    assert [trial["as_it_is"] for trial in found["trials"]] == [True, False, False]
    assert found["trials"][0]["options"] == {}
    assert set(found["trials"][1]["options"]) == set(SPACES["a2c"])
    values = [trial["value"] for trial in found["trials"]]
    assert found["trials"][found["best"]]["value"] == max(values)
    assert best == found["trials"][found["best"]]["options"]
    for trial in found["trials"]:
        folder = tmp_path / f"trial-{trial['number']}" / "seed-0"
        summary = json.loads((folder / SUMMARY).read_text())
        assert trial["value"] == pytest.approx(summary["after"]["mean_reward"])
        config = json.loads((folder / "config.json").read_text())
        assert config["eval_split"] == "validation"
        assert {name: config[name] for name in trial["options"]} == trial["options"]
        assert trial["value"] in trial["evaluations"].values()
    options = read_options(tmp_path / BEST)
    assert {**options, **best} == options and options["algo"] == "a2c"
    assert options["num_envs"] == 4 and options["max_new_tokens"] == 3
    assert not {"seed", "eval_split", "device"} & options.keys()
    RunSpec(**options)
    assert lines[0] == "0 of 3 trials are there already." and len(lines) == 4


def test_what_hacks_the_reward_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more a trial earns the more of what is observed it has lost."""
    seen: list[int] = []

    def summary(*_: Any) -> dict[str, Any]:
        seen.append(len(seen))
        fall = 0.04 * seen[-1]
        after = {"mean_reward": float(seen[-1]), "observed": {"chrf": 1.0, "well_formed": 1 - fall}}
        return {"before": {"observed": {"chrf": 0.0, "well_formed": 1.0}}, "after": after}

    monkeypatch.setattr("agents.tuning.search.train_to_the_end", summary)
    own = search(tmp_path)
    assert own.run(4) == own.study().trials[1].params
    assert own.judgement()[-1] == (
        "Left out: 2 trials, of up to 3.0000, in which something that is observed and not paid for "
        "fell by more than 0.05."
    )
    found = json.loads((tmp_path / FOUND).read_text())
    assert [trial["left_out"] for trial in found["trials"]] == [False, False, True, True]
    assert found["trials"][3]["fall"] == pytest.approx(0.12) and found["best"] == 1
    plot_search(tmp_path)
    other = replace(own, max_fall=math.inf)
    assert other.finish() == own.study().trials[3].params and len(other.judgement()) == 2
    strict = replace(own, max_fall=-1.0)
    assert strict.finish() == own.study().trials[3].params
    assert strict.judgement()[-1].startswith("In every trial something that is observed")


def test_what_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = search(tmp_path, checkpoint_freq=32)
    own.run(1, workers=0)
    study = own.study()
    values = optuna.distributions.CategoricalDistribution((0.9, 0.95, 1.0))
    trial = study.ask({"gae_lambda": values})
    started: list[Path] = []
    create = Run.create

    def killed(spec: Any, folder: Any = None) -> Any:
        started.append(folder)
        return create(spec, folder)

    monkeypatch.setattr("agents.training.pool.Run.create", killed)
    own.run(2, workers=0)
    states = [t.state.name for t in own.study().trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    last = own.study().trials[-1]
    assert last.params["gae_lambda"] == trial.params["gae_lambda"]
    assert started == [tmp_path / "trial-1" / "seed-0"]
    own.run(2, workers=0)
    assert len(own.study().trials) == 3
    with pytest.raises(ValueError, match="goes on with its own options, timesteps=64"):
        search(tmp_path, timesteps=96).run(3, workers=0)


def test_a_trial_that_is_below_the_median_is_given_up(tmp_path: Path) -> None:
    own = search(tmp_path, num_envs=1, timesteps=1024)  # rollouts of 128 tokens at most
    study = own.study()
    study.set_user_attr("spec", {**own.spec.to_config(), "seeds": 1})
    for _ in range(6):
        other = study.ask()
        for step in range(9):
            other.report(1e6, step)
        study.tell(other, 1e6)
    lines: list[str] = []
    own.run(7, workers=0, say=lines.append)
    assert study.trials[-1].state == optuna.trial.TrialState.PRUNED
    assert max(study.trials[-1].intermediate_values) == 3
    assert not (tmp_path / "trial-6" / "seed-0" / SUMMARY).exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{n.replace('_', '-')}={v}" for n, v in {**SMALL, "algo": "a2c"}.items()]
    command = ["tune", TASK, *options, "--workers", "0", "--trials", "2", "--seeds", "1"]
    main([*command, "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "trial 1: complete" in shown and f"textenvs train --config {tmp_path / BEST}" in shown
    assert (tmp_path / HISTORY).stat().st_size > 10_000 and (tmp_path / STUDY).is_file()
    for arguments, message in (
        (["--trials", "0"], "--trials must be at least 1, not 0"),
        (["--algo", "pop"], "algo must be one of ppo"),
    ):
        with pytest.raises(SystemExit):
            main(["tune", TASK, *arguments])
        assert message in " ".join(capsys.readouterr().err.split())


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'textenvs[tune]'")):
        search(tmp_path).run(1)


def test_the_page_has_every_space_as_it_is() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w+]+)` \| (.*) \|$", page.split("## Search")[1], re.M))
    assert set(rows) == set(SPACES)
    for algo, text in rows.items():
        assert re.findall(r"`(\w+)`", text) == list(SPACES[algo])
        for name, option in SPACES[algo].items():
            values = option.values if isinstance(option, Among) else (option.low, option.high)
            shown = re.search(rf"`{name}` ([^;]*)", text)
            assert shown is not None and re.findall(r"[\w.+-]+", shown[1].replace(" to ", " ")) == [
                f"{v:g}" if isinstance(v, float) else str(v) for v in values
            ], name
