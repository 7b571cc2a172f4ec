"""The options of a run, with their defaults: what each of them means is said here and only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from agents.algorithms.checks import MINIMUMS as algorithm_minimums
from agents.algorithms.recipes import Clip, RecipeName
from agents.learning.groups import Baseline, Scale
from agents.learning.kl import KLEstimator, KLPlace
from agents.learning.losses import RatioLevel
from agents.learning.objective import Aggregation
from textenvs.data.sampler import Sampling as ExampleSampling

MINIMUMS = {
    **algorithm_minimums,
    "timesteps": 1,
    "num_envs": 1,
    "group_size": 1,
    "eval_examples": 1,
    "warm_start": 0,
    "warm_start_batch_size": 1,
    "lora_rank": 0,
    "eval_freq": 0,
    "patience": 1,
    "checkpoint_freq": 0,
    "trace_episodes": 0,
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read and what is rewarded, in training and in evaluation."""

    tokenizer: str | None = None
    """A tokenizer's folder or hub id. Default: the model's own; for tiny the embedded one."""
    dataset: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder of the last, or a hub id. Default: the
    task's own data."""
    fields: tuple[str, ...] = ()
    """Which columns of the dataset to read, as prompt=COLUMN references=COLUMN."""
    template: str | None = None
    """The prompt around the columns, such as "Review: {prompt}\\nLabel:". Default: the task's."""
    chat_template: str | None = None
    """true, false, or a file with a Jinja template. Default: the tokenizer's, if it has one."""
    system_prompt: str | None = None
    """What a chat begins with. Default: the task's, if it has one."""
    choices: tuple[str, ...] = ()
    """The only responses allowed, such as negative positive. Default: the task's."""
    stop: tuple[str, ...] = ()
    """Texts that end a turn, besides what the model ends it with."""
    reward: tuple[str, ...] = ()
    """Rewards by name, or package.module:function; weights as 0.5*NAME. Default: the task's."""
    observe: tuple[str, ...] = ()
    """Rewards that are measured and logged without being paid for, by name or
    package.module:function: the guard against reward hacking."""
    max_prompt_tokens: int | None = None
    """Default: the longest prompt's length."""
    max_new_tokens: int | None = None
    """Default: the task's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side of a prompt over the budget to cut off. Default: that is an error."""


@dataclass(frozen=True)
class RunOptions(DataOptions):
    """What a run may be told, in Python and on the command line; see `RunSpec`."""

    env: Annotated[Positional[str], tyro.conf.arg(metavar="[ENV]")] = ""
    """A registered id such as TextGen-v0 (see `textenvs list`), package.module:Name-v0, which is
    registered by that module, or package.module:Task."""
    timesteps: int = 131_072
    """Tokens to train on."""
    algo: str = "ppo"
    """The algorithm: ppo, nlpo, grpo, rloo, reinforce++, remax, a2c, reinforce, expert_iteration;
    sft, which imitates demonstrations and no more; or package.module:Class, one of your own."""
    recipe: RecipeName | None = None
    """Of grpo: what was published under this name. Default: grpo."""
    model: str = "tiny"
    """tiny (1.1M parameters, from nothing), or a model's folder or hub id."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    eval_dataset: str | None = None
    """What is held out. Default: a tenth of the dataset, by a shuffle with a fixed seed."""
    eval_split: str | None = None
    """Which split is held out. Default: test, or a tenth of a dataset."""
    warm_start: int | None = None
    """How often to imitate each example's demonstration before training. 0: not at all. Default:
    about two million tokens for a model from nothing, 16 times at most; once for a pretrained
    one."""
    warm_start_learning_rate: float | None = None
    """Default: 2e-3 for a model from nothing, 5e-5 for a pretrained one."""
    warm_start_batch_size: int = 16
    """Demonstrated episodes to a step."""
    num_envs: int = 64
    """Episodes side by side."""
    group_size: int | None = None
    """So many of them answer one prompt. Default: 8 where the algorithm compares them, else 1."""
    sampling: ExampleSampling = "random"
    """Which example is played next: any, or each once before any again."""
    episodes_per_slot: int | None = None
    """Whole episodes from each slot between updates, instead of n-steps tokens. Default: 1 for
    algorithms that compare episodes."""
    n_steps: int = 64
    """Tokens from each episode slot between updates."""
    batch_size: int | None = None
    """Tokens to a minibatch. Default: the algorithm's; for ppo 1,024, or the whole rollout."""
    n_epochs: int | None = None
    """Passes over each rollout. Default: the algorithm's; for ppo and grpo 4."""
    learning_rate: float | None = None
    """At the start; it falls to 0 linearly. Default: the algorithm's, for the kind of model."""
    kl_coef: float | None = None
    """What a nat of KL to the warm-started model costs. Default: 0.05; for grpo the recipe's."""
    kl_target: float | None = None
    """Adapt kl_coef to reach this KL, in nats per episode."""
    kl_estimator: KLEstimator | None = None
    """How the KL of a token is estimated. Default: k1; for grpo the recipe's."""
    kl_in: KLPlace | None = None
    """Where the KL counts. Default: in the reward; for grpo the recipe's."""
    kl_correction: bool | None = None
    """Whether a KL in the loss is weighted by the ratio. Default: the recipe's."""
    baseline: Baseline | None = None
    """What the return of an episode is compared with. Default: the algorithm's."""
    scale: Scale | None = None
    """What standard deviation advantages are divided by. Default: the recipe's."""
    by_turn: bool = False
    """Compare the turns of conversations, and not whole conversations."""
    ratio_level: RatioLevel | None = None
    """What a ratio is of. Default: the recipe's."""
    aggregation: Aggregation | None = None
    """What the loss is a mean over. Default: the recipe's."""
    overlong_margin: float | None = None
    """The share of the response budget before whose end a penalty begins. Default: the recipe's."""
    mask_truncated: bool | None = None
    """Leave responses that their budget cut out of the loss. Default: the recipe's."""
    dynamic_sampling: int | None = None
    """How often all play on to replace groups that earned all the same. Default: the recipe's."""
    keep_best: int | None = None
    """Of expert_iteration: imitate so many of the best of each group; 0: all. Default: 1."""
    threshold: float | None = None
    """Of expert_iteration: imitate what earned so much at least. Default: anything."""
    top_mask: float | None = None
    """Of nlpo: sample only from the top-p set of a lagging copy of the policy; this is its p.
    Default: 0.9."""
    target_update_iterations: int | None = None
    """Of nlpo: after so many rollouts the copy is renewed. Default: 20."""
    ref_model: str | None = None
    """Whom the KL is to: a folder or hub id. Default: the model as it is after the warm start."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    clip: Clip | None = None
    """How the ratio is bounded. Default: the recipe's."""
    clip_range: float | None = None
    """Of the ratio. Default: 0.2; for grpo the recipe's."""
    clip_range_high: float | None = None
    """Above 1. Default: as below, or the recipe's."""
    clip_range_vf: float | None = None
    """Of the value. Default: none."""
    max_grad_norm: float | None = None
    """What gradients are clipped to. Default: the algorithm's."""
    gamma: float | None = None
    """The discount of a token. Default: the algorithm's, 1."""
    target_kl: float | None = None
    """End an update's epochs when the KL to the policy before exceeds 1.5 times this. inf: never.
    Default: the algorithm's; for ppo and grpo 0.03."""
    gae_lambda: float = 0.95
    """Lambda of the advantage estimation."""
    gae_lambda_vf: float | None = None
    """Lambda of the returns that the critic learns. Default: gae-lambda."""
    gae_length_alpha: float | None = None
    """Let lambda grow with an episode's length l: 1 - 1 / (alpha l)."""
    vf_learning_rate: float | None = None
    """The critic's own, at the start; it falls to 0 linearly. Default: the actor's."""
    vf_detach: bool = False
    """Let the value loss leave the trunk alone that actor and critic share."""
    critic_warmup: int = 0
    """So many updates at the beginning train the critic alone."""
    warmup_steps: int | None = None
    """Steps of the optimizer over which the learning rate rises to its full height. Default: the
    algorithm's; for ppo 8."""
    whiten_floor: float = 0.1
    """The least standard deviation that whitening divides by."""
    temperature: float = 1.0
    """Of the sampling, in training and in evaluation."""
    top_k: int = 0
    """Sample from so many of the most likely tokens. 0: all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that have this probability together."""
    constraint: str | None = None
    """What may be said next: package.module:Name of a TokenConstraint."""
    whiten_rewards: bool = False
    """Divide each rollout's rewards by their standard deviation."""
    whole_episodes: bool = False
    """Learn from complete episodes alone; what a rollout's end cuts goes on in the next one."""
    value_model: str | None = None
    """A model of the critic's own: copy, tiny, or a folder or hub id. Default: the actor's."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank, and not the model. 0: the model."""
    autocast: Literal["bfloat16"] | None = None
    """Compute the model's layers in bfloat16."""
    compile: bool = False
    """Compile what a rollout does at each step; that takes a minute first."""
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
    eval_freq: int = 0
    """Tokens between two evaluations on the held-out examples while training; the best model is
    kept in best_model. 0: none."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a new best. Default: never."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the log goes besides progress.csv: tensorboard, wandb, trackio."""
    checkpoint_freq: int = 16_384
    """Tokens between two checkpoints, which --resume goes on from. 0: none."""
    trace_episodes: int = 4
    """Episodes of each rollout to record token by token, in traces.jsonl. 0: none."""
