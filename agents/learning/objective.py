"""What an update minimises: loss terms, averaged over a minibatch however it is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch as th

from agents import parallel
from agents.learning.losses import ApproximateKL, LossTerm, ratio_errors
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.sequences import Sequence as TokenSequence
from agents.rollouts.sequences import TokenBatch

Aggregation = Literal["token", "sequence", "constant"]


# A ratio that is farther from 1 is off.
OFF = 0.2


@dataclass(frozen=True)
class Objective:
    """A weighted sum of loss terms.

    Args:
        terms: What is minimised; a term of weight 0 is logged and nothing else.
        aggregation: What a mean is over. "token": all tokens alike. "sequence": the mean of each
            sequence's tokens, then over sequences. "constant": the sum of each sequence's tokens,
            by `constant_length`, then over sequences.
        constant_length: For "constant": what a sequence's sum is divided by.
        normalize_advantage: Whether to whiten the advantages over a minibatch's tokens.
        whiten_floor: The least standard deviation that whitening divides by.

    Raises:
        ValueError: For an unknown aggregation, or one that lacks its length; for terms of one name,
            or without any weight.
    """

    terms: Sequence[LossTerm]
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    normalize_advantage: bool = True
    whiten_floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what makes no mean, or has no name of its own."""
        names = [term.name for term in self.terms]
        taken = {"loss", "approx_kl", "ratio_error", "ratio_off"} & set(names)
        if taken or len(set(names)) < len(names):
            raise ValueError(
                "Each loss term needs a name of its own, other than loss, approx_kl, ratio_off and "
                f"ratio_error, but the names are {', '.join(names)}."
            )
        if not any(term.weight for term in self.terms):
            raise ValueError(f"There is nothing to minimise: no term of {names} has a weight.")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(
                f"aggregation must be one of {', '.join(get_args(Aggregation))}, but it is "
                f"{self.aggregation!r}."
            )
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ValueError(
                "constant_length goes with aggregation='constant': give both or neither, not "
                f"{self.constant_length} with {self.aggregation!r}."
            )

    def backward(
        self,
        policy: TransformerPolicy,
        buffer: SequenceRolloutBuffer,
        parts: Sequence[list[TokenSequence]],
    ) -> dict[str, float]:
        """Make a minibatch's gradients the policy's, which had none, and return its metrics.

        Every mean is over the whole minibatch, so that it makes no difference in how many parts it
        comes, nor on which ranks.

        Returns:
            Each term's mean by name, `loss`, `approx_kl`; and of what the policy before the update
            has sampled `ratio_error`, how far this rank's ratios are from 1 at most, and
            `ratio_off`, the share of tokens whose ratio is off by more than 20 %.
        """
        terms = [*self.terms, ApproximateKL()]
        own = [buffer.advantages[buffer.index(part)] for part in parts]
        advantages = np.concatenate(parallel.all_gather(own))
        count = len(advantages)
        if self.aggregation != "token":
            count = sum(parallel.all_gather([sum(map(len, parts))]))
        mean, std = 0.0, 1.0
        if self.normalize_advantage and len(advantages) > 1:
            whole = th.from_numpy(advantages)
            mean, std = float(whole.mean()), max(self.whiten_floor, float(whole.std()) + 1e-8)
        names = [*(term.name for term in terms), "loss", "ratio_off"]
        total = {name: th.zeros((), device=policy.device) for name in names}
        errors = [th.zeros((), device=policy.device)]
        entropy_gradient = any(
            term.weight and getattr(term, "uses_entropy", True) for term in terms
        )
        for part in parts:
            batch = buffer.batch(part)
            batch = batch.with_advantages((batch.advantages - mean) / std)
            new = policy.score(batch.sequences, batch.actions, entropy_gradient)
            present = batch.policy_versions[batch.sequence_ids] == buffer.policy_version
            off = ratio_errors(batch, new) * present
            errors.append(off.max())
            total["ratio_off"] += (off > OFF).sum() / len(advantages)
            means = {term.name: self._sum(term(batch, new), batch) / count for term in terms}
            weighted = [term.weight * means[term.name] for term in terms if term.weight]
            loss = sum(weighted[1:], weighted[0])
            loss.backward()
            for name, value in {**means, "loss": loss}.items():
                total[name] += value.detach()
        sums = th.stack(list(total.values()))
        parallel.sum_gradients(policy, sums)
        # One transfer from the device for all of them.
        metrics = th.cat([sums, th.stack(errors).max()[None]]).tolist()
        return dict(zip((*total, "ratio_error"), metrics, strict=True))

    def _sum(self, values: th.Tensor, batch: TokenBatch) -> th.Tensor:
        """Return what a part of a minibatch adds to a mean, times what that is divided by."""
        if self.aggregation == "token":
            return values.sum()
        if self.aggregation == "constant":
            assert self.constant_length is not None
            return values.sum() / self.constant_length
        return (values / batch.sequence_lengths[batch.sequence_ids]).sum()
