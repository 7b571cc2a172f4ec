"""What happens to a rollout's rewards before advantages are computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch as th

from agents import parallel
from agents.learning.kl import adapt_kl_coef, estimate_kl
from agents.models.backbone import Backbone
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.statistics import EpisodeSums

if TYPE_CHECKING:
    from agents.algorithms.ppo import PPO


@dataclass(frozen=True)
class Truncation:
    """An episode that was truncated: it would have gone on after this step."""

    step: int
    slot: int
    observation: dict[str, npt.NDArray[np.int64]]


def score_kl(agent: PPO, buffer: SequenceRolloutBuffer) -> None:
    """Estimate each token's KL to the reference, take it off the rewards, adapt `kl_coef`.

    One forward of the reference for each sequence, after the rollout.
    """
    policy = cast("TransformerPolicy", agent.policy)
    with reference_model(agent) as reference, th.no_grad():
        size = agent.micro_batch_size or agent.batch_size
        for sequences in buffer.micro_batches(buffer.sequences, size):
            samples = buffer.samples(sequences)
            log_probs = policy.log_probs(reference, samples.observations, samples.actions)
            buffer.ref_log_probs[buffer.index(sequences)] = log_probs.cpu().numpy()
    log_probs, ref_log_probs = map(th.from_numpy, (buffer.log_probs, buffer.ref_log_probs))
    kl = estimate_kl(log_probs, ref_log_probs, agent.kl_estimator).numpy()
    if agent.kl_in == "reward":
        buffer.rewards -= agent.kl_coef * kl
    agent.logger.record("kl/per_token", float(np.concatenate(parallel.all_gather([kl])).mean()))
    agent.logger.record("kl/coef", agent.kl_coef)
    if agent.episode_kl is None or agent.episode_kl.num_envs != buffer.n_envs:
        agent.episode_kl = EpisodeSums(buffer.n_envs)
    assert buffer.last_dones is not None, "The rollout is not complete."
    finished = parallel.all_gather(
        agent.episode_kl.add(kl, buffer.episode_starts, buffer.last_dones)
    )
    if finished:
        mean = float(np.mean(finished))
        agent.logger.record("kl/per_episode", mean)
        if agent.kl_target is not None:
            agent.kl_coef = adapt_kl_coef(agent.kl_coef, mean, agent.kl_target, len(finished))


@contextmanager
def reference_model(agent: PPO) -> Iterator[Backbone]:
    """Yield the reference: the agent's own, or its policy's model with LoRA switched off."""
    if agent.reference is not None:
        yield agent.reference
        return
    backbone = cast("TransformerPolicy", agent.policy).backbone
    if backbone.adapter is None:
        raise RuntimeError("There is no reference yet: call set_reference first.")
    with backbone.adapter.disabled():
        yield backbone


def whiten_rewards(buffer: SequenceRolloutBuffer) -> None:
    """Give the rewards a standard deviation of 1, and leave them their mean."""
    rewards = np.concatenate(parallel.all_gather([buffer.rewards]))
    mean, std = rewards.mean(dtype=np.float64), rewards.std(dtype=np.float64)
    whitened = (buffer.rewards - mean) / (std + 1e-8) + mean
    buffer.rewards = whitened.astype(np.float32)


def bootstrap(agent: PPO, buffer: SequenceRolloutBuffer) -> None:
    """Add the discounted value of their last observation to episodes that were cut off."""
    if not agent.truncations:
        return
    last = [episode.observation for episode in agent.truncations]
    batch = {key: np.stack([observation[key] for observation in last]) for key in last[0]}
    with th.no_grad():
        values = cast("TransformerPolicy", agent.policy).observation_values(batch)
    steps = [episode.step for episode in agent.truncations]
    slots = [episode.slot for episode in agent.truncations]
    buffer.rewards[steps, slots] += agent.gamma * values.cpu().numpy().flatten()
