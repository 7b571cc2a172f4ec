"""Actor and critic on a `Backbone`: a pure function of the observation, with a memo inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from agents.models.backbone import Backbone, Observation, Scope
from agents.models.layout import SequenceBatch
from agents.policies.heads import CriticMixin
from agents.policies.masks import Places, TokenMasks
from agents.policies.observations import action_hidden, as_sequences, moved, on_host, where_asked
from agents.policies.sampling import (
    Sampling,
    TokenDistribution,
    in_chunks,
    token_log_probs,
    uniform,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# From hidden states (n, hidden) to logits (n, at least the vocabulary).
Head = Callable[[th.Tensor], th.Tensor]


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


class BackbonePolicy(CriticMixin, ActorCriticPolicy):
    """What an SB3 policy computes by a `Backbone`, whatever kind of model that is.

    Attributes:
        sampling: How logits become the distribution that is sampled from.
        masks: Which tokens may be said.
        vocab_size: How many tokens there are; a model may have more logits.
        head_chunk: How many actions get their logits at a time in an update.
        use_cache: Whether rollouts and predictions ask the backbone for what it remembers.
        tokenizer: The environment's, if it is known.
        facts: What an algorithm has said of the training, for the model card; name and value.
    """

    sampling: Sampling
    masks: TokenMasks
    vocab_size: int
    head_chunk: int
    use_cache: bool
    tokenizer: PreTrainedTokenizerBase | None
    facts: dict[str, Any]

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the next token of each row, its value (n, 1) and its log-probability (n,)."""
        actions, log_prob, hidden = self._next_tokens(obs, deterministic)
        if self.value_backbone is not None:
            hidden = self._last_hidden(obs, self.value_backbone)
        actions, values, log_prob = where_asked(obs, actions, self._values(hidden), log_prob)
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
        if type(self).forward is not BackbonePolicy.forward:  # a subclass acts otherwise
            tensors = {key: th.from_numpy(array) for key, array in observation.items()}
            actions, values, log_prob = self(tensors)
            return actions.cpu().numpy(), log_prob.cpu().numpy(), values.flatten().cpu().numpy()
        actions, log_prob, hidden = self._next_tokens(cast("PyTorchObs", observation), False)
        answers = [actions, log_prob]
        if self.critic and not self.separate_critic:
            answers.append(self._values(hidden).flatten())
        arrays = [answer.numpy() for answer in moved(th.device("cpu"), *answers)]
        return arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None

    def score(
        self, batch: SequenceBatch, actions: th.Tensor, entropy_gradient: bool = True
    ) -> Scores:
        """Return what the policy makes of the actions of sequences, one forward for each sequence.

        Args:
            batch: The sequences.
            actions: (n,) the tokens emitted, in the order of the sequences.
            entropy_gradient: Whether the entropies need gradients, which take time and memory.
        """
        if type(self).evaluate_actions is not BackbonePolicy.evaluate_actions:
            samples = cast("PyTorchObs", batch.tensors())
            values, log_prob, entropy = self.evaluate_actions(samples, actions)
            return Scores(log_prob, entropy, values.flatten() if self.critic else None)
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
        values = th.zeros_like(scores.log_probs) if scores.values is None else scores.values
        return values[:, None], scores.log_probs, scores.entropies

    def log_probs(
        self, backbone: Backbone, obs: PyTorchObs | SequenceBatch, actions: th.Tensor
    ) -> th.Tensor:
        """Return the log-probabilities (n,) of actions under another model, sampled alike.

        What may be said is what action space and constraint allow.
        """

        def score(hidden: th.Tensor, tokens: th.Tensor, *said: Places) -> tuple[th.Tensor]:
            allowed = self._allowed(*said)
            distribution = self._distribution(backbone.logits, hidden, allowed, tokens)
            return (distribution.log_prob(tokens),)

        hidden, tokens = action_hidden(backbone, obs), actions.long().flatten()
        return in_chunks(score, hidden, tokens, self.head_chunk, *self.masks.said(obs))[0]

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """Return the values (n, 1) of observations, or of what sequences' actions came from."""
        return where_asked(obs, self._values(self._last_hidden(obs, self.critic_backbone)))[0]

    @th.no_grad()
    def next_values(
        self, observation: Observation, rows: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.float32]:
        """Return the values of some rows of what follows the last `act`, (rows,).

        Args:
            observation: Of all rows, on the host.
            rows: Those that are wanted.
        """
        if type(self).predict_values is not BackbonePolicy.predict_values:
            tensors = {key: th.from_numpy(array) for key, array in observation.items()}
            return self.predict_values(tensors).flatten().cpu().numpy()[rows]
        if self.separate_critic:
            wanted = {key: values[rows] for key, values in observation.items()}
            return self.observation_values(wanted).cpu().numpy()
        unwanted = np.ones((len(observation["prompt"]), 1), dtype=np.bool_)
        unwanted[rows] = False
        # Of the others one token is read and no more.
        short = {"prompt_length": 1, "response_length": 0}
        shortened = {key: np.where(unwanted, n, observation[key]) for key, n in short.items()}
        obs = cast("PyTorchObs", {**observation, **shortened})
        return self._values(self._last_hidden(obs, self.backbone)).flatten().cpu().numpy()[rows]

    def get_distribution(self, obs: PyTorchObs) -> TokenDistribution:
        """Return the distribution over the next token of each row, or of sequences' actions."""
        head = self._head if as_sequences(obs) is None else self.backbone.logits
        hidden = self._last_hidden(obs, self.backbone, scope="predict")
        return self._distribution(head, hidden, self._mask(*self._said(obs)))

    def set_training_mode(self, mode: bool) -> None:
        """Keep dropout off in either mode; an update may follow, so forget keys and values."""
        self.train(False)
        self.training = mode
        if mode:
            self.clear_cache()

    @property
    def backbones(self) -> list[Backbone]:
        """All models that rollouts ask, the actor's first."""
        return [each for each in (self.backbone, self.value_backbone) if each is not None]

    def start_rollout(self, steps: int) -> None:
        """Drop all keys and values, and prepare for so many steps."""
        for backbone in self.backbones:
            backbone.start_rollout(steps)

    def keep_rows(self, rows: npt.NDArray[np.intp]) -> None:
        """Expect the rollout to go on with these of its rows, in this order."""
        for backbone in self.backbones:
            backbone.keep_rows(rows)

    def clear_cache(self) -> None:
        """Drop all keys and values, and the states of a constraint."""
        self.masks.clear()
        for backbone in self.backbones:
            backbone.clear_cache()

    def _next_tokens(
        self, obs: PyTorchObs, deterministic: bool
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the next tokens, their log-probabilities, and the hidden states behind them."""
        hidden = self._last_hidden(obs, self.backbone)
        numbers = None if deterministic else uniform(hidden)
        draw: Callable[..., Any] = self._draw
        if self._remembers:
            draw = self.backbone.program(("draw", self.sampling), draw)
        mask = self._mask(*self._said(obs, "rollout"))
        actions, log_prob = draw(hidden, numbers, mask)
        return actions, log_prob, hidden

    def _draw(
        self, hidden: th.Tensor, numbers: th.Tensor | None, mask: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Return tokens, the most likely ones or drawn by `numbers`, and log-probabilities."""
        distribution = self._distribution(self._head, hidden, mask)
        actions = distribution.mode() if numbers is None else distribution.at(numbers)
        return actions, distribution.log_prob(actions)

    def _scores(
        self, obs: PyTorchObs | SequenceBatch, actions: th.Tensor, entropy_gradient: bool
    ) -> Scores:
        def score(hidden: th.Tensor, tokens: th.Tensor, *said: Any) -> tuple[th.Tensor, th.Tensor]:
            mask = self._mask(*said, keep=tokens)
            if entropy_gradient:
                distribution = self._distribution(self.backbone.logits, hidden, mask, tokens)
                return distribution.log_prob(tokens), distribution.entropy()
            logits = self.backbone.logits(hidden)[:, : self.vocab_size]
            return token_log_probs(self.sampling.scores(logits, mask, keep=tokens), tokens)

        hidden, tokens = action_hidden(self.backbone, obs), actions.long().flatten()
        said = self._said(obs)
        log_prob, entropy = in_chunks(score, hidden, tokens, self.head_chunk, *said)
        if not self.critic:
            return Scores(log_prob, entropy, None)
        if self.value_backbone is not None:
            hidden = action_hidden(self.value_backbone, obs)
        elif self.vf_detach:
            hidden = hidden.detach()
        return Scores(log_prob, entropy, self._values(hidden).flatten())

    def _distribution(
        self,
        head: Head,
        hidden: th.Tensor,
        mask: th.Tensor | None,
        keep: th.Tensor | None = None,
    ) -> TokenDistribution:
        # A model's vocabulary may be padded; those logits are never sampled.
        logits = head(hidden)[:, : self.vocab_size]
        return TokenDistribution(self.sampling.log_probs(logits, mask, keep))

    def _said(
        self, obs: PyTorchObs | SequenceBatch, scope: Scope = "predict"
    ) -> tuple[Sequence[Any], ...]:
        """Return what masks are made of wherever a token is chosen; see `TokenMasks.said`."""
        return self.masks.said(obs, scope)

    def _mask(self, *said: Any, keep: th.Tensor | None = None) -> th.Tensor | None:
        """Return what the policy may say in each of some places, or everywhere; None: everything.

        Args:
            said: Of these places, see `_said`.
            keep: (n,) tokens that were said there, and so may be.
        """
        return self._allowed(*said)

    def _allowed(self, *said: Places) -> th.Tensor | None:
        """Return what action space and constraint allow there; see `_mask`."""
        if not said:
            return self.masks.allowed
        return cast("th.Tensor", self.masks(*said, self.device, self.tokenizer))

    def _last_hidden(
        self, obs: PyTorchObs | SequenceBatch, backbone: Backbone, scope: Scope = "rollout"
    ) -> th.Tensor:
        if self._remembers and as_sequences(obs) is None:
            return backbone.next_hidden(on_host(cast("dict[str, th.Tensor]", obs)), scope)
        return action_hidden(backbone, obs)

    @property
    def _remembers(self) -> bool:
        """Whether keys and values are remembered now."""
        return self.use_cache and not th.is_grad_enabled()

    @property
    def _head(self) -> Head:
        """What makes logits of hidden states in rollouts and predictions."""
        return self.backbone.next_logits if self._remembers else self.backbone.logits

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.get_distribution(observation).get_actions(deterministic)
