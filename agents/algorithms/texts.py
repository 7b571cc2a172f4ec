"""An agent's tokenizer: checked against its model's, saved with it, and used to generate text."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from gymnasium.vector import AsyncVectorEnv
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from agents.algorithms.saving import SavedExactly
from agents.models import tokenizers
from agents.policies.generation import generate
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.vec_env import GymnasiumVecEnv, engine_of
from textenvs.envs.engine import TextEngine
from textenvs.envs.prompts import messages_of, prompt_text
from textenvs.text.codec import TextCodec
from textenvs.text.messages import Message, are_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a model card says of how an algorithm was set.
SETTINGS = ("n_envs", "n_steps", "episodes_per_slot", "batch_size", "n_epochs", "gamma", "kl_coef")


class KnowsTexts(SavedExactly):
    """The part of an algorithm that reads and writes text; `TransformerAlgorithm` has the rest.

    Attributes:
        tokenizer_archive: The tokenizer that the agent was saved with; see `tokenizers.to_bytes`.
        codec_options: The arguments of its `TextCodec`.
        facts: What a model card says of the training; the policy's own.
    """

    ref_model: str | None

    def _start_state(self) -> None:
        super()._start_state()
        self.tokenizer_archive: bytes | None = None
        self.codec_options: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}

    def take_in_tokenizer(self, policy: TransformerPolicy) -> None:
        """Give the policy the environment's tokenizer, or else the one that was saved.

        Raises:
            ValueError: If the model was trained with another one, or lacks what is in the prompts.
        """
        policy.facts = self.facts
        found = None if self.env is None else _tokenizer_of(self.env)
        saved = self.tokenizer_archive
        if found is None:
            policy.tokenizer = None if saved is None else tokenizers.from_bytes(saved)
            return
        policy.tokenizer = found
        if saved is not None and saved != _packed(found, len(found)):
            self._check_tokenizer(found, tokenizers.from_bytes(saved), "of the saved agent", None)
        for source in (*policy.sources, *([self.ref_model] if self.ref_model else [])):
            if str(source) != found.name_or_path:
                own = tokenizers.own_tokenizer(source)
                if own is not None:
                    self._check_tokenizer(found, own, f"of the model {str(source)!r}", source)
        codec: TextCodec | None = _attribute(self.env, "codec")
        if codec is None:
            return
        wanted, made_for = policy.backbone.convention, codec.convention
        if wanted is not None and wanted != made_for:
            kinds = {"encoder": "an encoder-decoder", "causal": "a causal model"}
            raise ValueError(
                f"The model is {kinds[wanted]}, but the environment's prompts are made for "
                f"{kinds[made_for]}: give it tokenizer=TextCodec(tokenizer, {wanted!r}) "
                "(textenvs.text.codec)."
            )
        self.codec_options = _options(codec)
        policy.tokenizer = _as_read(found, codec)
        engine = None if self.env is None else _text_engine(self.env)
        if engine is None:
            return
        policy.facts.update(self._facts(engine))
        known = policy.backbone.readable or policy.vocab_size
        prompts, some = engine.prompts, 4096  # at a time: each alone takes as long as a hundred
        parts = (prompts[i : i + some] for i in range(0, len(prompts), some))
        highest = max(int(np.concatenate(part).max()) for part in parts)
        if highest >= known:
            raise ValueError(
                f"The prompts hold the token {found.convert_ids_to_tokens(highest)!r} (id "
                f"{highest}), but the model has only {known}: use the model's own tokenizer "
                "(gym.make(..., tokenizer=...)), or resize the model "
                "(model.resize_token_embeddings) and save it."
            )

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        texts: str | Sequence[Message],
        max_new_tokens: int | None = None,
        deterministic: bool = False,
        batch_size: int = 64,
    ) -> str: ...

    @overload
    def generate(
        self,
        texts: Sequence[str | Sequence[Message]],
        max_new_tokens: int | None = None,
        deterministic: bool = False,
        batch_size: int = 64,
    ) -> list[str]: ...

    def generate(
        self,
        texts: str | Sequence[str | Message | Sequence[Message]],
        max_new_tokens: int | None = None,
        deterministic: bool = False,
        batch_size: int = 64,
    ) -> str | list[str]:
        """Return the agent's responses to prompts: text in, text out.

        Tokens are sampled as in a rollout: by the policy's temperature, top-k, top-p, allowed
        tokens and constraint, with torch's default generator.

        Args:
            texts: A prompt, or several, as an environment's agent reads them; they are text
                alone, also where something is written like a special token (see `TextCodec`). With
                a chat template a prompt may be a list of messages. Of those that are too long the
                beginning is cut off, with a warning.
            max_new_tokens: How many tokens a response may have, EOS included. None: as many as in
                the agent's environments.
            deterministic: Whether to take the most likely token each time.
            batch_size: How many prompts to answer at a time.

        Returns:
            A response, or one for each prompt.

        Raises:
            ValueError: If no tokenizer is known, or there are to be more tokens than the model can
                read.
            TypeError: If a prompt is neither text nor messages, or the policy no
                `TransformerPolicy`.
        """
        policy = self._text_policy()
        texts = texts if isinstance(texts, str) else list(texts)
        one = isinstance(texts, str) or are_messages(texts)
        several: Any = [texts] if one else texts
        answers = generate(
            policy, self._codec(), several, max_new_tokens, deterministic, batch_size
        )
        return answers[0] if one else answers

    def keep_tokenizer(self) -> None:
        """Note the tokenizer, which is about to be saved with the agent."""
        tokenizer = self._text_policy().tokenizer
        if tokenizer is not None:
            self.tokenizer_archive = _packed(tokenizer, len(tokenizer))

    def _codec(self) -> TextCodec:
        engine = None if self.env is None else _text_engine(self.env)
        if engine is not None:
            return engine.codec
        tokenizer = self._text_policy().tokenizer
        if tokenizer is None:
            raise ValueError(
                "The agent knows no tokenizer to make tokens of text: give it an environment of "
                "textenvs (set_env), or load an agent that had one."
            )
        # Agents that were saved before there were chats read none.
        former = {"chat_template": False} if self.codec_options else {}
        return TextCodec(tokenizer, **{**former, **self.codec_options})

    def _facts(self, engine: TextEngine) -> dict[str, Any]:
        """Return what a model card says of the training."""
        spec = _attribute(self.env, "spec")
        return {
            "task": type(engine.task).__name__,
            "environment": getattr(spec, "id", None),
            "data": f"{len(engine.examples):,} examples of the split {engine.split!r}",
            "reward": ", ".join(f"{term.name} x {term.weight:g}" for term in engine.terms),
            "algorithm": type(self).__name__,
            "learning rate": f"{self.lr_schedule(1.0):g}",
            **{name: getattr(self, name, None) for name in SETTINGS},
            "prompt budget": engine.max_prompt_tokens,
            "response budget": engine.max_new_tokens,
            "prompt": _example(engine),
        }

    def _check_tokenizer(
        self,
        given: PreTrainedTokenizerBase,
        own: PreTrainedTokenizerBase,
        whose: str,
        source: Any,
    ) -> None:
        other = tokenizers.difference(given, own)
        if other is None:
            return
        spec = _attribute(self.env, "spec")
        tokenizer = "..." if source is None else repr(str(source))
        raise ValueError(
            f"The environment's tokenizer is not that {whose}: {other[0]:,} of {other[1]:,} ids "
            f"mean something else ({other[2]}), so that the model would read other words than the "
            "texts have. Make the environment with the model's own: "
            f"gym.make_vec({getattr(spec, 'id', '...')!r}, num_envs={self.n_envs}, "
            f"tokenizer={tokenizer})"
        )


@lru_cache(maxsize=4)
def _packed(tokenizer: PreTrainedTokenizerBase, size: int) -> bytes:
    """Return a tokenizer as bytes, made once while it has so many tokens."""
    return tokenizers.to_bytes(tokenizer)


def _example(engine: TextEngine) -> str | list[Message]:
    """Return a prompt that a model card shows: a text, or the messages of a chat."""
    task, codec, example = engine.task, engine.codec, engine.examples[0]
    if codec.chat is None:
        return prompt_text(task, example)
    return messages_of(task, codec, example)


def _as_read(tokenizer: PreTrainedTokenizerBase, codec: TextCodec) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template is the one that prompts were made with."""
    own = getattr(tokenizer, "chat_template", None)
    used = None if codec.chat is None else codec.chat.template or own
    if used == own or codec.convention == "encoder":
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = used
    return changed


def _options(codec: TextCodec) -> dict[str, Any]:
    """Return what a codec was made with besides the tokenizer."""
    names = list(inspect.signature(TextCodec).parameters)[1:]
    return {name: getattr(codec, name) for name in names if hasattr(codec, name)}


def _attribute(env: VecEnv | None, name: str) -> Any:
    """Return an attribute of an environment, or None: it has none."""
    # To ask a subprocess for what it does not have would end it.
    if env is None or not env.has_attr(name):
        return None
    return env.get_attr(name, indices=[0])[0]


def _tokenizer_of(env: VecEnv) -> PreTrainedTokenizerBase | None:
    tokenizer: PreTrainedTokenizerBase | None = _attribute(env, "tokenizer")
    return tokenizer


def _text_engine(env: VecEnv) -> TextEngine | None:
    """Return an environment's engine, if it is one of textenvs in this process."""
    inner: Any = env.unwrapped
    if isinstance(inner, SubprocVecEnv):
        return None
    if isinstance(inner, GymnasiumVecEnv) and isinstance(inner.env.unwrapped, AsyncVectorEnv):
        return None
    try:
        return engine_of(env)
    except TypeError:
        return None
