"""Policy gradient without a critic."""

from __future__ import annotations

from typing import Any, ClassVar

import stable_baselines3
from stable_baselines3.common.utils import LinearSchedule

from agents.algorithms.critic_free import CriticFree
from agents.learning.advantages import ReturnToGo
from agents.learning.losses import EntropyLoss, LossTerm, PolicyGradientLoss
from agents.models.loading import ModelKind


class Reinforce(CriticFree, stable_baselines3.A2C):
    """REINFORCE (Williams 1992): returns to go, whitened over a rollout; one step for each.

    It has no critic: no value head is run, and none is in memory. It trains `"TransformerPolicy"`
    and no other. Episodes that the end of a rollout cuts have no known return, so that they
    are learned when they have ended. SB3 has no such algorithm; the arguments are those of its A2C,
    less those of a critic.

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        learning_rate: A number or a function of the remaining progress. 1e-3, linear to 0.
        n_steps: Tokens from each environment between updates. 64.
        gamma: The discount. 1.0.
        whole_episodes: Whether to learn from complete episodes alone; see `agents.PPO`. Yes.
        normalize_advantage: Whether to whiten returns over a rollout's tokens. Yes.
        **kwargs: As for `agents.A2C`: `ent_coef`, `max_grad_norm`, `kl_coef`, `episodes_per_slot`,
            `micro_batch_size`, `policy_kwargs`, `seed`, `device`, ...
    """

    unused = ("gae_lambda", "vf_coef", "use_sde", "sde_sample_freq")
    text_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
        "n_steps": 64,
        "gamma": 1.0,
        "max_grad_norm": 1.0,
        "use_rms_prop": False,
        "normalize_advantage": True,
    }
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 1e-4}

    def __init__(
        self, policy: Any, env: Any, *args: Any, whole_episodes: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(policy, env, *args, whole_episodes=whole_episodes, **kwargs)

    def advantage_estimator(self) -> ReturnToGo:
        """Return what a token has earned from it on."""
        return ReturnToGo(self.gamma)

    def losses(self) -> list[LossTerm]:
        """Return the policy gradient and the entropy."""
        return [PolicyGradientLoss(), EntropyLoss(self.ent_coef)]
