"""REINFORCE++."""

from __future__ import annotations

from typing import Any, Literal

import stable_baselines3

from agents.algorithms.checks import check_choice
from agents.algorithms.group_algorithm import GroupAlgorithm
from agents.learning.advantages import AdvantageEstimator
from agents.learning.groups import Baseline, NormalizedReturns

OwnBaseline = Literal["none", "group"]


class ReinforcePlusPlus(GroupAlgorithm, stable_baselines3.PPO):
    """REINFORCE++ (Hu et al., 2025, arXiv 2501.03262): PPO's loss and normalised returns to go.

    The return from a token on, the KL of the tokens to come included, normalised over all tokens of
    the rollout. It needs no groups; with `baseline="group"`, the mean return of the episodes that
    answer the prompt is taken off before.

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers; for the group baseline with a
            `group_size`.
        learning_rate: A number or a function of the remaining progress. 3e-4, linear to 0; 3e-5 for
            a pretrained model, 2e-3 for an adapter.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. 1024.
        n_epochs: Passes over the rollout in an update, as far as `target_kl` lets them. 4.
        target_kl: See `agents.PPO`. 0.03.
        clip_range: How far from 1 a token's ratio counts. 0.2.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        baseline: "none" or "group".
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        whiten_floor: The least standard deviation that returns are divided by.
        **kwargs: `kl_in`, `kl_target`, `kl_estimator`, `ref_model`, `ent_coef`, `max_grad_norm`,
            `micro_batch_size`, `policy_kwargs`, `seed`, `device`, `verbose`, ...
    """

    baseline: Baseline = "none"

    def __init__(
        self, policy: Any, env: Any, *args: Any, baseline: OwnBaseline = "none", **kwargs: Any
    ) -> None:
        check_choice("baseline", baseline, OwnBaseline)
        self.baseline = baseline
        super().__init__(policy, env, *args, **kwargs)

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what normalises returns to go."""
        group: Any = "group" if self.baseline == "group" else None
        return NormalizedReturns(self.gamma, group, self.whiten_floor)
