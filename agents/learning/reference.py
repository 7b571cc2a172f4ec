"""The reference model: what the policy is kept near to."""

from __future__ import annotations

import torch as th

from agents.models.backbone import Backbone
from agents.models.frozen import frozen_copy
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer


def make_reference(policy: TransformerPolicy, ref_model: str | None) -> Backbone:
    """Return a model whose weights stay.

    Args:
        policy: Whose model it is a copy of, as that is now; with LoRA a copy of the adapter.
        ref_model: Or a name or path of another one.

    Raises:
        ValueError: If another one lacks tokens that the policy emits.
    """
    if ref_model is not None:
        reference = policy.make_backbone(ref_model)
        reference.merge_adapter()
        if reference.num_logits < policy.vocab_size:
            raise ValueError(
                f"The policy emits {policy.vocab_size} tokens, but ref_model={str(ref_model)!r} "
                f"knows only {reference.num_logits}: expected a model of the same tokenizer."
            )
    else:
        reference = frozen_copy(policy.backbone)
    return reference.to(policy.device).requires_grad_(False)


@th.no_grad()
def score_reference(
    policy: TransformerPolicy,
    reference: Backbone,
    buffer: SequenceRolloutBuffer,
    size: int | None,
) -> None:
    """Enter the reference's log-probabilities into a rollout: one forward for each sequence.

    Args:
        policy: By whose distribution actions are scored.
        reference: See `make_reference`.
        buffer: The complete rollout.
        size: How many actions at a time, about.
    """
    for sequences in buffer.parts(size):
        batch = buffer.batch(sequences)
        log_probs = policy.log_probs(reference, batch.sequences, batch.actions)
        buffer.ref_log_probs[buffer.index(sequences)] = log_probs.cpu().numpy()
