"""What every algorithm of ours shares: an on-policy algorithm of SB3 that trains transformers."""

from __future__ import annotations

import inspect
import time
import warnings
from collections import deque
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from agents import parallel
from agents.algorithms.arguments import for_transformers, given_arguments, sb3_class, signed
from agents.algorithms.checks import check_minimums
from agents.algorithms.setup import SetUp
from agents.learning.advantages import GAE, AdvantageEstimator
from agents.learning.kl import (
    KLEstimator,
    KLPlace,
    adapt_kl_coef,
    estimate_kl,
)
from agents.learning.losses import KLLoss, LossTerm
from agents.learning.objective import Aggregation, Objective
from agents.learning.reference import score_reference
from agents.learning.rewards import bootstrap_truncations, fill_values, whiten_rewards
from agents.learning.updater import UpdateLog, update
from agents.models.loading import check_device
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.collector import StepSource
from agents.rollouts.sources import RolloutSource
from agents.rollouts.statistics import (
    TurnMetrics,
    add_turn,
    episode_sums,
    peak_memory,
    record_turns,
)


class TransformerAlgorithm(SetUp):
    """An on-policy algorithm of SB3 that also trains a `TransformerPolicy`, by our own means.

    A class is made from this one and SB3's, in that order, and says what it minimises. With
    SB3's policies it is SB3's algorithm. The arguments are SB3's and those below; left at None,
    those of `text_defaults` take what is there for `TransformerPolicy`, and SB3's default for any
    other policy.

    Args:
        policy: "TransformerPolicy", SB3's names, or a policy class.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_target: The KL in nats per episode that `kl_coef` is adapted to reach, or None.
        kl_estimator: "k1" or "k3"; see `agents.learning.kl.estimate_kl`.
        kl_in: "reward" or "loss": where the KL counts.
        ref_model: The reference: a name or path. None: the policy when `learn` is first called.
        whiten_rewards: Whether to divide each rollout's rewards by their standard deviation.
        whole_episodes: Whether to learn nothing from episodes that a rollout's end has cut.
        episodes_per_slot: Whole episodes from each environment, instead of `n_steps` tokens.
        micro_batch_size: Compute gradients in parts of at most so many tokens. None: at once.

    Raises:
        ValueError: For arguments that make no sense together; for what the policy finds wrong
            with model, tokenizer and budgets.

    Attributes:
        text_defaults: What `TransformerPolicy` takes where an argument is left at None.
        transformers_only: Whether there is no such algorithm for SB3's policies.
        unused: Arguments of SB3's class that mean nothing here, and are none of this one's.
        aggregation: What the means of its losses are over; see `Objective`.
        constant_length: Likewise.
    """

    text_defaults: ClassVar[dict[str, Any]] = {}
    transformers_only: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    # Where SB3's class has no such argument: one step for the whole rollout.
    n_epochs: Any = 1
    batch_size: Any = None
    target_kl: Any = None
    normalize_advantage: Any = True

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | gym.vector.VectorEnv[Any, Any, Any] | str | None,
        *args: Any,
        kl_coef: float = 0.0,
        kl_target: float | None = None,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLPlace = "reward",
        ref_model: str | None = None,
        whiten_rewards: bool = False,
        whole_episodes: bool = False,
        episodes_per_slot: int | None = None,
        micro_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        policy_class = self.policy_aliases.get(policy) if isinstance(policy, str) else policy
        text = policy_class is not None and issubclass(policy_class, TransformerPolicy)
        defaults = self.text_defaults if text else None
        given = given_arguments(type(self), args, kwargs, defaults)
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in: KLPlace = kl_in
        self.ref_model = ref_model
        self.whiten_rewards = whiten_rewards
        self.whole_episodes = whole_episodes
        self.episodes_per_slot = episodes_per_slot
        self.micro_batch_size = micro_batch_size
        if text:
            check_device(given.get("device", "auto"))
        else:
            self._check_sb3_policy(policy)
        self.turn_metrics: TurnMetrics = {}
        # By slot, the KL of the episode so far.
        self.episode_kl: npt.NDArray[np.float64] | None = None
        self.rollout_began = 0  # at how many time steps
        self._start_state()
        if text:
            check_minimums({**given, **vars(self)})
        if not parallel.is_main():
            given["verbose"] = 0
        with warnings.catch_warnings():
            if text:  # Sequences stay whole, so minibatches are never of one exact size.
                warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            super().__init__(cast("Any", policy), cast("GymEnv", env), **given)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help` show SB3's arguments with ours, and SB3's policies have ours beside them."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inspect.Signature(list(signed(cls).values()))  # type: ignore[attr-defined]
        own: dict[str, type[BasePolicy]] = {"TransformerPolicy": TransformerPolicy}
        cls.policy_aliases = {**sb3_class(cls).policy_aliases, **own}

    @property
    def is_text(self) -> bool:
        """Whether the policy is a transformer (and not one of SB3's)."""
        return issubclass(self.policy_class, TransformerPolicy)

    @for_transformers
    def _setup_model(self) -> None:
        super()._setup_model()
        if self.advantage_estimator().needs_values and not self._text_policy().critic:
            raise ValueError(
                f"{type(self).__name__} needs a critic: leave critic=False out of policy_kwargs."
            )

    # What an algorithm says of itself.

    def losses(self) -> list[LossTerm]:
        """Return what an update minimises, at the present progress."""
        raise NotImplementedError(f"{type(self).__name__} must override losses.")

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what makes advantages of a rollout."""
        return GAE(self.gamma, self.gae_lambda)

    def rollout_source(self, env: VecEnv, n_steps: int) -> RolloutSource:
        """Return what fills the buffer."""
        return StepSource(cast("Any", self), env, n_steps, self.episodes_per_slot)

    # One iteration.

    @for_transformers
    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Fill the buffer, and compute advantages from it.

        Callbacks see the rewards step by step as the environment gave them, and what
        `complete_rollout` made of them at the rollout's end.
        """
        started = time.perf_counter()
        policy, buffer = self._text_policy(), cast("SequenceRolloutBuffer", rollout_buffer)
        source = self.rollout_source(env, n_rollout_steps)
        buffer.layout, buffer.policy_version = policy.backbone.layout, self._n_updates
        self.rollout_began, self.awaits_update = self.num_timesteps, True
        goes_on = parallel.run_on_all(lambda: source.fill(policy, buffer, callback))
        collected = self.num_timesteps - self.rollout_began
        self.num_timesteps = self.rollout_began + sum(parallel.all_gather([collected]))
        policy.clear_cache()  # The reference and the update need the memory.
        if not goes_on:
            return False
        self.complete_rollout(buffer)
        callback.update_locals(locals())
        parallel.run_on_all(lambda: _ends_rollout(callback))
        self._record_speed("rollout", started)
        return True

    def complete_rollout(self, buffer: SequenceRolloutBuffer) -> None:
        """Compute what is learned from a rollout whose steps are all in.

        In this order: the values of a critic of its own, the KL penalty, the whitening, for
        episodes that were truncated the value of what would have followed, the advantages.
        """
        policy, estimator = self._text_policy(), self.advantage_estimator()
        size = self.micro_batch_size or self.batch_size
        if policy.separate_critic and estimator.needs_values:
            fill_values(policy, buffer, size)
        if self.kl_coef > 0:
            if self.reference is None:
                raise RuntimeError("There is no reference yet: call set_reference first.")
            score_reference(policy, self.reference, buffer, size)
            self._penalize_kl(buffer)
        if self.whiten_rewards:
            whiten_rewards(buffer)
        if estimator.needs_values:
            bootstrap_truncations(policy, buffer, self.gamma)
        buffer.advantages, buffer.returns = estimator(buffer)
        if self.whole_episodes:
            buffer.drop_unfinished()

    @for_transformers
    def train(self) -> None:
        """Update the policy from the rollout, and log how it went."""
        started = time.perf_counter()
        policy = self._text_policy()
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        terms = self.losses()
        if self.kl_in == "loss" and self.kl_coef:
            terms.append(KLLoss(self.kl_coef, self.kl_estimator))
        log = update(
            policy,
            cast("SequenceRolloutBuffer", self.rollout_buffer),
            Objective(
                terms, self.aggregation, self.constant_length, bool(self.normalize_advantage)
            ),
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=self.max_grad_norm,
            target_kl=self.target_kl,
        )
        self._n_updates += log.epochs
        self.awaits_update = False
        self._record_update(log, [term.name for term in terms])
        policy.facts["tokens of training"] = self.num_timesteps
        self._record_speed("update", started)
        peak = peak_memory(self.device)
        if peak is not None:
            self.logger.record("time/peak_memory_mib", peak)
        self.gather_points()

    def _penalize_kl(self, buffer: SequenceRolloutBuffer) -> None:
        """Take each token's KL to the reference off its reward, log it, adapt `kl_coef`."""
        log_probs, reference = map(th.from_numpy, (buffer.log_probs, buffer.ref_log_probs))
        kl = estimate_kl(log_probs, reference, self.kl_estimator).numpy()
        if self.kl_in == "reward":
            buffer.rewards -= self.kl_coef * kl
        every = np.concatenate(parallel.all_gather([kl[buffer.real]]))
        self.logger.record("kl/per_token", float(every.mean()))
        self.logger.record("kl/coef", self.kl_coef)
        if self.episode_kl is None or len(self.episode_kl) != buffer.n_envs:
            self.episode_kl = np.zeros(buffer.n_envs)
        sums = episode_sums(self.episode_kl, kl, buffer.episode_starts, buffer.episode_ends)
        finished = parallel.all_gather(sums)
        if finished:
            mean = float(np.mean(finished))
            self.logger.record("kl/per_episode", mean)
            if self.kl_target is not None:
                count = len(finished)
                self.kl_coef = adapt_kl_coef(self.kl_coef, mean, self.kl_target, count)

    # What is logged.

    def record_infos(self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_]) -> None:
        """Take in a step's infos, for the means of the last episodes and turns."""
        self._update_info_buffer(infos, dones)
        for info in infos:
            if info:
                add_turn(self.turn_metrics, info, self._stats_window_size)

    def _record_update(self, log: UpdateLog, terms: list[str]) -> None:
        metrics = log.metrics
        for name in (*terms, "grad_norm"):
            if metrics[name]:
                self.logger.record(f"train/{name}", np.mean(metrics[name]))
        self.logger.record("train/approx_kl", log.approx_kl)
        first = parallel.all_gather(metrics["ratio_error"][:1])
        self.logger.record("train/first_ratio_error", max(first))
        self.logger.record("train/loss", metrics["loss"][-1])
        buffer = cast("SequenceRolloutBuffer", self.rollout_buffer)
        if self._text_policy().critic:
            own = buffer.values[buffer.real], buffer.returns[buffer.real]
            every = zip(*parallel.all_gather([own]), strict=True)
            explained = explained_variance(*map(np.concatenate, every))
            self.logger.record("train/explained_variance", explained)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _record_speed(self, what: str, started: float) -> None:
        """Log the rollout's tokens, of all ranks, by the second that something took."""
        seconds = time.perf_counter() - started
        tokens = self.num_timesteps - self.rollout_began
        self.logger.record(f"time/{what}_tokens_per_second", tokens / max(seconds, 1e-9))

    @for_transformers
    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log."""
        record_turns(self.turn_metrics, self.logger)
        own = self.ep_info_buffer, self.ep_success_buffer
        if parallel.count() > 1:
            self.ep_info_buffer, self.ep_success_buffer = (
                deque(parallel.all_gather(list(episodes or ()))) for episodes in own
            )
        super().dump_logs(iteration)
        self.ep_info_buffer, self.ep_success_buffer = own

    @for_transformers
    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Reckon schedules from where a rollout began.

        SB3 reckons from where it ended, so a rate that falls to 0 would waste the last update.
        """
        super()._update_current_progress_remaining(self.rollout_began, total_timesteps)


def _ends_rollout(callback: BaseCallback) -> bool:
    """Tell a callback that a rollout has ended, and return True."""
    callback.on_rollout_end()
    return True
