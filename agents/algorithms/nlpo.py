"""Natural Language Policy Optimization."""

from __future__ import annotations

from typing import Any, ClassVar

from agents.algorithms.ppo import PPO
from agents.policies.masked import MaskedTransformerPolicy
from agents.policies.transformer import TransformerPolicy


class NLPO(PPO):
    """Natural Language Policy Optimization (Ramamurthy et al., 2023, arXiv 2210.01241).

    PPO that chooses among the tokens which a lagging copy of the policy finds likely: those of its
    top-p set, and what ends a turn. All else is as for `agents.PPO`. The KL is that of the policy
    as it acts to the reference, which has no mask: up to -log(top_mask) a token at the start.

    Args:
        policy: "TransformerPolicy", or a subclass of `MaskedTransformerPolicy`.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        top_mask: The probability that the set has at least, in (0, 1]. 0.9.
        target_update_iterations: After so many rollouts the copy becomes what the policy is. It is
            also what the policy is when `learn` is first called. 20, as in most of what
            was published. After a renewal tokens are possible that the policy was not trained to
            choose among: on `TextGen-v0` more texts were broken right after it.
        **kwargs: As for `agents.PPO`.

    Raises:
        ValueError: For another policy, a `top_mask` out of its bounds, or `whole_episodes`: what is
            carried over would have been said under another mask.
    """

    transformers_only = True
    text_policy: ClassVar[type[TransformerPolicy]] = MaskedTransformerPolicy

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
        name = type(self).__name__
        if not issubclass(self.policy_class, MaskedTransformerPolicy):
            raise ValueError(
                f"{name} needs the text 'TransformerPolicy', or a MaskedTransformerPolicy, but the "
                f"policy is a {self.policy_class.__name__}."
            )
        if "top_mask" in self.policy_kwargs:
            raise ValueError(f"top_mask is an argument of {name}: leave it out of policy_kwargs.")
        if self.whole_episodes:
            raise ValueError(
                f"{name} renews its mask, under which an episode is to be as a whole: give "
                "episodes_per_slot instead of whole_episodes."
            )
        self.policy_kwargs = {**self.policy_kwargs, "top_mask": self.top_mask}
        super()._setup_model()
        self.policy_kwargs.pop("top_mask")  # so that it can be another when the agent is loaded
        self._masked_policy().facts["mask in training"] = f"top-p {self.top_mask} of a lagging copy"

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Learn, as in SB3."""
        if len(args) < 4:
            kwargs.setdefault("tb_log_name", type(self).__name__)
        return super().learn(*args, **kwargs)

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
