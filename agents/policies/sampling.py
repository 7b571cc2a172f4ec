"""The distribution over the next token: processed once, sampled from and scored alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch as th
from stable_baselines3.common.distributions import Distribution
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# How many logits are held at a time by default, in float32: 64 MiB to each array of that shape.
LOGITS_AT_A_TIME = 2**24


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that is sampled from and whose log-probs are stored.

    Args:
        temperature: Logits are divided by it.
        top_k: Keep the k most likely tokens. 0: all.
        top_p: Keep the smallest set of most likely tokens with at least this probability. 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that make no distribution."""
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, but it is {self.temperature}; "
                "for greedy decoding use predict(..., deterministic=True)."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, but it is {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], but it is {self.top_p}.")

    def log_probs(
        self, logits: th.Tensor, allowed: th.Tensor | None, keep: th.Tensor | None = None
    ) -> th.Tensor:
        """Return the log-probabilities of the processed distribution; see `scores`."""
        return F.log_softmax(self.scores(logits, allowed, keep), dim=-1)

    def scores(
        self, logits: th.Tensor, allowed: th.Tensor | None, keep: th.Tensor | None = None
    ) -> th.Tensor:
        """Return the logits of the processed distribution, in float32; -inf is impossible.

        Args:
            logits: (n, vocabulary), of any float type.
            allowed: Boolean (vocabulary,) or (n, vocabulary), the tokens that may be sampled, or
                None for all.
            keep: (n,) tokens that stay in the distribution whatever top-k and top-p say: those
                that were sampled from it, when it is evaluated again after an update.
        """
        scores = logits.float()
        if self.temperature != 1:  # a pass over all logits, forward and backward
            scores = scores / self.temperature
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -th.inf)
        if 0 < self.top_k < scores.shape[-1]:
            threshold = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(_unless_kept(scores < threshold, keep), -th.inf)
        if self.top_p < 1:
            probs, order = F.softmax(scores, dim=-1).sort(dim=-1, descending=True)
            tail = probs.cumsum(dim=-1) - probs >= self.top_p
            outside = th.zeros_like(tail).scatter(-1, order, tail)
            scores = scores.masked_fill(_unless_kept(outside, keep), -th.inf)
        return scores


def _unless_kept(removed: th.Tensor, keep: th.Tensor | None) -> th.Tensor:
    return removed if keep is None else removed.scatter(-1, keep[:, None], False)


class TokenDistribution(Distribution):
    """A categorical distribution over a large vocabulary, given by its log-probabilities.

    Unlike `torch.distributions.Categorical` it checks no simplex (which fails by rounding from
    about a thousand tokens) and draws one number a row, from torch's default generator.

    Args:
        log_probs: (n, vocabulary) float32, normalised; -inf where a token cannot be sampled.
    """

    def __init__(self, log_probs: th.Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def proba_distribution_net(self, *args: object, **kwargs: object) -> th.nn.Module:
        """Not used: the model's own head gives the logits."""
        raise TypeError("A TokenDistribution has no network of its own.")

    def proba_distribution(self, log_probs: th.Tensor) -> TokenDistribution:
        """Set the log-probabilities."""
        self.log_probs = log_probs
        return self

    def log_prob(self, x: th.Tensor) -> th.Tensor:
        """Return the log-probability of one token a row, shape (n,)."""
        return self.log_probs.gather(-1, x.long().reshape(-1, 1)).squeeze(-1)

    def entropy(self) -> th.Tensor:
        """Return the entropies in nats, shape (n,)."""
        if not th.is_grad_enabled():
            # In place, since these are large; what is impossible counts as 0 times infinity.
            return -self.log_probs.exp().mul_(self.log_probs).nansum(dim=-1)
        # Where it is less the probability is 0. The gradient, too, must not be 0 times infinity.
        finite = self.log_probs.clamp(min=-1e4)
        return -(self.log_probs.exp() * finite).sum(dim=-1)

    def sample(self) -> th.Tensor:
        """Draw a token for each row by inverting the cumulative distribution, shape (n,)."""
        return self.at(uniform(self.log_probs))

    def at(self, numbers: th.Tensor) -> th.Tensor:
        """Return the tokens (n,) at points (n, 1) in [0, 1] of the cumulative distribution."""
        cumulative = self.log_probs.exp().cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Rounding can put the point on the very end; the last possible token is meant.
        below = th.nextafter(total, th.zeros_like(total))
        tokens = th.searchsorted(cumulative, th.minimum(numbers * total, below), right=True)
        # Only what is not finite lies outside.
        return tokens.squeeze(-1).clamp(max=cumulative.shape[-1] - 1)

    def mode(self) -> th.Tensor:
        """Return the most likely token of each row, shape (n,)."""
        return self.log_probs.argmax(dim=-1)

    def actions_from_params(self, log_probs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """Set the log-probabilities and draw."""
        return self.proba_distribution(log_probs).get_actions(deterministic)

    def log_prob_from_params(self, log_probs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Set the log-probabilities, draw, and return the tokens with their log-probabilities."""
        actions = self.actions_from_params(log_probs)
        return actions, self.log_prob(actions)


class _TokenLogProbs(th.autograd.Function):
    """What `token_log_probs` computes, with a backward that passes over the vocabulary once.

    It keeps the probabilities, which the entropy needs anyway, where `log_softmax` would keep its
    output and exponentiate it again, and `gather` make zeros to add to.
    """

    @staticmethod
    def forward(ctx: Any, scores: th.Tensor, tokens: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        log_probs = F.log_softmax(scores, dim=-1)
        chosen = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
        probs = log_probs.exp()
        ctx.save_for_backward(probs, tokens)
        # In place, since nothing else reads them; what is impossible counts as 0 times infinity.
        entropy = -log_probs.mul_(probs).nansum(dim=-1)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: th.Tensor) -> tuple[th.Tensor, None]:
        probs, tokens = ctx.saved_tensors
        gradient = gradients[0][:, None]
        return (probs * -gradient).scatter_add_(-1, tokens[:, None], gradient), None


def token_log_probs(scores: th.Tensor, tokens: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Return tokens' log-probabilities and the entropies, (n,) both; these without gradients.

    A `TokenDistribution` gives the same, and entropies with gradients.

    Args:
        scores: (n, vocabulary) float32; see `Sampling.scores`.
        tokens: (n,)
    """
    log_probs, entropies = cast("Any", _TokenLogProbs.apply)(scores, tokens)
    return log_probs, entropies


def uniform(like: th.Tensor) -> th.Tensor:
    """Draw a number in [0, 1) for each row, (n, 1), from torch's default generator."""
    return th.rand(len(like), 1, device=like.device)


def in_chunks(
    score: Callable[..., tuple[th.Tensor, ...]],
    hidden: th.Tensor,
    tokens: th.Tensor,
    size: int,
    *more: Sequence[Any],
) -> tuple[th.Tensor, ...]:
    """Score tokens a chunk at a time, so that logits are never held for all of them.

    Where gradients are wanted, a chunk's logits are computed once more in the backward pass.

    Args:
        score: From hidden states and tokens (and parts of `more`) to one number for each token, or
            several of these.
        hidden: (n, hidden)
        tokens: (n,)
        size: How many tokens to a chunk.
        more: What else there is of each token, n of it.
    """
    if len(hidden) <= size:
        return score(hidden, tokens, *more)
    others = [[every[at : at + size] for at in range(0, len(hidden), size)] for every in more]
    parts = []
    for chunk in zip(hidden.split(size), tokens.split(size), *others, strict=True):
        if th.is_grad_enabled():
            kept = checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False)
            parts.append(cast("tuple[th.Tensor, ...]", kept))
        else:
            parts.append(score(*chunk))
    return tuple(th.cat(column) for column in zip(*parts, strict=True))
