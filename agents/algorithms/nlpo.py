"""Natural Language Policy Optimization."""

from __future__ import annotations

from typing import Any, ClassVar

from stable_baselines3.common.policies import BasePolicy

from agents.algorithms.ppo import PPO
from agents.policies.masked import MaskedTransformerPolicy


class NLPO(PPO):
    """Natural Language Policy Optimization (Ramamurthy et al., 2023, arXiv 2210.01241).

    PPO that chooses among the tokens which a lagging copy of the policy finds likely: those of its
    top-p set. All else is as for `agents.PPO`.

    Args:
        policy: "TransformerPolicy", or a subclass of `MaskedTransformerPolicy`.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        top_mask: The probability that the set has at least, in (0, 1]. 0.9.
        target_update_iterations: After so many updates the copy becomes what the policy is. It is
            also what the policy is when `learn` is first called. 20.
        **kwargs: As for `agents.PPO`.

    Raises:
        ValueError: For another policy, or a `top_mask` out of its bounds.
    """

    transformers_only = True
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]]

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        top_mask: float = 0.9,
        target_update_iterations: int = 20,
        **kwargs: Any,
    ) -> None:
        self.top_mask = top_mask
        self.target_update_iterations = target_update_iterations
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, MaskedTransformerPolicy):
            raise ValueError(
                "NLPO needs the policy 'TransformerPolicy' or a MaskedTransformerPolicy, not a "
                f"{self.policy_class.__name__}."
            )
        self.policy_kwargs = {**self.policy_kwargs, "top_mask": self.top_mask}
        super()._setup_model()

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.rollouts_learned:
            self._masked_policy().renew_mask()
        return super()._setup_learn(*args, **kwargs)

    def train(self) -> None:
        """Update the policy as PPO does and, now and then, what it is masked by."""
        before = self.rollouts_learned
        super().train()
        learned = self.rollouts_learned
        if learned > before and learned % self.target_update_iterations == 0:
            self._masked_policy().renew_mask()

    def _masked_policy(self) -> MaskedTransformerPolicy:
        policy = self._text_policy()
        assert isinstance(policy, MaskedTransformerPolicy)
        return policy


NLPO.policy_aliases = {"TransformerPolicy": MaskedTransformerPolicy}
