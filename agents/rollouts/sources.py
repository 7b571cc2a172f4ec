"""Where a rollout comes from: whoever fills the buffer, what learns from it cannot tell."""

from __future__ import annotations

from typing import Protocol

from stable_baselines3.common.callbacks import BaseCallback

from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer


class RolloutSource(Protocol):
    """Fills a buffer with what a policy does.

    It raises the agent's `num_timesteps` by the tokens that it collects, and calls the callback as
    SB3's rollout loop does, but for `on_rollout_end`, which waits for the advantages.
    """

    def fill(
        self, policy: TransformerPolicy, buffer: SequenceRolloutBuffer, callback: BaseCallback
    ) -> bool:
        """Empty the buffer, fill it and finish it.

        Args:
            policy: What acts.
            buffer: See `SequenceRolloutBuffer.add` and `finish`. Values may be left out where the
                critic has a model of its own, which is asked for whole sequences afterwards.
            callback: What is told of each step.

        Returns:
            False if the callback ended the rollout.
        """
        ...
