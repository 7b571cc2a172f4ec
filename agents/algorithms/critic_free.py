"""What algorithms without a critic share."""

from __future__ import annotations

from typing import Any

from agents import parallel
from agents.algorithms.base import TransformerAlgorithm


class CriticFree(TransformerAlgorithm):
    """An algorithm that has no value head, in memory or in time; see `TransformerAlgorithm`."""

    transformers_only = True

    def _setup_model(self) -> None:
        if self.policy_kwargs.get("critic") or self.policy_kwargs.get("value_model") is not None:
            raise ValueError(
                f"{type(self).__name__} has no critic: leave critic and value_model out."
            )
        self.policy_kwargs = {**self.policy_kwargs, "critic": False}
        super()._setup_model()

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Learn, as in SB3; Ctrl-C ends all ranks at the same place."""
        if len(args) < 4:
            kwargs.setdefault("tb_log_name", type(self).__name__)
        with parallel.interrupted_together():
            return super().learn(*args, **kwargs)


class OfWholeEpisodes(CriticFree):
    """One that collects whole episodes, by default one from each environment."""

    def __init__(
        self, policy: Any, env: Any, *args: Any, episodes_per_slot: int | None = 1, **kwargs: Any
    ) -> None:
        episodes = 1 if episodes_per_slot is None else episodes_per_slot
        super().__init__(policy, env, *args, episodes_per_slot=episodes, **kwargs)
