"""ReMax."""

from __future__ import annotations

from typing import Any, ClassVar

import stable_baselines3
from stable_baselines3.common.utils import LinearSchedule

from agents.algorithms.group_algorithm import GroupAlgorithm
from agents.algorithms.reinforce import Reinforce
from agents.learning.groups import Baseline
from agents.learning.kl import KLPlace
from agents.learning.losses import EntropyLoss, LossTerm, PolicyGradientLoss
from agents.learning.objective import Aggregation
from agents.models.loading import ModelKind


class ReMax(GroupAlgorithm, stable_baselines3.A2C):
    """ReMax (Li et al., 2023, arXiv 2310.10505): REINFORCE less what the likeliest response earns.

    One step for each rollout. It needs no groups, but a greedy response to each prompt, which costs
    a second rollout and is no part of the time steps.

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers and `max_episode_steps`.
        learning_rate: A number or a function of the remaining progress. 3e-4, linear to 0; 3e-5 for
            a pretrained model, 1e-3 for an adapter. A new model learns faster with 1e-3 on some
            tasks, and is ruined by it on others.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        kl_in: "advantage": the KL comes after the baseline, token by token. "loss": it is a loss of
            its own.
        **kwargs: `kl_coef`, `kl_target`, `kl_estimator`, `ref_model`, `ent_coef`, `max_grad_norm`,
            `micro_batch_size`, `policy_kwargs`, `seed`, `device`, `verbose`, ...
    """

    unused = ("n_steps", "gamma", "gae_lambda", "vf_coef", "use_sde", "sde_sample_freq")
    text_defaults: ClassVar[dict[str, Any]] = {
        **Reinforce.text_defaults,
        "learning_rate": LinearSchedule(3e-4, 0.0, 1.0),
        "normalize_advantage": False,
    }
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 3e-5, "adapter": 1e-3}
    baseline: Baseline = "greedy"
    aggregation: Aggregation = "constant"

    def __init__(
        self, policy: Any, env: Any, *args: Any, kl_in: KLPlace = "advantage", **kwargs: Any
    ) -> None:
        super().__init__(policy, env, *args, kl_in=kl_in, **kwargs)

    def losses(self) -> list[LossTerm]:
        """Return the policy gradient and the entropy."""
        return [PolicyGradientLoss(), EntropyLoss(self.ent_coef)]
