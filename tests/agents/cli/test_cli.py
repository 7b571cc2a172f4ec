from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from transformers import AutoModelForCausalLM, AutoTokenizer

import textenvs
from agents import PPO, evaluate_model
from agents.cli.main import joined, main, parse
from agents.cli.train import Train
from agents.training.parsing import parse_fields, parse_rewards
from tests.agents.helpers import VOCAB, gpt2, policy_for, vec_env

SMALL = ["--num-envs", "8", "--n-steps", "16", "--timesteps", "256", "--batch-size", "64"]
QUICK = [*SMALL, "--warm-start", "0", "--eval-examples", "8", "--no-progress", "--device", "cpu"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--seed", "3", "--trace-episodes", "2", "--run-dir", str(folder)]
    main(["train", "TextGen-v0", *QUICK, *options])
    return folder


def test_run_folder(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "summary.json", "agent.zip", "model", "progress.csv"} <= names
    assert {"samples_before.jsonl", "samples_after.jsonl", "learning_curve.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".")]
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_summary(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["env_id"], summary["seed"], summary["timesteps"]) == ("TextGen-v0", 3, 256)
    assert summary["interrupted"] is False and summary["tokens_per_second"] > 0
    for when in ("before", "after"):
        samples = rows(run / f"samples_{when}.jsonl")
        assert len(samples) == summary[when]["examples"] == 8
        mean = sum(sample["reward"] for sample in samples) / 8
        assert summary[when]["mean_reward"] == pytest.approx(mean)
        assert summary[when]["standard_error"] >= 0
        assert {"turns", "references", "reward_terms", "is_success"} <= set(samples[0])
    before, after = (
        [sample["turns"][0]["text"] for sample in rows(run / f"samples_{when}.jsonl")]
        for when in ("before", "after")
    )
    assert before == after  # the same held-out prompts
    held_out = {example.prompt for example in vec_env(split="test").get_attr("engine")[0].examples}
    assert set(before) <= held_out


def test_log(run: Path) -> None:
    with (run / "progress.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    assert [int(row["time/total_timesteps"]) for row in log] == [128, 256]
    assert {"train/loss", "kl/per_episode", "rollout/ep_rew_mean"} <= set(log[0])


def test_traces(run: Path) -> None:
    traces = rows(run / "traces.jsonl")
    assert [trace["num_timesteps"] for trace in traces] == [128] * 2 + [256] * 2
    for trace in traces:
        for turn in trace["turns"]:
            assert len(turn["tokens"]) == len(turn["pieces"]) == len(turn["advantages"]) > 0


def test_config(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["env"] == "TextGen-v0" and config["timesteps"] == 256 and config["seed"] == 3


def test_agent_and_model_are_the_same(run: Path) -> None:
    agent = PPO.load(run / "agent", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("The soup was", return_tensors="pt")["input_ids"]
    with th.no_grad():
        logits = agent.policy.backbone.model(ids).logits  # type: ignore[operator, union-attr]
        assert th.equal(model(ids).logits, logits)
    assert agent.num_timesteps == 256 and agent.reference is not None
    env: Any = gym.make_vec("TextGen-v0", num_envs=8)
    PPO.load(run / "agent", env=env).learn(128)


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    answers = []
    for _ in range(2):
        main(["evaluate", str(run), "--max-examples", "6", "--show", "2", "--device", "cpu"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert "mean_reward" in answers[0] and "examples" in answers[0] and "response" in answers[0]
    main(["evaluate", str(run), "--max-examples", "6", "--deterministic", "--device", "cpu"])
    assert capsys.readouterr().out != answers[0]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_evaluate_gives_the_summarys_figure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    main(["evaluate", str(run), "--max-examples", "8", "--device", "cpu"])
    assert f"{summary['after']['mean_reward']:.4f}" in capsys.readouterr().out


def test_evaluate_in_another_environment(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--max-examples", "2", "--device", "cpu"]
    main(["evaluate", str(run), "tests.agents.cli.test_cli:Shout", "--split", "train", *arguments])
    assert "Shout-v0" in capsys.readouterr().out


class Shout(textenvs.Task):
    """Say it loud."""

    max_new_tokens = 5

    def examples(self, split: str) -> list[textenvs.Example]:
        return [textenvs.Example(f"{i}:", (f"{i}!",)) for i in range(9)]

    def score(self, transcripts: Any) -> list[float]:
        return [float(transcript.response.endswith("!")) for transcript in transcripts]


def test_what_a_newcomer_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a run"
    extra = ["--eval-freq", "128", "--run-dir", str(folder)]
    main(["train", "TextGen-v0", *QUICK, "--max-new-tokens", "6", *extra])
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    (header,) = [line for line in lines if line[:2] == ["tokens", "reward"]]
    assert header[-4:] == ["KL", "tokens/s", "elapsed", "left"]
    # Without the line that tells the speed, which may be any number.
    told = [line for line in lines if line[:1] in (["128"], ["256"]) and line[1] != "tokens/s"]
    rollouts = [len(line) for line in told if "-" not in line]
    assert rollouts[0] == len(header) - 1 and rollouts[-1] == len(header)  # what is left, later
    assert shown.count("the best") == 1 and "Best held-out reward: " in shown  # at 128
    for command in (
        f"textenvs evaluate '{folder}' --samples 4",
        f"tensorboard --logdir '{folder}'",
        "textenvs train TextGen-v0 --model ",
    ):
        assert command in shown
    assert "--max-new-tokens 6" in shown
    few = ["--timesteps", "64", "--eval-examples", "1", "--quiet"]
    main(["train", "TextGen-v0", *QUICK, *few, "--run-dir", str(tmp_path / "quiet")])
    assert capsys.readouterr().out == ""


def test_every_metric_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--timesteps", "64", "--verbose", "--run-dir", str(tmp_path / "run")]
    main(["train", "TextGen-v0", *QUICK, "--max-new-tokens", "6", *options])
    assert "time/rollout_tokens_per_second" in capsys.readouterr().out


def test_evaluate_any_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers" / "all.jsonl"
    data = ["--dataset", str(dataset(tmp_path, 6)), "--fields", "prompt=q", "references=a"]
    few = ["--samples", "3", "--output", str(output), "--device", "cpu", "--max-new-tokens", "5"]
    main(["evaluate", str(run / "model"), "TextGen-v0", *data, "--reward", "exact_match", *few])
    shown = capsys.readouterr().out
    assert "18 transcripts" in shown and "reward_terms: exact_match" in shown
    answers = rows(output)
    assert [answer["example"] for answer in answers] == [i for i in range(6) for _ in range(3)]
    assert answers[0]["turns"][0]["text"] == "Say 0:"  # all of the dataset, and in its order
    assert len({answer["turns"][1]["text"] for answer in answers[:3]}) > 1


def test_best_of_several(run: Path, tmp_path: Path) -> None:
    output, few = tmp_path / "best.jsonl", ["--max-examples", "4", "--device", "cpu", "--quiet"]
    main(["evaluate", str(run), "--best-of", "3", "--output", str(output), *few])
    every = evaluate_model(run, max_examples=4, device="cpu", samples=3)
    expected = every.rewards.reshape(4, 3).max(axis=1)
    assert [answer["reward"] for answer in rows(output)] == pytest.approx(expected)


def test_evaluate_a_run_on_other_data(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    data = ["--dataset", str(dataset(tmp_path, 6)), "--fields", "prompt=q", "references=a"]
    main(["evaluate", str(run), *data, "--output", str(output), "--device", "cpu", "--quiet"])
    assert [answer["turns"][0]["text"] for answer in rows(output)] == [
        f"Say {i}:" for i in range(6)
    ]


def test_sampling_of_a_run_can_be_another(run: Path) -> None:
    few: Any = {"max_examples": 4, "device": "cpu"}
    greedy, sampled = (
        evaluate_model(run, **few, **options).records()
        for options in ({"deterministic": True}, {"top_k": 1})
    )
    assert sampled == greedy != evaluate_model(run, **few).records()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    shown = capsys.readouterr().out
    for env_id in ("TextGen-v0", "Dialogue-v0", "Translation-v0", "TextClassification-v0"):
        assert env_id in shown


def dataset(folder: Path, count: int = 40) -> Path:
    path = folder / "data.jsonl"
    lines = [json.dumps({"q": f"Say {i}:", "a": [f"it is {i}"]}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_own_data_rewards_and_warm_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    policy_for(vec_env(), gpt2()).save_pretrained(
        tmp_path / "model", vec_env().get_attr("tokenizer")[0]
    )
    data = ["--dataset", str(dataset(tmp_path)), "--fields", "prompt=q", "references=a"]
    rewards = ["--reward", "bleu", "0.1*length_penalty"]
    extra = ["--model", str(tmp_path / "model"), "--max-new-tokens", "9", "--temperature", "0.7"]
    quick = [*SMALL, "--warm-start", "2", "--no-progress", "--device", "cpu"]
    folder = tmp_path / "run"
    main(["train", "TextGen-v0", *quick, *data, *rewards, *extra, "--run-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["after"]["reward_terms"]) == {"bleu", "length_penalty"}
    held_out = [row["turns"][0]["text"] for row in rows(folder / "samples_after.jsonl")]
    assert len(held_out) == len(set(held_out)) == 4  # a tenth
    assert held_out != [f"Say {i}:" for i in range(36, 40)]  # not the last one
    assert len(list((tmp_path / "cache" / "textenvs" / "warm_start").iterdir())) == 1
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.n_embd == 32
    capsys.readouterr()
    main(["evaluate", str(folder), "--device", "cpu", "--show", "1"])
    assert f"{summary['after']['mean_reward']:.4f}" in capsys.readouterr().out


def test_interrupt_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = PPO.train

    def interrupted(self: PPO) -> None:
        original(self)
        if self.num_timesteps >= 256:
            raise KeyboardInterrupt

    monkeypatch.setattr(PPO, "train", interrupted)
    folder = tmp_path / "run"
    main(["train", "TextGen-v0", *QUICK, "--timesteps", "9000", "--run-dir", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is True and summary["timesteps"] == 256
    monkeypatch.undo()
    env: Any = gym.make_vec("TextGen-v0", num_envs=8)
    agent = PPO.load(folder / "agent", env=env, device="cpu")
    assert agent.learn(128, reset_num_timesteps=False).num_timesteps == 384
    AutoModelForCausalLM.from_pretrained(folder / "model")
    capsys.readouterr()
    main(["evaluate", str(folder), "--max-examples", "2", "--device", "cpu"])
    assert "mean_reward" in capsys.readouterr().out


def test_interrupt_in_the_first_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(PPO, "collect_rollouts", interrupted)
    folder = tmp_path / "run"
    main(["train", "TextGen-v0", *QUICK, "--run-dir", str(folder)])
    assert json.loads((folder / "summary.json").read_text())["interrupted"] is True
    PPO.load(folder / "agent", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "TextGen-v1"], "Did you mean 'TextGen-v0'"),
        (["train", "no.module:Task"], "Could not import 'no.module:Task'"),
        (["train", "TextGen-v0", "--eval-examples", "0"], "--eval-examples must be at least 1"),
        (["train", "TextGen-v0", "--trace-episodes", "-1"], "--trace-episodes must be at least 0"),
        (["train", "TextGen-v0", "--algo", "pp0"], "--algo must be one of ppo"),
        (["train", "TextGen-v0", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["train", "TextGen-v0", "--device", "nope"], "--device must be auto, cpu, cuda, ..."),
        (["train", "CartPole-v1"], "Unknown task 'CartPole-v1'"),
        (["train", "TextGen-v0", "--model", "/no/where"], "/no/where"),
        (["train", "TextGen-v0", "--dataset", "/no/data.jsonl"], "/no/data.jsonl"),
        (["train", "TextGen-v0", "--eval-dataset", "x.jsonl"], "--eval-dataset needs --dataset"),
        (["train", "TextGen-v0", "--fields", "prompt"], "--fields takes NAME=COLUMN"),
        (["train", "TextGen-v0", "--reward", "x*bleu"], "--reward takes NAME or WEIGHT*NAME"),
        (["train", "TextGen-v0", "--reward", "blue"], "Unknown reward 'blue'"),
        (["train", "TextGen-v0", "--max-prompt-tokens", "3"], "over max_prompt_tokens=3"),
        (["train", "TextGen-v0", "--temperature", "0"], "temperature must be positive"),
        (["train", "TextGen-v0", "--kl-coef", "-1"], "kl_coef must be at least 0"),
        (["evaluate", "/no/run"], "/no/run is no run folder"),
        (["evaluate", "/no/run", "TextGen-v0"], "/no/run"),
        (["evaluate", "tiny", "TextGen-v0", "--samples", "0"], "samples must be at least 1"),
        (["evaluate", "tiny", "TextGen-v0", "--best-of", "0"], "--best-of must be at least 1"),
        (
            ["evaluate", "tiny", "TextGen-v0", "--best-of", "2", "--samples", "2"],
            "leave --samples out",
        ),
        (
            ["evaluate", "tiny", "TextGen-v0", "--best-of", "2", "--deterministic"],
            "leave one of them out",
        ),
        (["evaluate", "tiny", "TextGen-v0", "--output", "."], "--output takes a file"),
    ],
)
def test_mistakes_end_with_their_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "train":
        folder = ["--run-dir", str(tmp_path / "run")]
        arguments = [*arguments[:2], *QUICK, *folder, *arguments[2:]]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Error:" in error and "Traceback" not in error
    assert message in error


def test_run_folder_that_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = (run / "summary.json").read_text()
    with pytest.raises(SystemExit) as stop:
        main(["train", "TextGen-v0", *QUICK, "--run-dir", str(run)])
    assert stop.value.code == 2 and "choose another" in capsys.readouterr().err
    assert (run / "summary.json").read_text() == summary


def test_evaluate_an_unfinished_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--device", "cpu"])
    assert "no agent and no checkpoint yet" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "checkpoint.zip").write_bytes((run / "agent.zip").read_bytes())
    main(["evaluate", str(tmp_path), "--device", "cpu", "--max-examples", "2"])
    assert "not finished: this is its last checkpoint" in capsys.readouterr().out


def test_budgets_of_another_environment(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(run), "Dialogue-v0", "--device", "cpu"])
    assert stop.value.code == 2 and "max_prompt_tokens" in capsys.readouterr().err


def test_parsing() -> None:
    assert parse_fields(("prompt=mr", "references=a=b")) == {"prompt": "mr", "references": "a=b"}
    assert parse_fields(()) is None and parse_rewards(()) is None
    assert parse_rewards(("0.5*bleu", "task")) == [("bleu", 0.5), "task"]
    for wrong in (("=mr",), ("prompt=",)):
        with pytest.raises(ValueError, match="NAME=COLUMN"):
            parse_fields(wrong)


def test_vocabulary_of_the_embedded_tokenizer(run: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(run / "model").config.vocab_size == VOCAB


@pytest.fixture(autouse=True)
def same_path() -> Any:
    """Whatever `main` puts in front of the module path goes again."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"textenvs {textenvs.__version__}\n"
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and all(name in shown for name in ("train", "evaluate", "list"))


def broken(transcripts: Any) -> list[float]:
    """A reward that fails."""
    return [1.0 / len(()) for _ in transcripts]


class Broken(textenvs.Task):
    """A task that fails."""

    def examples(self, split: str) -> list[textenvs.Example]:
        raise ValueError("the [red] file is not there")


@pytest.mark.parametrize(
    ("arguments", "line", "message"),
    [
        (["TextGen-v0", "--reward", f"{__name__}:broken"], "1.0 / len(())", "ZeroDivisionError"),
        ([f"{__name__}:Broken"], "raise ValueError(", "ValueError: the [red] file is not there"),
    ],
)
def test_users_own_traceback(
    arguments: list[str], line: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments, *QUICK, "--run-dir", str(folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and line in error and message in error
    assert "agents/training" not in error and "rewards/scoring.py" not in error  # not ours
    assert not folder.exists()


def test_options_of_several_values_can_be_repeated() -> None:
    repeated = ["train", "X-v0", "--observe", "bleu", "--seed", "1", "--observe=chrf", "rouge_l"]
    expected = "train X-v0 --seed 1 --observe bleu chrf rouge_l"
    assert joined(repeated) == expected.split()
    options = parse(joined([*repeated, "--report_to", "trackio", "--choices", "a", "b"]))
    assert isinstance(options, Train) and options.observe == ("bleu", "chrf", "rouge_l")
    assert (options.seed, options.report_to, options.choices) == (1, ("trackio",), ("a", "b"))
    asked = joined(["evaluate", "x", "--reward", "a", "-h"])
    assert asked == ["evaluate", "x", "-h", "--reward", "a"]
