"""How an algorithm is set up: its environment, its reference, what `learn` begins with."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents import parallel
from agents.algorithms.arguments import for_transformers, given_own
from agents.algorithms.checks import MINIMUMS, check_environment, check_minimums, check_ranks_agree
from agents.algorithms.progress import ProgressBar
from agents.algorithms.resume import is_in_step, point_of_rank, restore
from agents.algorithms.texts import KnowsTexts
from agents.learning.kl import KLEstimator, KLPlace, check_kl_arguments
from agents.learning.reference import make_reference
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.statistics import TurnMetrics
from agents.rollouts.vec_env import GymnasiumVecEnv, as_vec_env


class SetUp(KnowsTexts):
    """The part of an algorithm that takes in environments; `TransformerAlgorithm` has the rest."""

    transformers_only: ClassVar[bool]
    kl_target: float | None
    kl_estimator: KLEstimator
    kl_in: KLPlace
    episodes_per_slot: int | None
    turn_metrics: TurnMetrics

    def _check_sb3_policy(self, policy: Any) -> None:
        """Refuse what SB3's policies cannot do."""
        if self.transformers_only:
            raise ValueError(
                f"{type(self).__name__} trains the policy 'TransformerPolicy', not {policy!r}."
            )
        if parallel.count() > 1:
            raise ValueError(
                "Several processes train the policy 'TransformerPolicy' together, and no other: "
                f"expected one process for {policy!r}, but {parallel.count()} were launched."
            )
        given = given_own(self)
        if given:
            raise ValueError(
                f"{' and '.join(given)} need the policy 'TransformerPolicy', not {policy!r}."
            )

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """Accept a Gymnasium vector environment, too."""
        adapted = as_vec_env(env)
        if isinstance(adapted, GymnasiumVecEnv) and monitor_wrapper:
            adapted = VecMonitor(adapted)
        return OnPolicyAlgorithm._wrap_env(adapted, verbose, monitor_wrapper)

    @for_transformers
    def _setup_model(self) -> None:
        check_kl_arguments(
            self.kl_coef, self.kl_target, self.kl_estimator, self.kl_in, self.ref_model
        )
        check_minimums({name: getattr(self, name, None) for name in MINIMUMS})
        buffer_class = self.rollout_buffer_class or SequenceRolloutBuffer
        if not issubclass(buffer_class, SequenceRolloutBuffer):
            raise ValueError(
                "A TransformerPolicy needs a SequenceRolloutBuffer, but rollout_buffer_class is "
                f"{buffer_class.__name__}: leave it out."
            )
        self.rollout_buffer_class = buffer_class
        super()._setup_model()
        self._take_in_env()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Set the environment; a Gymnasium vector environment is welcome, too."""
        super().set_env(env, force_reset)
        self._take_in_env()

    def _take_in_env(self) -> None:
        """Check a new environment, and give the policy its tokenizer."""
        if isinstance(self.policy, TransformerPolicy):
            if self.env is not None:
                check_environment(self.env, self.episodes_per_slot)
            self.take_in_tokenizer(self.policy)

    def set_reference(self) -> None:
        """Make `ref_model`, or else the present policy, the reference of the KL penalty.

        With LoRA and no `ref_model`, it is the model with its adapter as that is now.
        """
        self.reference = make_reference(self._text_policy(), self.ref_model)
        self.ref_config = self.reference.made_of

    @for_transformers
    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("There is no environment to learn in: call set_env first.")
        if total_timesteps < 0:
            raise ValueError(f"total_timesteps must be at least 0, but it is {total_timesteps}.")
        point = None if reset_num_timesteps else point_of_rank(self.resume_point)
        if parallel.count() > 1:
            check_ranks_agree(self, total_timesteps)
            self.share_weights()
        if self.kl_coef > 0 and self.reference is None:
            self.set_reference()
        if reset_num_timesteps:
            self.turn_metrics = {}
        elif point is not None or not is_in_step(self):
            self._last_obs = None  # A reset first: it starts what a state does not hold.
        setup = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self.resume_point = None
        if point is not None:
            restore(self, point)
        elif not reset_num_timesteps:
            self._say_where_schedules_are()
        self._say_what_is_trained()
        self.gather_points()
        return setup

    def _say_where_schedules_are(self) -> None:
        """Warn if a learning rate that falls goes on somewhere on its way.

        Progress is that of all steps, past and to come: `learn` in a loop starts each time from
        less of the rate, and lets it fall to its end each time.
        """
        progress = 1.0 - self.num_timesteps / max(1, self._total_timesteps)
        first, now = self.lr_schedule(1.0), self.lr_schedule(progress)
        if now != first:
            warnings.warn(
                f"learn goes on after {self.num_timesteps} steps, so that the learning rate starts "
                f"at {now:.2g} instead of {first:.2g} and falls to its end again: progress counts "
                "all steps, past and to come. To call learn in a loop, give a constant "
                "learning_rate, such as 1e-4.",
                stacklevel=4,
            )

    def _say_what_is_trained(self) -> None:
        """Log, once, how many of the weights an adapter trains."""
        policy = self._text_policy()
        if policy.backbone.adapter is None or self.num_timesteps:
            return
        every = sum(weight.numel() for weight in policy.parameters())
        trained = sum(w.numel() for w in policy.parameters() if w.requires_grad)
        self.logger.info(f"Training {trained:,} of {every:,} parameters ({trained / every:.2%})")
        self.logger.record("train/trained_parameters", trained)
        self.logger.record("train/trained_share", trained / every)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not progress_bar or parallel.count() == 1:
            return super()._init_callback(callback, progress_bar)
        bars: list[BaseCallback] = [ProgressBar()] if parallel.is_main() else []
        together = CallbackList([super()._init_callback(callback), *bars])
        together.init_callback(self)
        return together
