"""The options of the command line, and the run that they describe."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

# What a run that goes on may be given anew.
MAY_CHANGE = ("device", "checkpoint_freq", "progress")


MINIMUMS = {
    "timesteps": 1,
    "num_envs": 1,
    "eval_examples": 1,
    "warm_start": 0,
    "warm_start_batch_size": 1,
    "lora_rank": 0,
    "checkpoint_freq": 0,
}


@dataclass(frozen=True)
class Train:
    """Train a transformer on a text environment, and leave a run folder."""

    env: Annotated[Positional[str | None], tyro.conf.arg(metavar="[ENV]")] = None
    """A registered id such as TextGen-v0 (see `textenvs list`), or package.module:Task."""
    resume: Path | None = None
    """Go on with the killed or interrupted run in this folder, instead of starting one. All other
    options are the run's own; device, checkpoint-freq and progress may be given anew."""
    timesteps: int = 131_072
    """Tokens to train on."""
    model: str = "tiny"
    """tiny (1.1M parameters, from nothing), or a model's folder or hub id."""
    tokenizer: str | None = None
    """A tokenizer's folder or hub id. Default: the model's own; for tiny the embedded one."""
    dataset: str | None = None
    """A .jsonl, .jsonl.gz, .csv or .parquet file or a hub id. Default: the task's own data."""
    eval_dataset: str | None = None
    """What is held out. Default: the last tenth of the dataset."""
    fields: tuple[str, ...] = ()
    """Which columns of the dataset to read, as prompt=COLUMN references=COLUMN."""
    reward: tuple[str, ...] = ()
    """Rewards by name, or package.module:function; weights as 0.5*NAME. Default: the task's."""
    max_prompt_tokens: int | None = None
    """Default: the longest prompt's length."""
    max_new_tokens: int | None = None
    """Default: the task's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side of a prompt over the budget to cut off. Default: that is an error."""
    warm_start: int = 8
    """How often to imitate the demonstrations before PPO. 0: not at all."""
    warm_start_learning_rate: float | None = None
    """Default: 1e-3 for a model from nothing, 5e-5 for a pretrained one."""
    warm_start_batch_size: int = 16
    """Demonstrated episodes to a step."""
    num_envs: int = 64
    """Episodes side by side."""
    n_steps: int = 128
    """Tokens from each episode slot between updates."""
    batch_size: int = 1024
    """Tokens to a minibatch."""
    n_epochs: int = 4
    """Passes over each rollout."""
    learning_rate: float = 3e-4
    """At the start; it falls to 0 linearly."""
    kl_coef: float = 0.05
    """What a nat of KL to the warm-started model costs."""
    kl_target: float | None = None
    """Adapt kl_coef to reach this KL, in nats per episode."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How the KL of a token is estimated."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL counts."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    clip_range: float = 0.2
    """Of the ratio."""
    target_kl: float | None = None
    """End an update's epochs when the KL to the policy before it exceeds 1.5 times this."""
    gae_lambda: float = 0.95
    """Lambda of the advantage estimation."""
    temperature: float = 1.0
    """Of the sampling, in training and in evaluation."""
    top_k: int = 0
    """Sample from so many of the most likely tokens. 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that have this probability together."""
    whiten_rewards: bool = False
    """Divide each rollout's rewards by their standard deviation."""
    whole_episodes: bool = False
    """Learn nothing from what the end of a rollout leaves of an episode."""
    value_model: str | None = None
    """A model of the critic's own: copy, tiny, or a folder or hub id. Default: the actor's."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank, and not the model. 0: the model."""
    autocast: Literal["bfloat16"] | None = None
    """Compute the model's layers in bfloat16."""
    compile: bool = False
    """Make programs of what a rollout does at each step; that takes a minute first."""
    gradient_checkpointing: bool = False
    """Hold less in updates, and compute the layers twice."""
    micro_batch_size: int | None = None
    """Compute a minibatch in parts of at most so many tokens, to hold less."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """cpu, cuda, ..."""
    eval_examples: int = 256
    """How many held-out examples to play before and after, at most."""
    checkpoint_freq: int = 16_384
    """Tokens between two checkpoints, which --resume goes on from. 0: none."""
    run_dir: Path | None = None
    """The run's folder. Default: runs/ENV/DATE-TIME."""
    progress: bool = True
    """Whether to show progress bars."""


@dataclass(frozen=True)
class Evaluate:
    """Play a run's agent on held-out examples, each once."""

    run: Positional[Path]
    """A run folder that `textenvs train` wrote."""
    env: Positional[str | None] = None
    """Another environment of the same vocabulary and budgets. Default: the run's own."""
    split: str | None = None
    """Default: what the run held out."""
    max_examples: int | None = None
    """Default: all of the split."""
    deterministic: bool = False
    """Take the most likely token each time."""
    samples: int = 5
    """How many transcripts to show."""
    seed: int = 0
    """For the sampling."""
    device: str = "auto"
    """cpu, cuda, ..."""


@dataclass(frozen=True)
class List:
    """List the environments."""


def make_plan(options: Train) -> Any:
    """Return the run that the options describe."""
    from stable_baselines3.common.utils import LinearSchedule

    from agents.training.run import Plan, resolve_env_id

    if options.env is None:
        raise ValueError("textenvs train needs an environment, such as TextGen-v0.")
    tokenizer = options.tokenizer or (None if options.model == "tiny" else options.model)
    env_kwargs: dict[str, Any] = {
        "tokenizer": tokenizer,
        "dataset": options.dataset,
        "fields": parse_fields(options.fields),
        "reward": parse_rewards(options.reward),
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_new_tokens": options.max_new_tokens,
        "truncate_prompt": options.truncate_prompt,
    }
    _check_numbers(options)
    own = options.dataset is None
    separate = options.eval_dataset is not None
    if own and separate:
        raise ValueError("--eval-dataset needs --dataset.")
    return Plan(
        env_id=resolve_env_id(options.env),
        timesteps=options.timesteps,
        num_envs=options.num_envs,
        env_kwargs=env_kwargs,
        eval_kwargs={"dataset": options.eval_dataset} if separate else {},
        train_split="train" if own or separate else "train[:90%]",
        eval_split="test" if own else "train" if separate else "train[90%:]",
        eval_examples=options.eval_examples,
        ppo_kwargs={
            "policy_kwargs": {
                "model": options.model,
                "temperature": options.temperature,
                "top_k": options.top_k,
                "top_p": options.top_p,
                "value_model": options.value_model,
                "peft_config": {"r": options.lora_rank} if options.lora_rank else None,
                "autocast": options.autocast,
                "compile": options.compile,
                "gradient_checkpointing": options.gradient_checkpointing,
            },
            "learning_rate": LinearSchedule(options.learning_rate, 0.0, 1.0),
            "n_steps": options.n_steps,
            "batch_size": options.batch_size,
            "n_epochs": options.n_epochs,
            "kl_coef": options.kl_coef,
            "kl_target": options.kl_target,
            "kl_estimator": options.kl_estimator,
            "kl_in": options.kl_in,
            "whiten_rewards": options.whiten_rewards,
            "whole_episodes": options.whole_episodes,
            "micro_batch_size": options.micro_batch_size,
            "ent_coef": options.ent_coef,
            "vf_coef": options.vf_coef,
            "clip_range": options.clip_range,
            "target_kl": options.target_kl,
            "gae_lambda": options.gae_lambda,
            "device": options.device,
        },
        warm_start_kwargs={
            "passes": options.warm_start,
            "learning_rate": options.warm_start_learning_rate,
            "batch_size": options.warm_start_batch_size,
        },
        seed=options.seed,
        checkpoint_freq=options.checkpoint_freq,
    )


def _check_numbers(options: Train) -> None:
    """Refuse before anything long begins what would fail in the middle of it."""
    import torch as th

    from agents.algorithms import ppo

    for name, least in {**MINIMUMS, **ppo.MINIMUMS}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, but it is {value}."
            )
    try:
        th.device("cpu" if options.device == "auto" else options.device)
    except RuntimeError as error:
        raise ValueError(
            f"--device must be auto, cpu, cuda, ..., but it is {options.device!r}."
        ) from error


def parse_fields(fields: tuple[str, ...]) -> dict[str, str] | None:
    """Return {"prompt": "mr"} for ("prompt=mr",)."""
    pairs = [field.partition("=") for field in fields]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise ValueError(f"--fields takes NAME=COLUMN, not {name + equals + column!r}.")
    return {name: column for name, _, column in pairs} or None


def parse_rewards(rewards: tuple[str, ...]) -> list[tuple[str, float] | str] | None:
    """Return [("bleu", 0.5), "task"] for ("0.5*bleu", "task")."""
    parsed: list[tuple[str, float] | str] = []
    for reward in rewards:
        weight, star, name = reward.partition("*")
        try:
            parsed.append((name, float(weight)) if star else reward)
        except ValueError:
            raise ValueError(f"--reward takes NAME or WEIGHT*NAME, not {reward!r}.") from None
    return parsed or None


def read_options(folder: Path) -> tuple[Train, dict[str, Any]]:
    """Return the options that a run was started with, and what its environment settled itself."""
    from agents.files import read_json
    from agents.training import run as runs

    if not (folder / runs.CONFIG).is_file():
        raise ValueError(
            f"{folder} is no run folder: expected one that `textenvs train` wrote, with a "
            f"{runs.CONFIG}."
        )
    config = read_json(folder / runs.CONFIG)
    fields: Any = {name: config[name] for name in Train.__dataclass_fields__ if name in config}
    tuples: Any = {name: tuple(fields[name]) for name in ("fields", "reward")}
    run_dir = None if fields["run_dir"] is None else Path(fields["run_dir"])
    return Train(**{**fields, **tuples, "run_dir": run_dir}), config["resolved"]


def check_resumed(options: Train, saved: Train) -> None:
    """Refuse options that are not those of the run that is to go on."""
    different = [
        name
        for name, value in asdict(saved).items()
        if name not in ("resume", *MAY_CHANGE) and getattr(options, name) != value
    ]
    if different:
        given = ", ".join(f"{name}={getattr(options, name)!r}" for name in different)
        own = ", ".join(f"{name}={getattr(saved, name)!r}" for name in different)
        raise ValueError(
            f"--resume goes on with the run's own options, {own}, but was given {given}: leave "
            f"them out, or start a new run. Only {', '.join(MAY_CHANGE)} may change."
        )
