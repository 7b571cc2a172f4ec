"""Small models, policies and environments that the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch as th
from stable_baselines3.common.utils import obs_as_tensor
from transformers import GPT2Config, LlamaConfig

import textenvs  # noqa: F401 (registers the ids)
from agents import GymnasiumVecEnv, TransformerPolicy
from textenvs.text.loading import embedded_tokenizer

VOCAB = len(embedded_tokenizer())
EOS = 0
# Few tokens, EOS among them, so that the episodes of a random policy are ragged.
FEW = [EOS, *range(301, 307)]


def gpt2(**changes: Any) -> GPT2Config:
    """A tiny GPT-2 with weights large enough that every token of the context matters."""
    settings = {
        "vocab_size": VOCAB,
        "n_positions": 512,
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return GPT2Config(**{**settings, **changes})


def llama(**changes: Any) -> LlamaConfig:
    """A tiny Llama with grouped-query attention."""
    settings = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


CONFIGS = {"gpt2": gpt2, "llama": llama}


def vec_env(env_id: str = "TextGen-v0", num_envs: int = 4, **kwargs: Any) -> Any:
    """The native vector environment in SB3's clothes."""
    return GymnasiumVecEnv(gym.make_vec(env_id, num_envs=num_envs, **kwargs))


def policy_for(env: Any, config: Any = None, **kwargs: Any) -> Any:
    """A policy of the tiny GPT-2 (or another config), with the same weights each time."""
    with th.random.fork_rng():
        th.manual_seed(0)
        return TransformerPolicy(
            env.observation_space,
            env.action_space,
            lambda _: 1e-2,
            model=gpt2() if config is None else config,
            **kwargs,
        )


@dataclass
class Rollout:
    """What a policy did: each array (steps, environments)."""

    actions: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    dones: npt.NDArray[np.bool_]
    observations: list[dict[str, npt.NDArray[np.int64]]]


@th.no_grad()
def roll_out(policy: Any, env: Any, steps: int, deterministic: bool = False) -> Rollout:
    """Play with a fixed seed, of the environments and of the sampling."""
    env.seed(0)
    obs = env.reset()
    record: list[Any] = []
    observations = []
    with th.random.fork_rng():
        th.manual_seed(0)
        for _ in range(steps):
            observations.append(obs)
            tensors = obs_as_tensor(obs, th.device("cpu"))
            actions, values, log_probs = policy(tensors, deterministic)
            obs, _, dones, _ = env.step(actions.numpy())
            record.append((actions.numpy(), log_probs.numpy(), values[:, 0].numpy(), dones))
    actions, log_probs, values, dones = (np.stack(column) for column in zip(*record, strict=True))
    return Rollout(actions, log_probs, values, dones, observations)


def ragged(rows: list[list[int]]) -> dict[str, npt.NDArray[np.int64]]:
    """Prompts as observations, right-padded with a token that occurs elsewhere, too."""
    width = max(map(len, rows))
    return {
        "prompt": np.array([row + [7] * (width - len(row)) for row in rows]),
        "prompt_length": np.array([[len(row)] for row in rows]),
        "response": np.zeros((len(rows), 1), dtype=np.int64),
        "response_length": np.zeros((len(rows), 1), dtype=np.int64),
    }


def compiled_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile by a backend of `torch.compile`, and note what is compiled."""
    compiler, functions = th.compile, []

    def compile(function: Any, options: dict[str, Any], **kwargs: Any) -> Any:
        functions.append(function)
        return compiler(function, options=options, backend=backend, **kwargs)

    monkeypatch.setattr(th, "compile", compile)
    return functions
