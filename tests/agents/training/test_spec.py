from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.utils import LinearSchedule

from agents import PPO, RunSpec
from agents.cli.train import Train
from agents.files import as_json
from agents.training.registry import ALGORITHMS, algorithm_options, policy_options

# What `textenvs train` had written into config.json before there was a RunSpec.
OLD_CONFIG = """
{"env": "TextGen-v0", "timesteps": 640, "model": "tiny", "tokenizer": null, "dataset": "d.jsonl",
"eval_dataset": null, "fields": ["prompt=q"], "reward": ["0.5*bleu", "task"],
"max_prompt_tokens": null, "max_new_tokens": null, "truncate_prompt": null, "warm_start": 8,
"warm_start_learning_rate": null, "warm_start_batch_size": 16, "num_envs": 64, "n_steps": 128,
"batch_size": 1024, "n_epochs": 4, "learning_rate": 0.0003, "kl_coef": 0.05, "kl_target": null,
"kl_estimator": "k1", "kl_in": "reward", "ent_coef": 0.0, "vf_coef": 0.5, "clip_range": 0.2,
"target_kl": null, "gae_lambda": 0.95, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
"whiten_rewards": false, "whole_episodes": false, "value_model": null, "lora_rank": 0,
"autocast": null, "compile": false, "gradient_checkpointing": false, "micro_batch_size": null,
"seed": 3, "device": "cpu", "eval_examples": 256, "checkpoint_freq": 16384,
"run_dir": "runs/one", "progress": false,
"resolved": {"max_prompt_tokens": 15, "max_new_tokens": 24, "vocabulary": 2048}}
"""


def test_old_run_folders_are_read() -> None:
    config = json.loads(OLD_CONFIG)
    expected = RunSpec(
        "TextGen-v0",
        timesteps=640,
        dataset="d.jsonl",
        fields=("prompt=q",),
        reward=("0.5*bleu", "task"),
        n_steps=128,
        batch_size=1024,
        n_epochs=4,
        clip_range=0.2,
        kl_coef=0.05,
        kl_estimator="k1",
        kl_in="reward",
        learning_rate=3e-4,
        warm_start=8,
        seed=3,
        device="cpu",
    )
    assert RunSpec.from_config(config) == expected
    options = Train.from_config(config)
    assert (options.run_dir, options.progress, options.seed) == (Path("runs/one"), False, 3)
    # New configs hold every key of the old ones.
    assert config.keys() - {"resolved"} <= options.to_config().keys()


@pytest.mark.parametrize("algo", ["a2c", "reinforce"])
def test_old_run_folders_of_other_algorithms_are_read(algo: str) -> None:
    spec = RunSpec.from_config({**json.loads(OLD_CONFIG), "algo": algo, "batch_size": None})
    assert spec.algo == algo and spec.n_epochs is None and spec.clip_range is None
    assert "n_epochs" not in spec.algorithm_kwargs()


def test_config_is_read_back() -> None:
    spec = RunSpec("TextGen-v0", reward=("bleu",), kl_target=3.0, lora_rank=2, kl_in="loss")
    endless = RunSpec("TextGen-v0", target_kl=float("inf"))
    for given in (spec, endless):
        written = json.dumps(as_json(given.to_config()), allow_nan=False)
        assert RunSpec.from_config(json.loads(written)) == given


@pytest.mark.parametrize(
    ("data", "train", "held_out"),
    [
        ({}, (None, "train"), (None, "test")),
        ({"dataset": "a"}, ("a", "shuffled(train)[:90%]"), ("a", "shuffled(train)[90%:]")),
        ({"dataset": "a", "eval_dataset": "b"}, ("a", "train"), ("b", "train")),
    ],
)
def test_data_and_splits(data: Any, train: Any, held_out: Any) -> None:
    spec = RunSpec("TextGen-v0", **data)
    for which, expected in ((False, train), (True, held_out)):
        kwargs = spec.env_kwargs(held_out=which)
        assert (kwargs["dataset"], kwargs["split"]) == expected


def test_environment() -> None:
    spec = RunSpec("TextGen-v0", fields=("prompt=q",), reward=("0.5*bleu",), max_new_tokens=7)
    kwargs = spec.env_kwargs()
    assert kwargs["fields"] == {"prompt": "q"} and kwargs["reward"] == [("bleu", 0.5)]
    assert kwargs["max_new_tokens"] == 7 and kwargs["tokenizer"] is None
    assert not spec.own_reward and RunSpec("TextGen-v0").own_reward
    assert replace(spec, model="gpt2").env_kwargs()["tokenizer"] == "gpt2"
    assert replace(spec, model="gpt2", tokenizer="x").env_kwargs()["tokenizer"] == "x"
    assert RunSpec("TextGen-v0").env_id == "TextGen-v0"


def test_every_option_leads_somewhere() -> None:
    spec = RunSpec(
        "TextGen-v0",
        kl_coef=0.3,
        top_k=5,
        lora_rank=4,
        seed=9,
        warm_start=2,
        whole_episodes=True,
        learning_rate=3e-4,
        vf_learning_rate=1e-3,
    )
    algorithm = spec.algorithm_kwargs()
    assert spec.algorithm is PPO
    assert algorithm.keys() <= inspect.signature(PPO).parameters.keys()
    assert (algorithm["kl_coef"], algorithm["seed"]) == (0.3, 9)
    assert algorithm["policy_kwargs"]["top_k"] == 5
    assert algorithm["policy_kwargs"]["peft_config"] == {"r": 4}
    assert RunSpec("TextGen-v0").algorithm_kwargs()["policy_kwargs"]["peft_config"] is None
    for name, rate in (("learning_rate", 3e-4), ("vf_learning_rate", 1e-3)):
        schedule = algorithm[name]
        assert isinstance(schedule, LinearSchedule)
        assert (schedule(1.0), schedule(0.0)) == (rate, 0.0)
    assert not {"learning_rate", "vf_learning_rate"} & {*RunSpec("TextGen-v0").algorithm_kwargs()}
    assert spec.warm_start_kwargs() == {
        "passes": 2,
        "learning_rate": None,
        "batch_size": 16,
        "seed": 9,
    }
    # An option is the algorithm's or the policy's by its name, or is given to the environment; the
    # rest are the run's own.
    data = RunSpec("TextGen-v0", template="{prompt}:", choices=("a",), observe=("chrf",))
    data = replace(data, stop=("and", "."))
    assert data.env_kwargs(held_out=True)["stop"] == ["and", "."]
    data = replace(data, group_size=2, sampling="epoch", chat_template="true", system_prompt="x")
    used = {*algorithm_options(), *policy_options(), *data.env_kwargs()}
    of_the_run = {"env", "algo", "timesteps", "num_envs", "eval_examples", "eval_freq", "patience"}
    of_the_run |= {"checkpoint_freq", "trace_episodes", "report_to"}
    renamed = {"lora_rank", "eval_dataset", "eval_split", "warm_start"}
    renamed |= {"warm_start_learning_rate", "warm_start_batch_size", "trust_remote_code"}
    names = {field.name for field in fields(RunSpec)}
    assert names <= used | of_the_run | renamed
    own = {name for name in names - {"env"} if getattr(spec, name) is not None}
    assert {*algorithm} - {"policy_kwargs"} == own & inspect.signature(PPO).parameters.keys()


def test_the_split_that_is_held_out() -> None:
    spec = RunSpec("TextGen-v0", eval_split="validation")
    assert [spec.env_kwargs(which)["split"] for which in (False, True)] == ["train", "validation"]


def test_options_that_only_an_environment_takes() -> None:
    spec = RunSpec("TextGen-v0", template="{prompt}:", choices=("yes", "no"), observe=("chrf",))
    kwargs = spec.env_kwargs(held_out=True)
    assert (kwargs["template"], kwargs["choices"]) == ("{prompt}:", ("yes", "no"))
    assert kwargs["observe"] == ["chrf"]
    for name, value in (("true", True), ("false", False), ("chat.jinja", "chat.jinja")):
        chat = RunSpec("TextGen-v0", chat_template=name, system_prompt="Be brief.").env_kwargs()
        assert (chat["chat_template"], chat["system_prompt"]) == (value, "Be brief.")
    # They are left out where they were not given: the task says.
    options = {"template", "choices", "observe", "chat_template", "system_prompt"}
    assert not options & RunSpec("TextGen-v0").env_kwargs().keys()


def test_option_left_at_none_is_the_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunSpec("TextGen-v0", target_kl=None, kl_target=2.0).algorithm_kwargs()
    assert "target_kl" not in options and options["kl_target"] == 2.0
    rate: Any = None
    assert "learning_rate" not in RunSpec("TextGen-v0", learning_rate=rate).algorithm_kwargs()


def test_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()  # a name of ours, whatever lies about
    spec = RunSpec("TextGen-v0", dataset="data.jsonl", eval_dataset="./data.jsonl")
    config = spec.to_config()
    assert config["dataset"] == config["eval_dataset"] == str(tmp_path / "data.jsonl")
    assert (config["model"], config["tokenizer"]) == ("tiny", None)
    config = replace(spec, model="models/mine", tokenizer="gpt2").to_config()
    assert (config["model"], config["tokenizer"]) == (str(tmp_path / "models/mine"), "gpt2")
    # However it is written, it is the same run.
    saved = RunSpec.from_config(spec.to_config())
    monkeypatch.chdir(tmp_path / "models")
    saved.check_resumes(
        replace(spec, dataset="../data.jsonl", eval_dataset=str(tmp_path / "data.jsonl")), "run"
    )


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(TypeError, match="has no option 'max_new_token': did you mean 'max_new_to"):
        RunSpec("TextGen-v0", max_new_token=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no option 'zzz': it has .*timesteps"):
        RunSpec("TextGen-v0", zzz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": ""}, "A run needs an environment"),
        ({"timesteps": 0}, "^timesteps must be at least 1, but it is 0"),
        ({"batch_size": 1}, "^batch_size must be at least 2"),
        ({"checkpoint_freq": -1}, "^checkpoint_freq must be at least 0"),
        ({"device": "nope"}, "^device must be auto, cpu, cuda"),
        ({"kl_in": "both"}, "^kl_in must be one of reward, loss, advantage, but it is 'both'"),
        ({"truncate_prompt": "middle"}, "^truncate_prompt must be one of left, right"),
        ({"algo": "pp0"}, r"^algo must be one of ppo, a2c, grpo, rloo, .*, not 'pp0'"),
        ({"recipe": "grrpo"}, "^recipe must be one of grpo, dr_grpo, dapo"),
        ({"recipe": "dapo"}, "'ppo' has no recipe: leave it out"),
        ({"algo": "grpo", "num_envs": 60}, "^num_envs must be a multiple of group_size=8"),
        ({"group_size": 0}, "^group_size must be at least 1"),
        ({"eval_dataset": "x.jsonl"}, "^eval_dataset needs dataset"),
        ({"fields": ("prompt",)}, "^fields takes NAME=COLUMN"),
        ({"reward": ("x*bleu",)}, "^reward takes NAME or WEIGHT"),
        ({"reward": "bleu"}, "^reward takes a tuple of strings, but it is 'bleu'"),
        ({"observe": "bleu"}, "^observe takes a tuple of strings, but it is 'bleu'"),
        ({"choices": "yes"}, "^choices takes a tuple of strings, but it is 'yes'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSpec(**{"env": "TextGen-v0", **options})


def test_groups_where_episodes_are_compared() -> None:
    sizes = {algo: RunSpec("TextGen-v0", algo=algo).resolved_group_size for algo in ALGORITHMS}
    assert {algo for algo, size in sizes.items() if size == 8} == {
        "grpo",
        "rloo",
        "expert_iteration",
    }
    assert {size for size in sizes.values()} == {1, 8}
    assert RunSpec("TextGen-v0", algo="grpo", baseline="batch").resolved_group_size == 1
    kept = RunSpec("TextGen-v0", algo="expert_iteration", keep_best=0, threshold=0.5)
    assert kept.resolved_group_size == 1
    with pytest.raises(ValueError, match="keep_best=0 needs threshold"):
        RunSpec("TextGen-v0", algo="expert_iteration", keep_best=0)
    spec = RunSpec("TextGen-v0", algo="reinforce++", baseline="group", sampling="epoch")
    assert spec.env_kwargs()["group_size"] == 8 and spec.env_kwargs()["sampling"] == "epoch"
    assert not {"group_size", "sampling"} & spec.env_kwargs(held_out=True).keys()
    assert RunSpec("TextGen-v0", group_size=4).env_kwargs()["group_size"] == 4
    # What a recipe says is left to it; others have a penalty unless the user has another wish.
    assert "kl_coef" not in RunSpec("TextGen-v0", algo="grpo").algorithm_kwargs()
    assert RunSpec("TextGen-v0", algo="rloo").algorithm_kwargs()["kl_coef"] == 0.05
    assert RunSpec("TextGen-v0", kl_coef=0.0).algorithm_kwargs()["kl_coef"] == 0.0


def test_command_lines_spelling() -> None:
    options = Train("TextGen-v0", eval_dataset="x.jsonl")
    with pytest.raises(ValueError, match=r"^--eval-dataset needs --dataset"):
        options.check()
    options = Train("TextGen-v0", kl_estimator="k2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--kl-estimator must be one of k1, k3"):
        options.check()


class Plain:
    """An algorithm with a few options of its own, and its base's."""

    def __init__(
        self, policy: Any, env: Any, learning_rate: float = 1.0, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.policy = policy


class WithKL(Plain):
    def __init__(self, policy: Any, env: Any, kl_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(policy, env, **kwargs)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Plain", "WithKL"):
        monkeypatch.setitem(ALGORITHMS, name.lower(), f"tests.agents.training.test_spec:{name}")


@pytest.mark.usefixtures("plain")
def test_options_that_an_algorithm_lacks_are_left_out() -> None:
    own = {"policy_kwargs", "seed", "device"}
    assert RunSpec("TextGen-v0", algo="plain", seed=3).algorithm_kwargs().keys() == own
    spec = RunSpec("TextGen-v0", algo="withkl", kl_coef=0.5)
    assert spec.algorithm_kwargs().keys() == {*own, "kl_coef"}
    assert spec.algorithm.__name__ == "WithKL"


@pytest.mark.usefixtures("plain")
def test_options_that_an_algorithm_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="'plain' has no n_epochs, kl_coef: leave it out"):
        RunSpec("TextGen-v0", algo="plain", n_epochs=2, kl_coef=0.3)
    with pytest.raises(ValueError, match=r"'withkl' has no --n-epochs: leave it out, or .* --algo"):
        Train("TextGen-v0", algo="withkl", n_epochs=2, kl_coef=0.3).check()


def test_what_may_change_on_resume() -> None:
    saved = RunSpec("TextGen-v0", reward=("bleu",))
    replace(saved, device="cpu", checkpoint_freq=7, trace_episodes=0).check_resumes(
        saved, "runs/one"
    )
    other = replace(saved, seed=5, reward=())
    expected = r"runs/one .* reward=\['bleu'\], seed=0, but was given reward=\[\], seed=5"
    with pytest.raises(ValueError, match=expected):
        other.check_resumes(saved, "runs/one")
