"""A transformer as an SB3 policy: a pure function of the observation, with a memo inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from agents.backbones import CausalBackbone, ModelSpec
from agents.files import atomic_path
from agents.sampling import Sampling, TokenDistribution
from textenvs.spaces import TokenSpace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALUE_HEAD_FILE = "value_head.safetensors"
SAMPLING_FILE = "sampling.json"


class TransformerPolicy(ActorCriticPolicy):
    """Actor and critic on one causal language model, for environments of `textenvs`.

    The actor is the model's own head; the critic is a linear layer on the last hidden state, in
    float32 and zero at the start. Log-probabilities are those of the distribution that is sampled
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
        optimizer_class: AdamW-like or Adam; `th.optim.Adam` by default.
        optimizer_kwargs: Its arguments besides the learning rate; eps is 1e-5 for Adam by default.

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
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class is th.optim.Adam else {}
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
        budgets = [self.observation_space[key].shape for key in ("prompt", "response")]
        self.backbone = CausalBackbone(
            model,
            self.vocab_size,
            sum(shape[0] for shape in budgets if shape),
            getattr(action_space, "eos_token_id", None),
            getattr(action_space, "pad_token_id", None),
        )
        self.value_head = nn.Linear(self.backbone.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._allowed_tokens = allowed_tokens
        self.register_buffer("_allowed", self._allowed_mask(), persistent=False)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the next token of each row, its value (n, 1) and its log-probability (n,)."""
        hidden = self._last_hidden(obs)
        distribution = self._distribution(hidden)
        actions = distribution.get_actions(deterministic)
        return actions, self._values(hidden), distribution.log_prob(actions)

    def evaluate_actions(
        self, obs: PyTorchObs, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Return values, log-probabilities and entropies of actions.

        Args:
            obs: Sequences, as `SequenceRolloutBuffer` yields them (`tokens`, `action_positions`):
                one forward each. Or observations of the environment, one for each action.
            actions: (n,) the tokens emitted, in the order of the sequences.

        Returns:
            Three tensors of shape (n,), values of shape (n, 1).
        """
        hidden = self.action_hidden(self.backbone, obs)
        actions = actions.long().flatten()
        distribution = self._distribution(hidden, keep=actions)
        return self._values(hidden), distribution.log_prob(actions), distribution.entropy()

    def log_probs(self, backbone: CausalBackbone, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """Return the log-probabilities (n,) of actions under another model, sampled alike."""
        actions = actions.long().flatten()
        logits = backbone.head(self.action_hidden(backbone, obs))[:, : self.vocab_size]
        return TokenDistribution(
            self.sampling.log_probs(logits, self._allowed_or_none(), keep=actions)
        ).log_prob(actions)

    @staticmethod
    def action_hidden(backbone: CausalBackbone, obs: PyTorchObs) -> th.Tensor:
        """Return the hidden states (n, hidden) from which actions were or will be chosen."""
        observations = cast("dict[str, th.Tensor]", obs)
        if "action_positions" not in observations:
            return backbone.last_hidden(*join_tokens(observations), memo=False)
        hidden = backbone.trunk(input_ids=observations["tokens"], use_cache=False)
        return hidden[observations["action_positions"]]

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """Return the values (n, 1) of observations."""
        return self._values(self._last_hidden(obs))

    def get_distribution(self, obs: PyTorchObs) -> TokenDistribution:
        """Return the distribution over the next token of each row."""
        return self._distribution(self._last_hidden(obs))

    def set_training_mode(self, mode: bool) -> None:
        """Keep dropout off in either mode; an update may follow, so forget keys and values."""
        self.train(False)
        self.training = mode
        if mode:
            self.backbone.forget()

    def save_pretrained(
        self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Write an ordinary Hugging Face folder: model, tokenizer, and the value head beside it.

        Args:
            directory: Where to; `AutoModelForCausalLM.from_pretrained` reads it.
            tokenizer: The tokenizer to write. None: the environment's, if `agents.PPO` set it.

        Raises:
            ValueError: If the folder holds something else, since it is replaced as a whole.
        """
        from safetensors.torch import save_file

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
            self.backbone.model.save_pretrained(folder)
            head = {k: v.detach().contiguous() for k, v in self.value_head.state_dict().items()}
            save_file(head, folder / VALUE_HEAD_FILE)
            (folder / SAMPLING_FILE).write_text(json.dumps(vars(self.sampling)))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))

    def load_value_head(self, directory: str | Path) -> None:
        """Read the value head from a folder that `save_pretrained` wrote."""
        from safetensors.torch import load_file

        self.value_head.load_state_dict(load_file(Path(directory) / VALUE_HEAD_FILE))

    def _last_hidden(self, obs: PyTorchObs) -> th.Tensor:
        observations = cast("dict[str, th.Tensor]", obs)
        memo = self.use_cache and not th.is_grad_enabled()
        return self.backbone.last_hidden(*join_tokens(observations), memo=memo)

    def _distribution(self, hidden: th.Tensor, keep: th.Tensor | None = None) -> TokenDistribution:
        # The model's vocabulary may be padded; those logits are never sampled.
        logits = self.backbone.head(hidden)[:, : self.vocab_size]
        return TokenDistribution(self.sampling.log_probs(logits, self._allowed_or_none(), keep))

    def _values(self, hidden: th.Tensor) -> th.Tensor:
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
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def join_tokens(observations: dict[str, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
    """Return prompt and response as one right-padded row of tokens, and the rows' lengths.

    Args:
        observations: A batch of observations of a text environment.

    Returns:
        (n, width) with the width of the longest row, and (n,).
    """
    prompt, response = observations["prompt"].long(), observations["response"].long()
    prompt_length = observations["prompt_length"].long().reshape(-1, 1)
    lengths = prompt_length[:, 0] + observations["response_length"].long().reshape(-1)
    index = th.arange(int(lengths.max()), device=prompt.device)[None, :].expand(len(prompt), -1)
    from_prompt = prompt.gather(1, index.clamp(max=prompt.shape[1] - 1))
    behind = (index - prompt_length).clamp(0, response.shape[1] - 1)
    return th.where(index < prompt_length, from_prompt, response.gather(1, behind)), lengths


def _check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    keys = {"prompt", "prompt_length", "response", "response_length"}
    if not isinstance(observation_space, spaces.Dict) or not keys <= set(observation_space):
        raise ValueError(
            f"TransformerPolicy reads a Dict observation with {sorted(keys)}, as the environments "
            f"of textenvs give it, but the observation space is {observation_space}."
        )
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            f"TransformerPolicy emits tokens, so it needs a {TokenSpace.__name__} or another "
            f"Discrete action space, but it is {action_space}."
        )
