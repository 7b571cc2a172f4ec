"""What the most likely responses earn: a baseline that needs no group and no critic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from textenvs.envs.engine import TextEngine
from textenvs.envs.playing import play


def greedy_returns(
    policy: TransformerPolicy, engine: TextEngine, rollout: SequenceRolloutBuffer
) -> dict[int, float]:
    """Return, by episode of a rollout of whole ones, what the most likely response would earn.

    The rewards are those of the environment. What rollouts remember, and the generators that they
    draw from, are left alone.

    Args:
        policy: Who responds.
        engine: The environments' engine, whose slots stay as they are.
        rollout: Knows the examples of its episodes.
    """
    examples: dict[int, int] = {}
    for sequence in rollout.sequences:
        start = (sequence.env, sequence.segments[0].start)
        if sequence.episode not in examples:
            examples[sequence.episode] = rollout.examples[start]

    def respond(engine: TextEngine, observations: Any) -> npt.NDArray[np.int64]:
        return policy.predict(observations, deterministic=True)[0]

    # As many slots each time, since compiled programs are made for a number of rows.
    episodes = play(engine.with_slots(engine.num_envs), respond, sorted({*examples.values()}))
    earned = {episode.example: episode.reward for episode in episodes}
    return {episode: earned[example] for episode, example in examples.items()}
