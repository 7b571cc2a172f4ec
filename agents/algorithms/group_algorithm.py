"""What algorithms that compare whole episodes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.utils import LinearSchedule

from agents import parallel
from agents.algorithms.checks import check_choice
from agents.algorithms.critic_free import OfWholeEpisodes
from agents.learning.advantages import AdvantageEstimator
from agents.learning.groups import (
    Baseline,
    GroupAdvantage,
    Scale,
    group_numbers,
    groups_with_signal,
)
from agents.learning.losses import (
    ClipFraction,
    ClippedPolicyLoss,
    EntropyLoss,
    LossTerm,
    RatioLevel,
)
from agents.learning.rewards import penalize_overlong
from agents.models.loading import ModelKind
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.greedy import greedy_returns
from agents.rollouts.vec_env import engine_of

# These are means over the episodes that answer one prompt.
GROUP_BASELINES = ("group", "leave_one_out")


class GroupAlgorithm(OfWholeEpisodes):
    """Learns from whole episodes, each beside others; by default from those to the same prompt.

    The environments say which these are: `gym.make_vec(..., group_size=8)`.

    Attributes:
        baseline, scale, epsilon, by_turn: See `GroupAdvantage`.
        ratio_level: What a ratio is of; see `agents.learning.losses.ratios`.
        clip_range_high: How far above 1 a ratio counts. None: as far as below.
        overlong_margin: The share of the response budget in which a response costs more and more.
        mask_truncated: Whether responses that their budget cut are left out of the loss.
        dynamic_sampling: How often at most all play on to replace groups that earned all the same.
    """

    unused: ClassVar[tuple[str, ...]] = (
        *("n_steps", "gamma", "gae_lambda", "vf_coef", "clip_range_vf", "normalize_advantage"),
        *("use_sde", "sde_sample_freq"),
    )
    text_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(3e-4, 0.0, 1.0),
        "n_steps": 64,
        "batch_size": 1024,
        "n_epochs": 4,
        "target_kl": 0.03,
        "gamma": 1.0,
        "clip_range": 0.2,
        "max_grad_norm": 1.0,
        "normalize_advantage": False,
    }
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 3e-5, "adapter": 2e-3}
    baseline: Baseline = "group"
    scale: Scale = "none"
    epsilon: float = 1e-4
    by_turn: bool = False
    ratio_level: RatioLevel = "token"
    clip_range: Any
    clip_range_high: float | None = None
    overlong_margin: float = 0.0
    mask_truncated: bool = False
    dynamic_sampling: int = 0

    def __init__(self, policy: Any, env: Any, *args: Any, **kwargs: Any) -> None:
        # By episode, what the most likely responses to the last rollout's prompts earn.
        self.greedy: dict[int, float] | None = None
        self._signal = np.empty(0, dtype=np.bool_)
        self._check_switches(kwargs)
        super().__init__(policy, env, *args, **kwargs)

    def _check_switches(self, given: dict[str, Any]) -> None:
        """Refuse settings that make no sense, by themselves or together."""
        check_choice("baseline", self.baseline, Baseline)
        check_choice("scale", self.scale, Scale)
        check_choice("ratio_level", self.ratio_level, RatioLevel)
        if self.scale == "group" and self.baseline not in GROUP_BASELINES:
            raise ValueError(
                f"scale='group' goes with a baseline of the group, not with {self.baseline!r}: "
                "choose scale='batch' or 'none'."
            )
        if self.by_turn and (self.baseline == "greedy" or self.ratio_level != "token"):
            raise ValueError(
                "by_turn compares turns, but the baseline 'greedy' and ratios of sequences are of "
                "whole conversations: leave by_turn out, or choose others."
            )
        if self.by_turn and self.mask_truncated:
            raise ValueError("mask_truncated leaves out whole conversations: not with by_turn.")
        if self.baseline == "greedy" and (
            self.overlong_margin or (given.get("kl_coef") and given.get("kl_in") == "reward")
        ):
            raise ValueError(
                "The baseline 'greedy' is the reward of the environment alone: leave "
                "overlong_margin out, and let the KL count in the 'advantage' or the 'loss'."
            )
        if given.get("whiten_rewards"):
            raise ValueError(
                f"{type(self).__name__} compares what episodes earned, which whiten_rewards would "
                "change by their lengths: leave it out."
            )

    def _take_in_env(self) -> None:
        super()._take_in_env()
        if self.aggregation == "constant" and self.constant_length is None:
            self.constant_length = self._budget()
        if self.env is None:
            return
        name, needs = type(self).__name__, self.baseline in GROUP_BASELINES or self.dynamic_sampling
        if needs and self.group_size == 1:
            raise ValueError(
                f"{name} compares the responses to one prompt with each other, but every "
                "environment has prompts of its own: make them with gym.make_vec(..., "
                "num_envs=64, group_size=8)."
            )
        limits = self.env.get_attr("max_episode_steps") if self.baseline == "greedy" else [None]
        if limits[0] is not None:
            raise ValueError(
                "The baseline 'greedy' plays to the end of an episode: make the environments "
                "without max_episode_steps."
            )

    def losses(self) -> list[LossTerm]:
        """Return the clipped loss and the entropy's, with what is logged beside them."""
        low = self.clipping()
        return [
            ClippedPolicyLoss(low, self.clip_range_high, self.ratio_level),
            EntropyLoss(self.ent_coef),
            ClipFraction(low, self.clip_range_high, self.ratio_level),
        ]

    def clipping(self) -> float:
        """Return, and log, the clipping at the present progress."""
        clip_range = float(self.clip_range(self._current_progress_remaining))
        self.logger.record("train/clip_range", clip_range)
        return clip_range

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what compares the episodes."""
        return GroupAdvantage(self.baseline, self.scale, self.epsilon, self.by_turn, self.greedy)

    def resampling(self) -> Callable[[SequenceRolloutBuffer], bool] | None:
        """With `dynamic_sampling`, go on until as many groups as wanted have a signal."""
        if not self.dynamic_sampling:
            return None
        wanted = self._groups_wanted()
        most = (1 + self.dynamic_sampling) * wanted

        def ask(rollout: SequenceRolloutBuffer) -> bool:
            signal = groups_with_signal(rollout)
            return int(signal.sum()) < wanted and signal.size < most

        return ask

    def complete_rollout(self, buffer: SequenceRolloutBuffer) -> None:
        """Compute what is learned from a rollout, as `TransformerAlgorithm` does.

        Afterwards responses that their budget cut are left out; what they earned has counted.
        """
        if self.group_size > 1:
            self._signal = groups_with_signal(buffer).flatten()  # before the KL is taken off
            every = np.concatenate(parallel.all_gather([self._signal]))
            self.logger.record("rollout/groups_with_signal", float(every.mean()))
        super().complete_rollout(buffer)
        self.greedy = None
        if self.mask_truncated:
            buffer.drop_truncated()

    def settle(self, buffer: SequenceRolloutBuffer) -> None:
        """Replace groups, penalise responses near their budget, and play greedy ones."""
        if self.dynamic_sampling:
            order = np.argsort(~self._signal, kind="stable")[: self._groups_wanted()]
            kept = set(group_numbers(buffer)[order].tolist())
            buffer.sequences = [s for s in buffer.sequences if s.group in kept]
        if self.overlong_margin:
            budget = self._budget()
            penalize_overlong(buffer, budget, max(1, round(self.overlong_margin * budget)))
        if self.baseline == "greedy":
            parallel.run_on_all(lambda: self._play_greedily(buffer))

    def _play_greedily(self, buffer: SequenceRolloutBuffer) -> bool:
        self.greedy = greedy_returns(self._text_policy(), engine_of(self.env), buffer)
        return True

    def _groups_wanted(self) -> int:
        assert self.env is not None and self.episodes_per_slot is not None
        return self.episodes_per_slot * self.env.num_envs // self.group_size

    def _budget(self) -> int:
        """Return how many tokens a response may have."""
        shape = self._text_policy().observation_space["response"].shape
        assert shape is not None
        return int(shape[0])
