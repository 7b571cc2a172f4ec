"""What we are compared with, each written as its users would write it."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecMonitor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PrinterCallback,
    StoppingCriteria,
    StoppingCriteriaList,
)

from agents import PPO, GymnasiumVecEnv
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sequences import split_evenly
from benchmarks.measuring import Side
from benchmarks.trainers import TRL_PLAIN, import_trl, prompt_tokens
from benchmarks.workload import LEARNING_RATE, FixedLengths, Shape, draw_lengths, word_tokenizer
from textenvs.envs.engine import TextEngine


class TransformerExtractor(BaseFeaturesExtractor):
    """A transformer for SB3: the whole padded observation goes through it at every step.

    Args:
        observation_space: That of a text environment.
        config: The model.
    """

    def __init__(self, observation_space: gym.spaces.Dict, config: PretrainedConfig) -> None:
        super().__init__(observation_space, config.hidden_size)
        self.model = AutoModel.from_config(config)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        """Return the hidden state at each row's last token, (n, hidden)."""
        tokens, mask = [], []
        for key in ("prompt", "response"):
            part = observations[key].long()  # SB3 has made them floats
            tokens.append(part)
            mask.append(th.arange(part.shape[1])[None, :] < observations[f"{key}_length"])
        attended = th.cat(mask, dim=1)
        positions = (attended.cumsum(dim=1) - 1).clamp(min=0)
        hidden: th.Tensor = self.model(
            input_ids=th.cat(tokens, dim=1),
            attention_mask=attended.long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        last = (positions * attended).argmax(dim=1)
        return hidden[th.arange(len(hidden)), last]


def sb3_agent(shape: Shape, n_steps: int) -> stable_baselines3.PPO:
    """Return SB3's PPO with a transformer as features extractor and its own categorical head."""
    env = VecMonitor(GymnasiumVecEnv(FixedLengths(shape, shape.slots)))
    return stable_baselines3.PPO(
        "MultiInputPolicy",
        env,
        learning_rate=LEARNING_RATE,
        n_steps=n_steps,
        batch_size=n_steps * shape.slots,
        n_epochs=1,
        policy_kwargs={
            "features_extractor_class": TransformerExtractor,
            "features_extractor_kwargs": {"config": shape.config()},
            "net_arch": [],
        },
        seed=0,
        device="cpu",
    )


class PerRowLimit(StoppingCriteria):
    """Ends each row at a length of its own.

    Args:
        limits: (rows,) the most tokens, prompt included.
    """

    def __init__(self, limits: th.Tensor) -> None:
        self._limits = limits

    def __call__(self, input_ids: th.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows are done."""
        return self._limits <= input_ids.shape[1]


def generation(
    model: Any,
    engine: TextEngine,
    batch: int,
    lengths: tuple[int, int],
    batches: int = 1,
) -> Side:
    """Return a side that answers prompts with `model.generate`, a batch after the other.

    Args:
        model: The language model.
        engine: Where the prompts are from.
        batch: How many prompts at a time.
        lengths: The shortest and the longest response.
        batches: How many batches.
    """
    device = next(model.parameters()).device
    asked = prompt_tokens(engine)
    prompts = th.tensor([asked[i % len(asked)] for i in range(batch)], device=device)
    # What stands before a response: the prompt, or the token that a decoder starts with.
    before = 1 if model.config.is_encoder_decoder else prompts.shape[1]
    limits = th.as_tensor(
        draw_lengths(np.random.default_rng(0), lengths, batch * batches), device=device
    ).reshape(batches, batch)
    config = GenerationConfig(
        max_new_tokens=lengths[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=engine.pad_token_id,
        use_cache=True,
    )

    @th.inference_mode()
    def run() -> None:
        for rows in limits:
            criteria = [] if lengths[0] == lengths[1] else [PerRowLimit(rows + before)]
            model.generate(
                prompts,
                attention_mask=th.ones_like(prompts),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        if device.type == "cuda":
            th.cuda.synchronize()

    return Side(run, int(limits.sum()))


def matrix_products(model: PPO) -> Side:
    """Return the floor of a rollout: the matrix products of its decode steps, and nothing else.

    Each linear layer of an agent's model, the head included, on one token a slot, in plain fp32.
    """
    network: Any = model.policy.backbone.model  # type: ignore[union-attr]
    weights = [m.weight.detach() for m in network.modules() if isinstance(m, th.nn.Linear)]
    inputs = {weight.shape[1]: th.randn(model.n_envs, weight.shape[1]) for weight in weights}

    @th.inference_mode()
    def run() -> None:
        for _ in range(model.n_steps):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

    return Side(run, model.n_steps * model.n_envs)


def bare_training(model: PPO) -> Side:
    """Return the floor of an update on an agent's rollout: nothing but what cannot be left out.

    Forward, cross-entropy of the actions, backward, optimizer step, in as many minibatches as the
    agent's. The rollout's tokens are packed into rows of its mean length, so nothing is padded;
    logits are computed for the actions only, and there is no value, entropy, ratio or clipping.
    """
    buffer = model.rollout_buffer
    assert isinstance(buffer, SequenceRolloutBuffer), "Only our own agent has sequences."
    network: Any = copy.deepcopy(model.policy.backbone.model)  # type: ignore[union-attr]
    optimizer = th.optim.Adam(network.parameters(), lr=LEARNING_RATE, eps=1e-5)
    samples = buffer.samples(buffer.sequences)
    observations: Any = samples.observations
    lengths = th.tensor([sequence.length - 1 for sequence in buffer.sequences])
    filled = th.arange(int(lengths.max()))[None, :] < lengths[:, None]
    real, acts = observations["tokens"][filled], observations["action_positions"][filled]
    width = round(len(real) / len(buffer.sequences))
    rows = len(real) // width
    tokens, positions = (x[: rows * width].view(rows, width) for x in (real, acts))
    actions = samples.actions.flatten()[: int(positions.sum())]
    groups = len(split_evenly(buffer.sequences, model.batch_size))

    def run() -> None:
        at = 0
        for inputs, chosen in zip(
            tokens.tensor_split(groups), positions.tensor_split(groups), strict=True
        ):
            count = int(chosen.sum())
            optimizer.zero_grad()
            hidden = network.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = network.get_output_embeddings()(hidden[chosen])
            F.cross_entropy(logits, actions[at : at + count]).backward()
            optimizer.step()
            at += count

    return Side(run, len(actions))


class NoReward(th.nn.Module):
    """A reward model of TRL's shape that always says 0.

    TRL calls the module that `base_model_prefix` names, and then `score`.
    """

    base_model_prefix = "forward"

    def forward(self, input_ids: th.Tensor, **kwargs: Any) -> SimpleNamespace:
        """Return as hidden states, at each position, a zero."""
        return SimpleNamespace(hidden_states=[th.zeros(*input_ids.shape, 1)])

    @staticmethod
    def score(hidden: th.Tensor) -> th.Tensor:
        """Return the rewards as they are."""
        return hidden


def trl_iteration(shape: Shape, epochs: int, minibatches: int) -> Side:
    """Return a side that does an iteration with TRL's `PPOTrainer`; its value model is its own.

    Raises:
        ImportError: If TRL 1.12 is not installed.
    """
    from datasets import Dataset

    ppo = import_trl()
    env = FixedLengths(shape, 1)
    config = shape.config()
    model: Any = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id = env.engine.pad_token_id
    value_config = copy.copy(config)
    value_config.num_labels = 1
    folder = TemporaryDirectory()
    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(
            output_dir=folder.name,
            total_episodes=shape.episodes,
            per_device_train_batch_size=shape.episodes,
            num_mini_batches=minibatches,
            num_ppo_epochs=epochs,
            local_rollout_forward_batch_size=shape.episodes,
            response_length=shape.response,
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            **TRL_PLAIN,
        ),
        processing_class=word_tokenizer(shape.vocabulary),
        model=model,
        ref_model=None,  # a copy of the model
        reward_model=NoReward(),
        value_model=AutoModelForSequenceClassification.from_config(value_config),
        train_dataset=Dataset.from_dict({"input_ids": prompt_tokens(env.engine)}),
    )
    trainer.remove_callback(PrinterCallback)
    folder.cleanup()

    return Side(trainer.train, shape.episodes * shape.response)


def _different_rewards(completions: list[str], **_: Any) -> list[float | None]:
    """Return numbers that differ within a group, at no cost."""
    return [float(i % 7) for i in range(len(completions))]


def trl_group_iteration(shape: Shape, group_size: int) -> Side:
    """Return a side that does an iteration with TRL's `GRPOTrainer`, with a reference.

    Responses are as long as their budget: EOS is forbidden before.

    Raises:
        ImportError: If TRL is not installed.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    env = FixedLengths(shape, 1)
    texts = [example.prompt for example in env.engine.examples]
    folder = TemporaryDirectory()
    # The reference is read from where the model came from.
    AutoModelForCausalLM.from_config(shape.config()).save_pretrained(folder.name)
    plain = {k: v for k, v in TRL_PLAIN.items() if k != "num_sample_generations"}
    trainer = GRPOTrainer(
        model=folder.name,
        reward_funcs=_different_rewards,
        args=GRPOConfig(
            output_dir=folder.name,
            max_steps=1,
            per_device_train_batch_size=shape.episodes,
            num_generations=group_size,
            max_completion_length=shape.response,
            generation_kwargs={"min_new_tokens": shape.response},
            loss_type="grpo",
            beta=0.04,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_strategy="no",
            **plain,
        ),
        processing_class=word_tokenizer(shape.vocabulary),
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> None:
        trainer.train()
        assert folder is not None  # it stays as long as this

    return Side(run, shape.episodes * shape.response)
