from __future__ import annotations

import math
from pathlib import Path

import pytest

from agents import Run, RunSpec
from agents.cli.main import main
from agents.training.configs import parse_settings, read_options, write_options

YAML = """
env: TextGen-v0
algo: grpo
learning-rate: 1e-4
target_kl: inf
kl_coef: 0
report_to: []
reward: [task, 0.5*length_penalty]
"""
TOML = """
env = "TextGen-v0"
algo = "grpo"
learning_rate = 1e-4
target-kl = inf
kl_coef = 0
report_to = []
reward = ["task", "0.5*length_penalty"]
"""


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.toml", TOML), ("a.yml", YAML)])
def test_both_formats_say_the_same(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    spec = RunSpec(**read_options(tmp_path / name))
    assert (spec.env, spec.algo, spec.learning_rate, spec.kl_coef) == (
        "TextGen-v0",
        "grpo",
        1e-4,
        0,
    )
    assert spec.target_kl == math.inf and isinstance(spec.kl_coef, float)
    assert spec.report_to == () and spec.reward == ("task", "0.5*length_penalty")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    options = {"env": "TextGen-v0", "reward": ("task",), "n_steps": 32, "vf_detach": True}
    write_options(tmp_path / "a.yaml", options, ["Why"])
    assert (tmp_path / "a.yaml").read_text().startswith("# Why\nenv: TextGen-v0\n")
    assert read_options(tmp_path / "a.yaml") == options


def test_numbers_and_texts_are_what_they_are_meant_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("timesteps: 1e5\nlearning_rate: 1\nn_epochs: null\n")
    assert read_options(tmp_path / "a.yaml") == {
        "timesteps": 100_000,
        "learning_rate": 1.0,
        "n_epochs": None,
    }
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert read_options(tmp_path / "a.yaml") == {}
    assert parse_settings(["template={prompt}: x", "algo=1"]) == {
        "template": "{prompt}: x",
        "algo": "1",
    }


def test_settings() -> None:
    found = parse_settings(
        ["learning_rate=1e-4", "n-steps=32", "reward=[bleu, task]", "observe=chrf"]
    )
    assert found == {
        "learning_rate": 1e-4,
        "n_steps": 32,
        "reward": ("bleu", "task"),
        "observe": ("chrf",),
    }


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.json", "{}", ValueError, r"a file of .toml, .yaml, .yml, and .*a.json is none"),
        ("a.yaml", "a: [", ValueError, r"a.yaml cannot be read"),
        ("a.toml", "a = ", ValueError, r"a.toml cannot be read"),
        ("a.yaml", "seed: hello", ValueError, r"a.yaml: seed takes a whole number, not 'hello'"),
        ("a.yaml", "n_epochs: 2.5", ValueError, r"n_epochs takes a whole number, not 2.5"),
        ("a.yaml", "n_steps: null", ValueError, r"n_steps takes a whole number, not None"),
        ("a.yaml", "gae_lambda: high", ValueError, r"gae_lambda takes a number, not 'high'"),
        ("a.yaml", "vf_detach: 'no'", ValueError, r"vf_detach takes true or false, not 'no'"),
        ("a.yaml", "algo: [ppo, grpo]", ValueError, r"algo takes a text, not \['ppo', 'grpo'\]"),
        ("a.yaml", "reward: [1]", ValueError, r"reward takes texts, not \[1\]"),
        ("a.yaml", "- a", ValueError, r"holds a list, and not options by name"),
        ("a.yaml", "learning_rat: 1", TypeError, r"no option 'learning_rat': did you mean 'learn"),
    ],
)
def test_mistakes(
    name: str, text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        read_options(tmp_path / name)
    with pytest.raises(ValueError, match="is none"):
        read_options(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="NAME=VALUE, not as 'n_steps'"):
        parse_settings(["n_steps"])


def test_the_command_line_goes_before_settings_and_these_before_the_file(tmp_path: Path) -> None:
    small = (
        "num_envs: 2\nbatch_size: 8\nn_steps: 4\nwarm_start: 0\neval_examples: 2\ntimesteps: 8\n"
    )
    config = tmp_path / "own.yaml"
    config.write_text(f"env: TextGen-v0\nmax_new_tokens: 4\ngae_lambda: 0.7\nvf_coef: 0.3\n{small}")
    own = ["--config", str(config), "--set", "vf_coef=0.2", "seed=3", "--seed", "4"]
    main(["train", *own, "--run-dir", str(tmp_path / "run"), "--device", "cpu", "--quiet"])
    spec = Run.open(tmp_path / "run").spec
    assert (spec.gae_lambda, spec.vf_coef, spec.seed) == (0.7, 0.2, 4)
    assert (spec.num_envs, spec.max_new_tokens) == (2, 4)
    resumed = ["--resume", str(tmp_path / "run"), "--set", "n_steps=99"]
    with pytest.raises(SystemExit):
        main(["train", *resumed])
