"""The update: epochs over minibatches of whole sequences, a step of the optimizer for each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch as th

from agents import parallel
from agents.learning.objective import Objective
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import Diverged, SequenceRolloutBuffer
from agents.rollouts.sequences import Sequence, split_by_size


@dataclass
class UpdateLog:
    """How an update went.

    Args:
        metrics: Of each minibatch, by name; see `Objective.backward`. `grad_norm`: before clipping,
            of each step.
        epochs: How many there were, a last unfinished one included.
        minibatches: How many the rollout has.
    """

    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    epochs: int = 0
    minibatches: int = 0

    @property
    def steps(self) -> int:
        """How many steps of the optimizer there were."""
        return len(self.metrics["grad_norm"])

    @property
    def approx_kl(self) -> float:
        """The mean over the last minibatches, as many as the rollout has.

        SB3's is that of the last epoch, of which a stop may leave one minibatch: there, a single
        token of a hundred times its probability is all of it.
        """
        return float(np.mean(self.metrics["approx_kl"][-self.minibatches :]))


def update(
    policy: TransformerPolicy,
    buffer: SequenceRolloutBuffer,
    objective: Objective,
    *,
    n_epochs: int = 1,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    max_grad_norm: float,
    target_kl: float | None = None,
    warmup_steps: int = 0,
    steps_before: int = 0,
) -> UpdateLog:
    """Update a policy from a rollout, and return how it went.

    Args:
        policy: Changed in place, by its optimizer.
        buffer: The rollout, with its advantages.
        objective: What is minimised.
        n_epochs: How many passes over the rollout.
        batch_size: About how many tokens to a minibatch. None: all.
        micro_batch_size: Into parts of how many tokens a minibatch is cut. None: one part.
        max_grad_norm: What gradients are clipped to.
        target_kl: Stop, without a step, when a minibatch's approximate KL exceeds 1.5 times this.
        warmup_steps: Over so many first steps the learning rates rise linearly: Adam's are as long
            as its rate whatever the gradient says, before it knows the gradient's size.
        steps_before: How many steps earlier updates have made.

    Raises:
        Diverged: If a loss or its gradient is not finite; the step is not made.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    log = UpdateLog()
    stopped = False
    while log.epochs < n_epochs and not stopped:
        minibatches = _minibatches(buffer, batch_size)
        log.epochs, log.minibatches = log.epochs + 1, len(minibatches)
        for sequences in minibatches:
            policy.optimizer.zero_grad()
            parts = split_by_size(sequences, micro_batch_size)
            for name, value in objective.backward(policy, buffer, parts).items():
                log.metrics[name].append(value)
            stopped = target_kl is not None and log.metrics["approx_kl"][-1] > 1.5 * target_kl
            if stopped:
                break
            norm = float(th.nn.utils.clip_grad_norm_(trained, max_grad_norm))
            loss = log.metrics["loss"][-1]
            if not (np.isfinite(norm) and np.isfinite(loss)):
                policy.optimizer.zero_grad()
                raise Diverged(
                    f"Training has diverged: the loss is {loss}, the norm of its gradient {norm}; "
                    "this step was not made. Lower learning_rate, or raise kl_coef; if the first "
                    "update fails, look for rewards that are not finite or very large."
                )
            log.metrics["grad_norm"].append(norm)
            steps = steps_before + log.steps
            _step(policy.optimizer, min(1.0, steps / warmup_steps) if warmup_steps else 1.0)
    policy.optimizer.zero_grad()
    return log


def _step(optimizer: th.optim.Optimizer, share: float) -> None:
    """Make a step at a share of the learning rates."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = share * rate
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _minibatches(buffer: SequenceRolloutBuffer, batch_size: int | None) -> list[list[Sequence]]:
    """Return minibatches, as many on each rank, since the ranks make their steps together.

    A rank that has too few sequences for that has nothing in the last ones.
    """
    groups = 1
    if batch_size is not None:
        actions = np.mean(parallel.all_gather([buffer.num_actions()]))
        groups = max(1, round(float(actions) / batch_size))
    minibatches = buffer.minibatches(batch_size, groups) if buffer.sequences else []
    most = max(parallel.all_gather([len(minibatches)]))
    return minibatches + [[] for _ in range(most - len(minibatches))]
