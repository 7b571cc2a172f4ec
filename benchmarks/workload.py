"""What the benchmarks run on: a toy task of random words, models of given shapes, our agent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, T5Config

from agents import GRPO, PPO
from benchmarks.measuring import Side
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.task import Example, Task, Transcript
from textenvs.text.codec import TextCodec

# So small that repeated updates on one rollout change nothing that matters.
LEARNING_RATE = 1e-7
# What "with every option" means: everything in `policy_kwargs` that makes the policy faster here.
# A CPU that has no instructions for bfloat16 is slower in it.
EVERY_OPTION: dict[str, Any] = {"compile": True}
if th.cpu._is_avx512_bf16_supported():
    EVERY_OPTION["autocast"] = "bfloat16"


@dataclass(frozen=True)
class Shape:
    """The sizes that the targets are stated for.

    Args:
        slots: Environments in a rollout.
        episodes: Episodes in a whole iteration.
        prompt: Tokens of each prompt.
        response: Tokens of each response.
        lengths: The shortest and the longest response where lengths are spread.
        vocabulary: Tokens that there are.
        hidden: The model's width.
        layers: Its depth.
    """

    slots: int = 16
    episodes: int = 64
    prompt: int = 16
    response: int = 48
    lengths: tuple[int, int] = (8, 128)
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4

    def config(self, positions: int | None = None) -> LlamaConfig:
        """Return a Llama of this shape, with heads of 64 and a feed-forward three times as wide."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.hidden // 64),
            max_position_embeddings=positions or self.prompt + max(self.response, *self.lengths),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )

    def t5_config(self) -> T5Config:
        """Return a T5 of this shape, of as many layers in each half."""
        pad = self.vocabulary - 1
        roles: dict[str, Any] = {"eos_token_id": pad - 1, "decoder_start_token_id": pad}
        return T5Config(
            vocab_size=self.vocabulary,
            d_model=self.hidden,
            d_kv=64,
            d_ff=3 * self.hidden,
            num_layers=self.layers,
            num_heads=max(1, self.hidden // 64),
            pad_token_id=pad,
            **roles,
        )


SMALL = Shape(4, 8, 4, 8, (2, 12), vocabulary=64, hidden=32, layers=2)


@lru_cache(maxsize=8)
def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<eos>", "<pad>"]
    words = [f"w{i}" for i in range(vocabulary - len(special))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words + special)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",  # for those who generate
    )


class Words(Task):
    """Random words; the more different ones a response has, the better.

    Args:
        shape: How many tokens a prompt has, and of which vocabulary.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.max_new_tokens = shape.response

    def examples(self, split: str) -> Sequence[Example]:
        """Return 512 prompts, the same for every split."""
        words = np.random.default_rng(0).integers(
            self.shape.vocabulary - 2, size=(512, self.shape.prompt)
        )
        return [Example(" ".join(f"w{word}" for word in row)) for row in words]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return the share of words that are new."""
        responses = [transcript.response.split() for transcript in transcripts]
        return [len(set(words)) / max(1, len(words)) for words in responses]


class FixedLengths(TextVectorEnv):
    """Episodes of lengths drawn in advance, whatever is sampled.

    EOS takes the place of the last token, and the first word that of any other EOS. So what a
    policy reads may differ from what it said in one token of some thousands, which costs no time.

    Args:
        shape: The sizes.
        num_envs: The number of slots.
        lengths: The shortest and the longest episode. None: all are as long as `shape.response`.
        reward: See `TextEnv`.
        group_size: How many neighbouring slots answer one prompt.
        seq2seq: Whether an encoder-decoder reads the prompts.
    """

    def __init__(
        self,
        shape: Shape,
        num_envs: int,
        lengths: tuple[int, int] | None = None,
        reward: Any = None,
        group_size: int = 1,
        seq2seq: bool = False,
    ) -> None:
        self._range = lengths or (shape.response, shape.response)
        super().__init__(
            Words(shape),
            num_envs,
            tokenizer=TextCodec(
                word_tokenizer(shape.vocabulary), "encoder" if seq2seq else "causal"
            ),
            max_new_tokens=self._range[1],
            reward=reward,
            group_size=group_size,
        )
        self._draw = np.random.default_rng(0)
        self._limits = draw_lengths(self._draw, self._range, num_envs)

    def advance(
        self, actions: npt.NDArray[np.int64], slots: npt.NDArray[np.int64] | None = None
    ) -> Any:
        """Step with the episodes' ends put in."""
        eos = self.engine.eos_token_id
        length = self.engine.observations["response_length"][:, 0] + 1
        tokens = np.where(actions == eos, 0, actions)
        tokens[length >= self._limits] = eos
        result = super().advance(tokens, slots)
        ended = np.flatnonzero(result[2])
        self._limits[ended] = draw_lengths(self._draw, self._range, len(ended))
        return result


class Service:
    """Scores as something outside of the process does: 10 ms a call, and 10 ms a response."""

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        """Return 0 for each response, after a while."""
        time.sleep(0.01 * (1 + len(transcripts)))
        return [0.0] * len(transcripts)


def draw_lengths(
    rng: np.random.Generator, lengths: tuple[int, int], count: int
) -> npt.NDArray[np.int64]:
    """Draw so many lengths, uniformly, both ends included."""
    return rng.integers(lengths[0], lengths[1] + 1, size=count)


def agent(
    shape: Shape,
    num_envs: int | None = None,
    *,
    config: PretrainedConfig | None = None,
    lengths: tuple[int, int] | None = None,
    reward: Any = None,
    n_steps: int | None = None,
    batch_size: int | None = None,
    n_epochs: int = 1,
    device: str = "cpu",
    policy_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> PPO:
    """Return our agent; by default a rollout is an episode a slot, and an update one minibatch."""
    num_envs = num_envs or shape.slots
    n_steps = n_steps or shape.response
    seq2seq = config is not None and config.is_encoder_decoder
    env: gym.vector.VectorEnv[Any, Any, Any] = FixedLengths(
        shape, num_envs, lengths, reward, seq2seq=seq2seq
    )
    if config is None:
        config = shape.config(shape.prompt + max(shape.response, *(lengths or (0,))))
    return PPO(
        "TransformerPolicy",
        env,
        learning_rate=LEARNING_RATE,
        n_steps=n_steps,
        batch_size=batch_size or n_steps * num_envs,
        n_epochs=n_epochs,
        policy_kwargs={"model": config, **(policy_kwargs or {})},
        seed=0,
        device=device,
        **kwargs,
    )


def group_agent(shape: Shape, group_size: int, policy_kwargs: dict[str, Any] | None = None) -> GRPO:
    """Return a GRPO with an episode a slot; an update is one minibatch, once, with a reference."""
    return GRPO(
        "TransformerPolicy",
        FixedLengths(shape, shape.episodes, group_size=group_size),
        learning_rate=LEARNING_RATE,
        batch_size=shape.episodes * shape.response,
        n_epochs=1,
        policy_kwargs={"model": shape.config(), **(policy_kwargs or {})},
        seed=0,
        device="cpu",
    )


def rollout(model: Any) -> Side:
    """Return a side that collects a rollout with an agent, ours or SB3's, with new weights."""
    _, callback = model._setup_learn(10**9)
    callback.on_training_start({}, {})

    def run() -> None:
        model.policy.set_training_mode(True)  # as after an update: keys and values are void
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)

    if getattr(getattr(model.policy, "backbone", None), "compiled", False):
        run()  # Programs are made in the first two rollouts, of which one warms up anyway.
    return Side(run, model.n_steps * model.n_envs)


def update(model: Any) -> Side:
    """Return a side that updates an agent, ours or SB3's, from a rollout that it collects first.

    Its unit is a token (SB3: a sample) in one pass.
    """
    rollout(model).run()
    return Side(model.train, model.n_steps * model.n_envs * model.n_epochs)


def iteration(model: PPO | GRPO) -> Side:
    """Return a side that does a whole iteration: rollout, reference, update."""
    env = model.get_env()
    assert env is not None
    budget = cast("Any", env.observation_space)["response"].shape[0]
    steps = (model.n_steps if model.episodes_per_slot is None else budget) * model.n_envs
    return Side(lambda: model.learn(steps, reset_num_timesteps=False), steps)
