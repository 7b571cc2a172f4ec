"""Expert iteration: sample, keep the best, imitate it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import stable_baselines3

from agents import parallel
from agents.algorithms.group_algorithm import GroupAlgorithm
from agents.learning.advantages import AdvantageEstimator
from agents.learning.groups import Baseline, ConstantAdvantage, best_episodes, group_numbers
from agents.learning.losses import EntropyLoss, LossTerm, PolicyGradientLoss
from agents.rollouts.buffer import SequenceRolloutBuffer

# What bounds ratios to the policy before an update has nothing to do with imitation.
OF_RATIOS = ("clip_range", "target_kl")


class ExpertIteration(GroupAlgorithm, stable_baselines3.PPO):
    """Expert iteration, or rejection sampling, or RAFT (Dong et al., 2023, arXiv 2304.06767).

    Each prompt is answered several times, and the best responses are imitated.

        ExpertIteration("TransformerPolicy", gym.make_vec("TextGen-v0", num_envs=64, group_size=8))

    With `keep_best=0` and a `threshold`, all that earned enough is imitated, which needs no
    groups (Singh et al., "Beyond Human Data", 2023, arXiv 2312.06585).

    Args:
        policy: "TransformerPolicy", or a subclass.
        env: Environments made by `gym.make_vec`, without wrappers, with a `group_size`.
        keep_best: Of each group so many of the best episodes, as far as they earned more than its
            mean: where all earned the same there is nothing to learn. 0: all of them. 1.
        threshold: What an episode must have earned at least, less a KL in the reward. None:
            anything.
        learning_rate: A number or a function of the remaining progress. 3e-4, linear to 0; 3e-5 for
            a pretrained model, 2e-3 for an adapter.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. 1024.
        n_epochs: Passes over what was kept. 1.
        episodes_per_slot: Whole episodes from each environment between updates. 1.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_in: "reward": the KL is part of what an episode earned. "loss": a loss of its own, over
            what was kept.
        **kwargs: `kl_target`, `kl_estimator`, `ref_model`, `ent_coef`, `max_grad_norm`,
            `micro_batch_size`, `policy_kwargs`, `seed`, `device`, `verbose`, ...

    Raises:
        ValueError: For environments without groups, or settings that make no sense together.
    """

    unused = (*GroupAlgorithm.unused, "clip_range")
    text_defaults: ClassVar[dict[str, Any]] = {
        **{k: v for k, v in GroupAlgorithm.text_defaults.items() if k not in OF_RATIOS},
        "n_epochs": 1,
    }
    baseline: Baseline = "group"

    def __init__(
        self,
        policy: Any,
        env: Any,
        *args: Any,
        keep_best: int = 1,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.keep_best, self.threshold = keep_best, threshold
        super().__init__(policy, env, *args, **kwargs)

    def _setup_model(self) -> None:
        if not self.keep_best and self.threshold is None:
            raise ValueError("Expert iteration keeps the best: give keep_best or a threshold.")
        if self.kl_in == "advantage":
            raise ValueError("What is imitated has no advantage: kl_in='reward' or 'loss'.")
        self.baseline = "group" if self.keep_best else "none"
        super()._setup_model()

    def settle(self, buffer: SequenceRolloutBuffer) -> None:
        """Leave out all but the best episodes."""
        super().settle(buffer)
        played = {sequence.episode for sequence in buffer.sequences}
        if self.keep_best:  # The KL alone makes no response better than another.
            alike = set(group_numbers(buffer)[~self._signal].tolist())
            buffer.drop_episodes({s.episode for s in buffer.sequences if s.group in alike})
        kept = best_episodes(buffer, self.keep_best, self.threshold)
        buffer.drop_episodes(played - kept)
        counts = np.sum(parallel.all_gather([(len(kept), len(played))]), axis=0)
        self.logger.record("rollout/kept", counts[0] / counts[1])

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what finds all that was kept as good."""
        return ConstantAdvantage()

    def losses(self) -> list[LossTerm]:
        """Return the likelihood of what was kept, and the entropy's loss."""
        return [PolicyGradientLoss("nll_loss"), EntropyLoss(self.ent_coef)]
