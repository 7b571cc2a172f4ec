"""The reference model: what the policy is kept near to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch as th

from agents.models.backbone import Backbone, Observation
from agents.models.layout import SequenceBatch
from agents.models.lora import Adapter
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer


class AdapterReference(Backbone):
    """A policy's model with its LoRA adapter as it was: no second model is kept.

    Args:
        backbone: The policy's model, which has an adapter.
    """

    CONFIG = "adapter"  # what a saved agent has in place of a model's config

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.hidden_size, self.num_logits = backbone.hidden_size, backbone.num_logits
        self.layout, self.capabilities = backbone.layout, backbone.capabilities
        self._actor = (backbone,)  # no submodule, whose weights would be saved again
        for name, value in self._adapter.weights().items():
            self.register_buffer(name.replace(".", "/"), value)

    @property
    def config(self) -> str:
        """What stands for it in a saved agent."""
        return self.CONFIG

    def hidden_states(self, batch: SequenceBatch) -> th.Tensor:
        """Return the hidden states (actions, hidden) that actions were chosen from."""
        with self._in_place():
            return self._actor[0].hidden_states(batch)

    def last_hidden(self, observation: Observation) -> th.Tensor:
        """Return the hidden state (rows, hidden) at each row's last token."""
        with self._in_place():
            return self._actor[0].last_hidden(observation)

    def logits(self, hidden: th.Tensor) -> th.Tensor:
        """Return the logits (n, num_logits) of hidden states."""
        with self._in_place():
            return self._actor[0].logits(hidden)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model as it was."""
        with self._in_place():
            self._actor[0].save_pretrained(folder)

    @property
    def _adapter(self) -> Adapter:
        adapter = self._actor[0].adapter
        if adapter is None:
            raise RuntimeError("The policy's model has no adapter any more.")
        return adapter

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let the policy's model compute with the adapter that it had."""
        weights = {name.replace("/", "."): value for name, value in self.named_buffers()}
        with self._adapter.replaced(weights):
            yield


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
    elif policy.backbone.adapter is not None:
        reference = AdapterReference(policy.backbone)
    else:
        policy.backbone.clear_cache()
        reference = copy.deepcopy(policy.backbone)
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
