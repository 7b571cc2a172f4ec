"""`TransformerPolicy`: the policy on a language model that `transformers` knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule

from agents.models.backbone import Backbone
from agents.models.causal import CausalBackbone
from agents.models.loading import ModelSpec, is_seq2seq, model_kind
from agents.models.seq2seq import Seq2SeqBackbone
from agents.policies.export import tell_of_stops
from agents.policies.masks import TokenMasks
from agents.policies.observations import check_spaces
from agents.policies.sampling import LOGITS_AT_A_TIME, Sampling
from agents.policies.saved import SavedPolicy
from textenvs.constraints import TokenConstraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agents.models.lora import AdapterSpec


class TransformerPolicy(SavedPolicy):
    """Actor and critic on one language model, for environments of `textenvs`.

    The model is causal, or an encoder-decoder, which encodes prompts and decodes responses.

    The actor is the model's own head; the critic is a linear layer on the last hidden state, in
    float32 and zero at the start. It shares the actor's trunk, which costs nothing, or has a model
    of its own (`value_model`), which takes as much memory and computation again but cannot pull at
    what the actor has learned. Log-probabilities are those of the distribution that is sampled
    from: temperature, top-k, top-p, the task's allowed tokens and the constraint applied. Dropout
    is always off, so that rollout and update see the same model.

    Args:
        observation_space: That of a text environment.
        action_space: A `TokenSpace` (any `Discrete` will do if every token is allowed).
        lr_schedule: Learning rate as a function of the remaining progress.
        use_sde: Must be False; it is there because SB3 passes it.
        model: "tiny" (a Llama of about a million parameters, initialised at random), a name or
            path that `AutoModelForCausalLM.from_pretrained` resolves, or a config. An adapter that
            `peft` has saved is trained on, as with `peft_config`, and saved as one.
        model_init_kwargs: Further arguments of `from_pretrained`, where models are loaded by name:
            `revision`, `attn_implementation`, `trust_remote_code` (which runs code that comes with
            a model), `quantization_config` (of `model` alone, with `peft_config`).
        temperature: Logits are divided by it.
        top_k: Sample from the k most likely tokens. 0: all.
        top_p: Sample from the smallest set of most likely tokens with at least this probability.
            1: all.
        allowed_tokens: The only tokens to sample. None: what the action space says, and of its
            choices, if it has some, whole ones alone.
        constraint: What may be said next, as a function of what was said: a
            `textenvs.constraints.TokenConstraint`, or "package.module:Name" (a class is called).
            Of the allowed tokens only those are sampled that it allows. A path is imported where
            the agent is loaded; an object is pickled with it.
        use_cache: Whether to remember keys and values between calls; the answers are the same.
        value_model: What the critic reads: None (the actor's trunk), "copy" (a model of its own
            that starts as the actor's, as it is after a warm start), or like `model`; an adapter
            is merged into its model.
        critic: Whether there are values at all; an algorithm without a critic needs none, and what
            asks for them gets zeros.
        peft_config: A `peft.LoraConfig` or a dict of its arguments, e.g. `{"r": 16}`: train an
            adapter (and the value head) only. The critic must share the trunk.
        autocast: "bfloat16": the trunks compute in it, in rollouts and updates alike, on CPU and
            GPU. Weights, log-probabilities, values and losses stay in float32. None: float32.
        gradient_checkpointing: Whether updates compute the layers twice in order to hold less.
        compile: Whether `torch.compile` compiles what a rollout does at each step; on a GPU that
            of a causal model is captured as a graph. That takes a minute at first, and memory for
            a causal model's longest sequences is held throughout.
        head_chunk: How many tokens of an update get their logits at a time, so that no array of
            tokens times vocabulary is held. None: as many as make 2^24 logits.
        optimizer_class: AdamW-like or Adam; `th.optim.Adam` by default.
        optimizer_kwargs: Its arguments besides the learning rate; for Adam eps is 1e-5 by default.

    Raises:
        ValueError: If the spaces are not those of a text environment, or the model does not fit; in
            use, if the constraint allows nothing somewhere, or the model lacks a token that it is
            to read.
    """

    observation_space: spaces.Dict

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: ModelSpec = "tiny",
        model_init_kwargs: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        allowed_tokens: list[int] | None = None,
        constraint: TokenConstraint[Any] | str | None = None,
        use_cache: bool = True,
        value_model: ModelSpec | None = None,
        critic: bool = True,
        peft_config: AdapterSpec | None = None,
        autocast: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        head_chunk: int | None = None,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if optimizer_kwargs is None:
            adam = {"eps": 1e-5, "fused": True}  # one pass over the weights
            optimizer_kwargs = adam if optimizer_class is th.optim.Adam else {}
        # ActorCriticPolicy's own constructor builds extractors and heads that have no place here.
        BasePolicy.__init__(
            self,
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        if use_sde:
            raise ValueError("use_sde=True makes no sense for tokens: leave it out.")
        check_spaces(observation_space, action_space)
        self.use_sde = False
        self.sampling = Sampling(temperature, top_k, top_p)
        self.use_cache = use_cache
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.facts = {}
        # Where tokenizers may be that the models were trained with.
        self.sources = [m for m in (model, value_model) if isinstance(m, (str, Path))]
        self.sources = [source for source in self.sources if source not in ("tiny", "copy")]
        self.vocab_size = int(cast(spaces.Discrete, action_space).n)
        # Whether the first weights were somebody's work, and not drawn at random.
        self.pretrained = model_kind(model) != "new"
        if value_model is not None and peft_config is not None:
            raise ValueError(
                "With peft_config the critic shares the actor's trunk: leave value_model out."
            )
        self._options: dict[str, Any] = {
            "autocast": autocast,
            "gradient_checkpointing": gradient_checkpointing,
            "compile": compile,
        }
        self._init_kwargs = dict(model_init_kwargs or {})
        if self._init_kwargs and model_kind(model) == "new":
            raise ValueError(
                "model_init_kwargs are for models that are loaded by name, and this one is made "
                "from a config: leave them out."
            )
        self.backbone = self.make_backbone(model, peft_config)
        # What the model lacks of the tokenizer's vocabulary is never sampled.
        self.vocab_size = min(self.vocab_size, self.backbone.num_logits)
        adapter = self.backbone.adapter
        if adapter is not None and value_model is not None:
            raise ValueError("With an adapter the critic shares the trunk: leave value_model out.")
        self._peft_config = peft_config if adapter is None else adapter.config
        if self.pretrained:
            tell_of_stops(self)
        self.head_chunk = _head_chunk(head_chunk, self.backbone.num_logits)
        self.make_critic(value_model, critic)
        self._allowed_tokens = allowed_tokens
        choices = None
        if allowed_tokens is None:
            allowed_tokens = getattr(action_space, "allowed_tokens", None)
            choices = getattr(action_space, "choices", None)
        self._constraint = constraint
        eos = getattr(action_space, "eos_token_id", None)
        if self.backbone.never_said:
            allowed = range(self.vocab_size) if allowed_tokens is None else allowed_tokens
            allowed_tokens = [token for token in allowed if token not in self.backbone.never_said]
        self.masks = TokenMasks(self.vocab_size, allowed_tokens, constraint, choices, eos)
        self.optimizer = self.optimizer_class(
            self._parameter_groups(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return what is trained: the actor's and, in a group of their own, the critic's own."""
        own = {id(parameter) for parameter in self.critic_parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        actor = [parameter for parameter in trained if id(parameter) not in own]
        critic = [parameter for parameter in trained if id(parameter) in own]
        groups = [{"name": "actor", "params": actor}, {"name": "critic", "params": critic}]
        return [group for group in groups if group["params"]]

    def make_backbone(self, model: ModelSpec, peft_config: AdapterSpec | None = None) -> Backbone:
        """Return a model that fits the spaces and computes as the policy's own."""
        shapes = (self.observation_space[key].shape for key in ("prompt", "response"))
        budgets = [shape[0] for shape in shapes if shape]
        autocast = self._options["autocast"]
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', but it is {autocast!r}.")
        roles = [getattr(self.action_space, f"{role}_token_id", None) for role in ("eos", "pad")]
        options: dict[str, Any] = {
            "autocast": None if autocast is None else th.bfloat16,
            "gradient_checkpointing": self._options["gradient_checkpointing"],
            "compiled": self._options["compile"],
            "adapter": peft_config,
        }
        actor = getattr(self, "backbone", None)
        init_kwargs = dict(self._init_kwargs)
        if actor is not None:  # another model, which is elsewhere
            for name in ("quantization_config", "revision", "code_revision", "subfolder"):
                init_kwargs.pop(name, None)
        seq2seq = is_seq2seq(model, init_kwargs)
        if actor is not None and isinstance(actor, Seq2SeqBackbone) != seq2seq:
            raise ValueError(
                "Actor, critic and reference read the same sequences, so that all of them are "
                f"causal models or all of them encoder-decoders: {model!r} is of the other kind."
            )
        if isinstance(model, (str, Path)) and model != "tiny":
            options["init_kwargs"] = init_kwargs
        if not seq2seq:
            return CausalBackbone(model, self.vocab_size, sum(budgets), *roles, **options)
        return Seq2SeqBackbone(model, self.vocab_size, *budgets, *roles, **options)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            # The config, not a path: the weights are in the state dict, all of them.
            **self.saved_model(whole=True),
            **vars(self.sampling),
            "allowed_tokens": self._allowed_tokens,
            "constraint": self._constraint,
            "use_cache": self.use_cache,
            "value_model": self.saved_value_model(),
            "critic": self.critic,
            **self._options,
            "head_chunk": self.head_chunk,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def _head_chunk(given: int | None, num_logits: int) -> int:
    """Return how many tokens get their logits at a time."""
    if given is None:
        return max(1, LOGITS_AT_A_TIME // num_logits)
    if given < 1:
        raise ValueError(f"head_chunk must be a number of tokens, at least 1, but it is {given}.")
    return given
