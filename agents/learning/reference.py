"""The reference model: what the policy is kept near to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

from agents.models.backbone import Backbone
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer


def make_reference(policy: TransformerPolicy, ref_model: str | None) -> Backbone | None:
    """Return a model whose weights stay.

    Args:
        policy: Whose model it is a copy of, as that is now.
        ref_model: Or a name or path of another one.

    Returns:
        None: it is the policy's own model, with its LoRA adapter switched off.
    """
    if ref_model is not None:
        reference = policy.make_backbone(ref_model)
    elif policy.backbone.adapter is not None:
        return None
    else:
        policy.backbone.clear_cache()
        reference = copy.deepcopy(policy.backbone)
    return reference.to(policy.device).requires_grad_(False)


@contextmanager
def reference_model(policy: TransformerPolicy, reference: Backbone | None) -> Iterator[Backbone]:
    """Yield the reference: a model of its own, or the policy's with LoRA switched off."""
    if reference is not None:
        yield reference
        return
    adapter = policy.backbone.adapter
    if adapter is None:
        raise RuntimeError("There is no reference yet: call set_reference first.")
    with adapter.disabled():
        yield policy.backbone


@th.no_grad()
def score_reference(
    policy: TransformerPolicy,
    reference: Backbone | None,
    buffer: SequenceRolloutBuffer,
    size: int | None,
) -> None:
    """Enter the reference's log-probabilities into a rollout: one forward for each sequence.

    Args:
        policy: By whose distribution actions are scored.
        reference: See `reference_model`.
        buffer: The complete rollout.
        size: How many actions at a time, about.
    """
    with reference_model(policy, reference) as model:
        for sequences in buffer.parts(size):
            batch = buffer.batch(sequences)
            log_probs = policy.log_probs(model, batch.sequences, batch.actions)
            buffer.ref_log_probs[buffer.index(sequences)] = log_probs.cpu().numpy()
