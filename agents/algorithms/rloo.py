"""REINFORCE Leave-One-Out."""

from __future__ import annotations

import stable_baselines3

from agents.algorithms.group_algorithm import GroupAlgorithm
from agents.learning.groups import Baseline
from agents.learning.losses import RatioLevel
from agents.learning.objective import Aggregation


class RLOO(GroupAlgorithm, stable_baselines3.PPO):
    """REINFORCE Leave-One-Out (Ahmadian et al., "Back to Basics", 2024, arXiv 2402.14740).

    The return of an episode less the mean of the others that answer the same prompt; a response is
    one action, whose ratio is the product of those of its tokens.

        RLOO("TransformerPolicy", gym.make_vec("TextGen-v0", num_envs=64, group_size=4))

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers, with a `group_size`.
        learning_rate: A number or a function of the remaining progress. 3e-4, linear to 0; 3e-5 for
            a pretrained model, 2e-3 for an adapter.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. 1024.
        n_epochs: Passes over the rollout in an update, as far as `target_kl` lets them. 4.
        target_kl: See `agents.PPO`. 0.03.
        clip_range: How far from 1 the ratio of a response counts. 0.2.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_in: "reward": the KL is inside the baseline, as its sum over an episode is part of what
            the episode earned. "advantage": it comes after the baseline, token by token. "loss": it
            is a loss of its own.
        **kwargs: `kl_target`, `kl_estimator`, `ref_model`, `ent_coef`, `max_grad_norm`,
            `micro_batch_size`, `policy_kwargs`, `seed`, `device`, `verbose`, ...
    """

    baseline: Baseline = "leave_one_out"
    ratio_level: RatioLevel = "product"
    aggregation: Aggregation = "sequence"
