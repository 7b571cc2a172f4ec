"""A transformer as an SB3 policy: a pure function of the observation, with a memo inside."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from agents import parallel
from agents.files import atomic_path
from agents.models.backbone import Backbone, Observation, Scope
from agents.models.causal import CausalBackbone
from agents.models.layout import SequenceBatch
from agents.models.loading import ModelSpec
from agents.policies.sampling import (
    LOGITS_AT_A_TIME,
    Sampling,
    TokenDistribution,
    in_chunks,
    token_log_probs,
    uniform,
)
from textenvs.spaces import TokenSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from agents.models.lora import AdapterSpec

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_MODEL_FOLDER = "value_model"
SAMPLING_FILE = "sampling.json"


class Scores(NamedTuple):
    """What a policy makes of actions, (actions,) each.

    Args:
        log_probs: Of the actions, under the distribution that is sampled from.
        entropies: Of these distributions, in nats.
        values: Of what the actions were chosen from. None: there is no critic.
    """

    log_probs: th.Tensor
    entropies: th.Tensor
    values: th.Tensor | None


class TransformerPolicy(ActorCriticPolicy):
    """Actor and critic on one causal language model, for environments of `textenvs`.

    The actor is the model's own head; the critic is a linear layer on the last hidden state, in
    float32 and zero at the start. It shares the actor's trunk, which costs nothing, or has a model
    of its own (`value_model`), which takes as much memory and computation again but cannot pull at
    what the actor has learned. Log-probabilities are those of the distribution that is sampled
    from: temperature, top-k, top-p and the task's allowed tokens applied. Dropout is always off,
    so that rollout and update see the same model.

    Args:
        observation_space: That of a text environment.
        action_space: A `TokenSpace` (any `Discrete` will do if every token is allowed).
        lr_schedule: Learning rate as a function of the remaining progress.
        use_sde: Must be False; it is there because SB3 passes it.
        model: "tiny" (a Llama of about a million parameters, initialised at random), a name or
            path that `AutoModelForCausalLM.from_pretrained` resolves, or a config.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        allowed_tokens: The only tokens to sample. None: what the action space says.
        use_cache: Whether to remember keys and values between calls; the answers are the same.
        value_model: What the critic reads: None (the actor's trunk), "copy" (a model of its own
            that starts as the actor's, as it is after a warm start), or like `model`.
        critic: Whether there are values at all; an algorithm without a critic needs none, and what
            asks for them gets zeros.
        peft_config: A `peft.LoraConfig` or a dict of its arguments, e.g. `{"r": 16}`: train an
            adapter (and the value head) only. The critic must share the trunk.
        autocast: "bfloat16": the trunks compute in it, in rollouts and updates alike, on CPU and
            GPU. Weights, log-probabilities, values and losses stay in float32. None: float32.
        gradient_checkpointing: Whether updates compute the layers twice in order to hold less.
        compile: Whether `torch.compile` makes programs of what a rollout does at each step, on a
            GPU captured graphs. That takes a minute at first, and memory for the longest sequences
            is held throughout.
        head_chunk: How many tokens of an update get their logits at a time, so that no array of
            tokens times vocabulary is held. None: as many as make 2^24 logits.
        optimizer_class: AdamW-like or Adam; `th.optim.Adam` by default.
        optimizer_kwargs: Its arguments besides the learning rate; for Adam eps is 1e-5 by default.

    Raises:
        ValueError: If the spaces are not those of a text environment, or the model does not fit.
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
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        allowed_tokens: list[int] | None = None,
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
        _check_spaces(observation_space, action_space)
        self.use_sde = False
        self.sampling = Sampling(temperature, top_k, top_p)
        self.use_cache = use_cache
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.vocab_size = int(cast(spaces.Discrete, action_space).n)
        # Whether the first weights were somebody's work, and not drawn at random.
        self.pretrained = isinstance(model, (str, Path)) and model != "tiny"
        if value_model is not None and not critic:
            raise ValueError("A value_model is a critic's: leave it out, or critic=False.")
        if value_model is not None and peft_config is not None:
            raise ValueError(
                "With peft_config the critic shares the actor's trunk: leave value_model out."
            )
        self._peft_config = peft_config
        self._options: dict[str, Any] = {
            "autocast": autocast,
            "gradient_checkpointing": gradient_checkpointing,
            "compile": compile,
        }
        self.backbone = self.make_backbone(model, peft_config)
        self.head_chunk = _head_chunk(head_chunk, self.backbone.num_logits)
        # Whether the critic starts, and after a warm start again, as the actor.
        self.value_model_is_copy = value_model == "copy"
        self.value_backbone: Backbone | None = None
        if self.value_model_is_copy:
            self.value_backbone = copy.deepcopy(self.backbone)
        elif value_model is not None:
            self.value_backbone = self.make_backbone(value_model)
        self.value_head: nn.Linear | None = None
        if critic:
            self.value_head = nn.Linear((self.value_backbone or self.backbone).hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._allowed_tokens = allowed_tokens
        self.register_buffer("_allowed", self._allowed_mask(), persistent=False)
        self.optimizer = self.optimizer_class(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def make_backbone(self, model: ModelSpec, peft_config: AdapterSpec | None = None) -> Backbone:
        """Return a model that fits the spaces and computes as the policy's own."""
        budgets = [self.observation_space[key].shape for key in ("prompt", "response")]
        autocast = self._options["autocast"]
        if autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast must be None or 'bfloat16', but it is {autocast!r}.")
        return CausalBackbone(
            model,
            self.vocab_size,
            sum(shape[0] for shape in budgets if shape),
            getattr(self.action_space, "eos_token_id", None),
            getattr(self.action_space, "pad_token_id", None),
            adapter=peft_config,
            autocast=None if autocast is None else th.bfloat16,
            gradient_checkpointing=self._options["gradient_checkpointing"],
            compiled=self._options["compile"],
        )

    def copy_actor_to_critic(self) -> None:
        """Let a critic that is a copy start from the actor as it is now."""
        if self.value_model_is_copy and self.value_backbone is not None:
            self.value_backbone.load_state_dict(self.backbone.state_dict())
            self.value_backbone.clear_cache()

    @property
    def critic(self) -> bool:
        """Whether there are values."""
        return self.value_head is not None

    @property
    def separate_critic(self) -> bool:
        """Whether the critic has a model of its own."""
        return self.value_backbone is not None

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the next token of each row, its value (n, 1) and its log-probability (n,)."""
        actions, log_prob, hidden = self._next_tokens(obs, deterministic)
        if self.value_backbone is not None:
            hidden = self._last_hidden(obs, self.value_backbone)
        actions, values, log_prob = _where_asked(obs, actions, self._values(hidden), log_prob)
        return actions, values, log_prob

    @th.no_grad()
    def act(
        self, observation: Observation
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]:
        """Return the next tokens, their log-probabilities and what their values are, (rows,) each.

        A critic of its own is not asked: `values` asks it for whole sequences at once.

        Args:
            observation: Of each row, on the host.
        """
        actions, log_prob, hidden = self._next_tokens(cast("PyTorchObs", observation), False)
        answers = [actions, log_prob]
        if self.critic and not self.separate_critic:
            answers.append(self._values(hidden).flatten())
        arrays = [answer.numpy() for answer in _moved(th.device("cpu"), *answers)]
        return arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None

    def _next_tokens(
        self, obs: PyTorchObs, deterministic: bool
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the next tokens, their log-probabilities, and the hidden states behind them."""
        hidden = self._last_hidden(obs, self.backbone)
        numbers = None if deterministic else uniform(hidden)
        actions, log_prob = self._program(("draw", self.sampling), self._draw)(hidden, numbers)
        return actions, log_prob, hidden

    def score(
        self, batch: SequenceBatch, actions: th.Tensor, entropy_gradient: bool = True
    ) -> Scores:
        """Return what the policy makes of the actions of sequences, one forward for each sequence.

        Args:
            batch: The sequences.
            actions: (n,) the tokens emitted, in the order of the sequences.
            entropy_gradient: Whether the entropies need gradients, which take time and memory.
        """
        return self._scores(batch, actions, entropy_gradient)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return values (n, 1), log-probabilities (n,) and entropies (n,) of actions.

        Args:
            obs: Sequences, as `SequenceRolloutBuffer` yields them: one forward each. Or
                observations of the environment, one for each action.
            actions: (n,) the tokens emitted, in the order of the sequences.
        """
        scores = self._scores(obs, actions, entropy_gradient=True)
        values = scores.values
        if values is None:
            values = th.zeros_like(scores.log_probs)
        return values[:, None], scores.log_probs, scores.entropies

    def _scores(
        self, obs: PyTorchObs | SequenceBatch, actions: th.Tensor, entropy_gradient: bool
    ) -> Scores:
        hidden = self.action_hidden(self.backbone, obs)

        def score(hidden: th.Tensor, tokens: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            if entropy_gradient:
                distribution = self._distribution(hidden, tokens)
                return distribution.log_prob(tokens), distribution.entropy()
            logits = self._logits(hidden)
            scores = self.sampling.scores(logits, self._allowed_or_none(), keep=tokens)
            return token_log_probs(scores, tokens)

        log_prob, entropy = in_chunks(score, hidden, actions.long().flatten(), self.head_chunk)
        if not self.critic:
            return Scores(log_prob, entropy, None)
        if self.value_backbone is not None:
            hidden = self.action_hidden(self.value_backbone, obs)
        return Scores(log_prob, entropy, self._values(hidden).flatten())

    def values(self, batch: SequenceBatch) -> th.Tensor:
        """Return the values (n,) of what the actions of sequences were chosen from."""
        return self._values(
            self.action_hidden(self.value_backbone or self.backbone, batch)
        ).flatten()

    def observation_values(self, observation: Observation) -> th.Tensor:
        """Return the values (n,) of observations on the host, without the prefix cache."""
        hidden = (self.value_backbone or self.backbone).last_hidden(observation)
        return self._values(hidden).flatten()

    def log_probs(
        self, backbone: Backbone, obs: PyTorchObs | SequenceBatch, actions: th.Tensor
    ) -> th.Tensor:
        """Return the log-probabilities (n,) of actions under another model, sampled alike."""

        def score(hidden: th.Tensor, tokens: th.Tensor) -> tuple[th.Tensor]:
            return (self._distribution(hidden, tokens, backbone.logits).log_prob(tokens),)

        hidden = self.action_hidden(backbone, obs)
        return in_chunks(score, hidden, actions.long().flatten(), self.head_chunk)[0]

    @staticmethod
    def action_hidden(backbone: Backbone, obs: PyTorchObs | SequenceBatch) -> th.Tensor:
        """Return the hidden states (n, hidden) from which actions were or will be chosen."""
        if isinstance(obs, SequenceBatch):
            return backbone.hidden_states(obs)
        observations = cast("dict[str, th.Tensor]", obs)
        if "action_positions" not in observations:
            return backbone.last_hidden(on_host(observations))
        tokens, positions = observations["tokens"], observations["action_positions"]
        starts = observations.get("turn_starts", positions)
        return backbone.hidden_states(SequenceBatch(tokens, positions, starts))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """Return the values (n, 1) of observations."""
        observation = on_host(cast("dict[str, th.Tensor]", obs))
        backbone = self.value_backbone or self.backbone
        return _where_asked(obs, self._values(self._last_hidden(observation, backbone)))[0]

    def get_distribution(self, obs: PyTorchObs) -> TokenDistribution:
        """Return the distribution over the next token of each row."""
        return self._next_distribution(self._last_hidden(obs, self.backbone, scope="predict"))

    def set_training_mode(self, mode: bool) -> None:
        """Keep dropout off in either mode; an update may follow, so forget keys and values."""
        self.train(False)
        self.training = mode
        if mode:
            self.clear_cache()

    def start_rollout(self, steps: int) -> None:
        """Drop all keys and values, and prepare for so many steps."""
        self.backbone.start_rollout(steps)
        if self.value_backbone is not None:
            self.value_backbone.start_rollout(steps)

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Expect the rollout to go on with these of its rows, in this order."""
        self.backbone.keep_rows(rows)

    def clear_cache(self) -> None:
        """Drop all keys and values."""
        self.backbone.clear_cache()
        if self.value_backbone is not None:
            self.value_backbone.clear_cache()

    def save_pretrained(
        self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Write an ordinary Hugging Face folder: model, tokenizer, and the value head beside it.

        A LoRA adapter is added to the weights; a critic's own model is in a folder inside. With
        several ranks the main one writes.

        Args:
            directory: Where to; `AutoModelForCausalLM.from_pretrained` reads it.
            tokenizer: The tokenizer to write. None: the environment's, if `agents.PPO` set it.

        Raises:
            ValueError: If the folder holds something else, since it is replaced as a whole.
        """
        from safetensors.torch import save_file

        if not parallel.is_main():
            return
        directory = Path(directory)
        if not (directory / VALUE_HEAD_FILE).exists() and (
            directory.is_file() or (directory.is_dir() and any(directory.iterdir()))
        ):
            raise ValueError(
                f"{directory} holds something that save_pretrained did not write and would "
                "replace: choose a new or empty folder."
            )
        tokenizer = tokenizer or self.tokenizer
        with atomic_path(directory) as folder:
            folder.mkdir()
            self.backbone.save_pretrained(folder)
            if self.value_backbone is not None:
                self.value_backbone.save_pretrained(folder / VALUE_MODEL_FOLDER)
            weights = {} if self.value_head is None else self.value_head.state_dict()
            head = {name: value.detach().contiguous() for name, value in weights.items()}
            save_file(head, folder / VALUE_HEAD_FILE)
            (folder / SAMPLING_FILE).write_text(json.dumps(vars(self.sampling)))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

    def load_value_head(self, directory: str | Path) -> None:
        """Read the value head from a folder that `save_pretrained` wrote."""
        from safetensors.torch import load_file

        if self.value_head is None:
            raise ValueError("The policy has no critic: make it with critic=True.")
        self.value_head.load_state_dict(load_file(Path(directory) / VALUE_HEAD_FILE))

    def _last_hidden(
        self, obs: PyTorchObs, backbone: Backbone, scope: Scope = "rollout"
    ) -> th.Tensor:
        observations = cast("dict[str, th.Tensor]", obs)
        if self._remembers:
            return backbone.next_hidden(on_host(observations), scope)
        return self.action_hidden(backbone, observations)

    def _program(self, key: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function as rollouts run it."""
        return self.backbone.program(key, function) if self._remembers else function

    def _draw(self, hidden: th.Tensor, numbers: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """Return tokens, the most likely ones or drawn by `numbers`, and log-probabilities."""
        distribution = self._next_distribution(hidden)
        actions = distribution.mode() if numbers is None else distribution.at(numbers)
        return actions, distribution.log_prob(actions)

    def _distribution(
        self,
        hidden: th.Tensor,
        keep: th.Tensor | None = None,
        head: Callable[[th.Tensor], th.Tensor] | None = None,
    ) -> TokenDistribution:
        logits = self._logits(hidden, head)
        return TokenDistribution(self.sampling.log_probs(logits, self._allowed_or_none(), keep))

    def _logits(
        self, hidden: th.Tensor, head: Callable[[th.Tensor], th.Tensor] | None = None
    ) -> th.Tensor:
        # A model's vocabulary may be padded; those logits are never sampled.
        return (head or self.backbone.logits)(hidden)[:, : self.vocab_size]

    def _next_distribution(self, hidden: th.Tensor) -> TokenDistribution:
        """Return the distribution over the next token, by what rollouts run the head by."""
        return self._distribution(
            hidden, head=self.backbone.next_logits if self._remembers else None
        )

    @property
    def _remembers(self) -> bool:
        """Whether keys and values are remembered now."""
        return self.use_cache and not th.is_grad_enabled()

    def _values(self, hidden: th.Tensor) -> th.Tensor:
        if self.value_head is None:
            return hidden.new_zeros(len(hidden), 1, dtype=th.float32)
        return cast("th.Tensor", self.value_head(hidden.float()))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.get_distribution(observation).get_actions(deterministic)

    def _allowed_or_none(self) -> th.Tensor | None:
        allowed = cast("th.Tensor", self._allowed)
        return allowed if len(allowed) else None

    def _allowed_mask(self) -> th.Tensor:
        """Return a mask over the vocabulary, empty if all tokens are allowed."""
        allowed = self._allowed_tokens
        if allowed is None:
            allowed = getattr(self.action_space, "allowed_tokens", None)
        if allowed is None:
            return th.zeros(0, dtype=th.bool)
        if not allowed or min(allowed) < 0 or max(allowed) >= self.vocab_size:
            raise ValueError(
                f"allowed_tokens must be ids in [0, {self.vocab_size}), at least one, "
                f"but they are {allowed}."
            )
        mask = th.zeros(self.vocab_size, dtype=th.bool)
        mask[list(allowed)] = True
        return mask

    def saved_value_model(self) -> ModelSpec | None:
        """Return the `value_model` to make the policy with before its weights are loaded."""
        if self.value_backbone is None:
            return None
        return "copy" if self.value_model_is_copy else self.value_backbone.config

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            # The config, not a path: the weights are in the state dict.
            "model": self.backbone.config,
            **vars(self.sampling),
            "allowed_tokens": self._allowed_tokens,
            "use_cache": self.use_cache,
            "value_model": self.saved_value_model(),
            "critic": self.critic,
            "peft_config": self._peft_config,
            **self._options,
            "head_chunk": self.head_chunk,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def on_host(observations: Mapping[str, th.Tensor | npt.NDArray[Any]]) -> dict[str, Any]:
    """Return observations as arrays; those that are on the host are not copied.

    Raises:
        ValueError: If SB3 has cut a longer prompt or response into several rows.
    """
    arrays = {
        key: value.cpu().numpy() if isinstance(value, th.Tensor) else value
        for key, value in observations.items()
    }
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(
            "The observation is that of an environment of other budgets than the policy's: make "
            "it with the same tokenizer, max_prompt_tokens and max_new_tokens."
        )
    return arrays


def _where_asked(obs: PyTorchObs, *answers: th.Tensor) -> tuple[th.Tensor, ...]:
    """Return answers where the observations are, in one transfer for each type."""
    (asked,) = {value.device for value in cast("dict[str, th.Tensor]", obs).values()}
    return _moved(asked, *answers)


def _moved(asked: th.device, *answers: th.Tensor) -> tuple[th.Tensor, ...]:
    """Return tensors on a device, in one transfer for each type."""
    if all(answer.device == asked for answer in answers):
        return answers
    moved: list[th.Tensor] = list(answers)
    for dtype in {answer.dtype for answer in answers}:
        alike = [i for i, answer in enumerate(answers) if answer.dtype == dtype]
        joined = th.cat([answers[i].flatten() for i in alike]).to(asked)
        for i, part in zip(alike, joined.split([answers[i].numel() for i in alike]), strict=True):
            moved[i] = part.view(answers[i].shape)
    return tuple(moved)


def _head_chunk(given: int | None, num_logits: int) -> int:
    """Return how many tokens get their logits at a time."""
    if given is None:
        return max(1, LOGITS_AT_A_TIME // num_logits)
    if given < 1:
        raise ValueError(f"head_chunk must be a number of tokens, at least 1, but it is {given}.")
    return given


def _check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    keys = {"prompt", "prompt_length", "response", "response_length"}
    if not isinstance(observation_space, spaces.Dict) or not keys <= set(observation_space):
        raise ValueError(
            f"TransformerPolicy reads a Dict observation with {sorted(keys)}, as the environments "
            f"of textenvs give it, but the observation space is {observation_space}."
        )
    if observation_space["prompt_length"].shape != (1,):
        raise ValueError(
            "TransformerPolicy reads one observation at a time, not several stacked, but the "
            f"shape of prompt_length is {observation_space['prompt_length'].shape}, not (1,)."
        )
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            f"TransformerPolicy emits tokens, so it needs a {TokenSpace.__name__} or another "
            f"Discrete action space, but it is {action_space}."
        )
