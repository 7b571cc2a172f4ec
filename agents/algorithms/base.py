"""What every algorithm of ours shares: an on-policy algorithm of SB3 that trains transformers."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from agents import parallel
from agents.algorithms.arguments import (
    for_transformers,
    given_arguments,
    given_own,
    own_parameters,
    sb3_class,
    signed,
)
from agents.algorithms.checks import check_batch_size, check_minimums, check_ranges
from agents.algorithms.recording import Recorded
from agents.learning.advantages import GAE, AdvantageEstimator, returns_to_go
from agents.learning.critic import fit_critic
from agents.learning.kl import (
    KLEstimator,
    KLPlace,
    adapt_kl_coef,
)
from agents.learning.losses import KLLoss, LossTerm, ValueLoss
from agents.learning.objective import Aggregation, Objective
from agents.learning.reference import score_reference
from agents.learning.rewards import (
    bootstrap_truncations,
    fill_last_values,
    fill_values,
    penalize_kl,
    whiten_rewards,
)
from agents.learning.updater import update
from agents.models.loading import TINY_WIDTH, ModelKind, check_device, model_kind
from agents.models.lora import strength
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.collector import StepSource, native_engine
from agents.rollouts.sources import RolloutSource
from agents.rollouts.statistics import (
    TurnMetrics,
)
from agents.rollouts.unfinished import UnfinishedEpisode, unfinished_episodes

CRITIC_ARGUMENTS = (
    *("fit_critic", "critic_warmup", "vf_learning_rate", "vf_detach"),
    *("gae_lambda_vf", "gae_length_alpha"),
)


class TransformerAlgorithm(Recorded):
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
        kl_in: "reward" or "loss": where the KL counts. Without a critic also "advantage": what of
            it is to come is taken off a token's advantage, after any baseline.
        ref_model: The reference: a name or path. None: the policy when `learn` is first called.
        whiten_rewards: Whether to divide each rollout's rewards by their standard deviation.
        whole_episodes: Whether to learn from complete episodes alone. What a rollout's end cuts
            is learned when it is complete, with its own log-probabilities.
        episodes_per_slot: Whole episodes from each environment, instead of `n_steps` tokens.
        micro_batch_size: Compute gradients in parts of at most so many tokens. None: at once.
        whiten_floor: The least standard deviation that whitening divides by, of rewards and
            advantages alike: where nearly all episodes earn the same, noise stays small.
        fit_critic: Whether to fit a new value head to the first rollout before it is used; see
            `agents.learning.critic.fit_critic`.
        critic_warmup: So many updates at the beginning train the critic's own parameters alone.
        vf_learning_rate: The critic's own learning rate, a number or a function of the remaining
            progress. None: that of the actor.
        vf_detach: Whether the value loss leaves a trunk alone that the critic shares.
        warmup_steps: Over so many first steps of the optimizer the learning rate rises to its full
            height; see `agents.learning.updater.update`. None: as `text_defaults` say, or 0.
        gae_lambda_vf: The lambda of the returns that the critic learns. None: that of advantages.
        gae_length_alpha: Advantages of longer episodes look farther; see
            `agents.learning.advantages.GAE`. None: `gae_lambda` for all.

    Raises:
        ValueError: For arguments that make no sense together; for what the policy finds wrong
            with model, tokenizer and budgets.

    Attributes:
        text_defaults: What `TransformerPolicy` takes where an argument is left at None.
        learning_rates: The learning rate that it takes instead for a pretrained model and for an
            adapter, which falls to 0 linearly. That of an adapter is for `peft`'s own `lora_alpha`
            of 8, and lower in proportion for a higher one. For a new model that is wider than the
            tiny one, that of `text_defaults` is lower in proportion.
        text_policy: What "TransformerPolicy" stands for.
        transformers_only: Whether there is no such algorithm for SB3's policies.
        unused: Arguments of SB3's class, and of ours, that mean nothing here and are none of it.
        aggregation: What the means of its losses are over; see `Objective`.
        constant_length: Likewise.
        kl_correction: Whether a KL in the loss is weighted by the ratio; see `KLLoss`.
    """

    text_defaults: ClassVar[dict[str, Any]] = {}
    learning_rates: ClassVar[dict[ModelKind, float]] = {}
    text_policy: ClassVar[type[TransformerPolicy]] = TransformerPolicy
    transformers_only: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()
    aggregation: Aggregation = "token"
    constant_length: int | None = None
    kl_correction: bool = True
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
        whiten_floor: float = 0.1,
        fit_critic: bool = True,
        critic_warmup: int = 0,
        vf_learning_rate: float | Schedule | None = None,
        vf_detach: bool = False,
        gae_lambda_vf: float | None = None,
        gae_length_alpha: float | None = None,
        warmup_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        policy_class = self.policy_aliases.get(policy) if isinstance(policy, str) else policy
        text = policy_class is not None and issubclass(policy_class, TransformerPolicy)
        defaults = self._text_defaults(kwargs.get("policy_kwargs") or {}) if text else None
        given = given_arguments(type(self), args, kwargs, defaults)
        default_warmup = given.pop("warmup_steps", 0 if text else None)
        self.warmup_steps = default_warmup if warmup_steps is None else warmup_steps
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in: KLPlace = kl_in
        self.ref_model = ref_model
        self.whiten_rewards = whiten_rewards
        self.whole_episodes = whole_episodes
        self.episodes_per_slot = episodes_per_slot
        self.micro_batch_size = micro_batch_size
        self.whiten_floor = whiten_floor
        self.fit_critic = fit_critic
        self.critic_warmup = critic_warmup
        self.vf_learning_rate = vf_learning_rate
        self.vf_detach = vf_detach
        self.gae_lambda_vf = gae_lambda_vf
        self.gae_length_alpha = gae_length_alpha
        if text:
            check_device(given.get("device", "auto"))
        else:
            self._check_sb3_policy(policy)
        self.turn_metrics: TurnMetrics = {}
        # By slot, the KL of the episode so far.
        self.episode_kl: npt.NDArray[np.float64] | None = None
        self.rollout_began = 0  # at how many time steps
        self.rollouts_learned = 0
        self.optimizer_steps = 0
        self.unfinished: list[UnfinishedEpisode] = []  # of the last rollout
        self._start_state()
        if text:
            check_minimums({**given, **vars(self)})
        if not parallel.is_main():
            given["verbose"] = 0
        with warnings.catch_warnings():
            if text:  # Sequences stay whole, so minibatches are never of one exact size.
                warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            super().__init__(cast("Any", policy), cast("GymEnv", env), **given)
        if text and self.env is not None and kwargs.get("batch_size") is not None:
            check_batch_size(self)

    def _text_defaults(self, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `text_defaults`, with the learning rate for the kind of model."""
        defaults = dict(self.text_defaults)
        model, rate = policy_kwargs.get("model", "tiny"), defaults.get("learning_rate")
        kind = model_kind(model, policy_kwargs.get("peft_config"))
        if kind in self.learning_rates:
            own = self.learning_rates[kind]
            if kind == "adapter":
                own /= strength(model, policy_kwargs.get("peft_config"))
            defaults["learning_rate"] = LinearSchedule(own, 0.0, 1.0)
        elif isinstance(rate, LinearSchedule):
            # The wider a layer is, the more a step of Adam's changes what it computes (Yang et al.,
            # "Tensor Programs V", 2022).
            share = min(1.0, TINY_WIDTH / getattr(model, "hidden_size", TINY_WIDTH))
            defaults["learning_rate"] = LinearSchedule(
                share * rate.start, share * rate.end, rate.end_fraction
            )
        return defaults

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help` show SB3's arguments with ours, and SB3's policies have ours beside them."""
        super().__init_subclass__(**kwargs)
        if sb3_class(cls) is OnPolicyAlgorithm:
            return  # What several algorithms share is none yet.
        cls.__signature__ = inspect.Signature(list(signed(cls).values()))  # type: ignore[attr-defined]
        own: dict[str, type[BasePolicy]] = {"TransformerPolicy": cls.text_policy}
        cls.policy_aliases = {**sb3_class(cls).policy_aliases, **own}

    @property
    def is_text(self) -> bool:
        """Whether the policy is a transformer (and not one of SB3's)."""
        return issubclass(self.policy_class, TransformerPolicy)

    @property
    def group_size(self) -> int:
        """How many neighbouring environments answer the same prompts."""
        engine = None if self.env is None else native_engine(self.env)
        return 1 if engine is None else engine.sampler.group_size

    @for_transformers
    def _setup_model(self) -> None:
        check_ranges(self)
        super()._setup_model()
        needs_values = self.advantage_estimator().needs_values
        if needs_values and self.kl_in == "advantage":
            raise ValueError(
                f"{type(self).__name__} has a critic, which must know the KL: kl_in='reward' or "
                "'loss'."
            )
        if needs_values and not self._text_policy().critic:
            raise ValueError(
                f"{type(self).__name__} needs a critic: leave critic=False out of policy_kwargs."
            )
        unused = [] if needs_values else given_own(self, CRITIC_ARGUMENTS)
        if unused:
            raise ValueError(
                f"{type(self).__name__} has no critic: leave {' and '.join(unused)} out."
            )
        unused = given_own(self, set(self.unused) & set(own_parameters(type(self))))
        if unused:
            raise ValueError(f"{type(self).__name__} has no {' and '.join(sorted(unused))}.")

    # What an algorithm says of itself.

    def losses(self) -> list[LossTerm]:
        """Return what an update minimises, at the present progress."""
        raise NotImplementedError(f"{type(self).__name__} must override losses.")

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return what makes advantages of a rollout."""
        return GAE(self.gamma, self.gae_lambda, self.gae_lambda_vf, self.gae_length_alpha)

    def rollout_source(self, env: VecEnv, n_steps: int) -> RolloutSource:
        """Return what fills the buffer."""
        return StepSource(
            cast("Any", self), env, n_steps, self.episodes_per_slot, self.resampling()
        )

    def resampling(self) -> Callable[[SequenceRolloutBuffer], bool] | None:
        """Return what says of a rollout whether all are to play on; None: a rollout is enough."""
        return None

    def settle(self, buffer: SequenceRolloutBuffer) -> None:
        """Change a rollout's rewards, or leave out sequences, before there are advantages."""
        return None

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
        buffer.group_size = self.group_size
        self.rollout_began, self.awaits_update = self.num_timesteps, True
        self.waited = 0.0  # for evaluations and checkpoints
        goes_on = parallel.run_on_all(lambda: source.fill(policy, buffer, callback))
        collected = self.num_timesteps - self.rollout_began
        self.num_timesteps = self.rollout_began + sum(parallel.all_gather([collected]))
        policy.clear_cache()  # The reference and the update need the memory.
        if not goes_on:
            return False
        self.complete_rollout(buffer)
        self.record_speed("rollout", started + self.waited)
        callback.update_locals(locals())
        parallel.run_on_all(lambda: _ends_rollout(callback))
        return True

    def complete_rollout(self, buffer: SequenceRolloutBuffer) -> None:
        """Compute what is learned from a rollout whose steps are all in.

        With `whole_episodes`, what the end of the rollout has cut is kept for the next one.
        In this order: the KL penalty, what `settle` does, the whitening, the values of a critic
        that is new or has a model of its own, for episodes that were truncated the value of what
        would have followed, the advantages, and the KL after them.
        """
        policy = self._text_policy()
        size = self.micro_batch_size or self.batch_size
        self.unfinished = unfinished_episodes(buffer) if self.whole_episodes else []
        kl_coef = self.kl_coef if self.kl_in == "advantage" else 0.0
        kl = self._penalize_kl(buffer) if self.kl_coef > 0 else None
        self.settle(buffer)
        estimator = self.advantage_estimator()
        if self.whiten_rewards:
            whiten_rewards(buffer, self.whiten_floor)
        if estimator.needs_values:
            if self.fit_critic and policy.critic_is_new:
                fit_critic(policy, buffer, self.gamma, size)
                fill_last_values(policy, buffer, cast("Any", self._last_obs))
            elif policy.separate_critic:
                fill_values(policy, buffer, size)
            bootstrap_truncations(policy, buffer, self.gamma)
        buffer.advantages, buffer.returns = estimator(buffer)
        if kl is not None and kl_coef:
            buffer.advantages -= kl_coef * returns_to_go(buffer, kl, self.gamma)
        if self.whole_episodes:
            buffer.drop_unfinished()

    @for_transformers
    def train(self) -> None:
        """Update the policy from the rollout, and log how it went."""
        started = time.perf_counter()
        policy, buffer = self._text_policy(), cast("SequenceRolloutBuffer", self.rollout_buffer)
        if not any(parallel.all_gather([len(buffer.sequences)])):
            self.awaits_update = False  # No episode has ended, or none is to be learned from.
            self.gather_points()
            return
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        warming = self.rollouts_learned < self.critic_warmup
        policy.vf_detach = self.vf_detach or warming
        terms = self.losses()
        if self.kl_in == "loss" and self.kl_coef:
            terms.append(KLLoss(self.kl_coef, self.kl_estimator, self.kl_correction))
        if warming:
            terms = [term for term in terms if isinstance(term, ValueLoss)]
        log = update(
            policy,
            buffer,
            Objective(
                terms,
                self.aggregation,
                self.constant_length,
                bool(self.normalize_advantage),
                self.whiten_floor,
            ),
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=self.max_grad_norm,
            target_kl=self.target_kl,
            warmup_steps=0 if warming else self.warmup_steps,
            steps_before=self.optimizer_steps,
        )
        if not warming:  # else the actor has made none
            self.optimizer_steps += log.steps
        self._n_updates += log.epochs
        self.rollouts_learned += 1
        self.awaits_update = False
        self.record_update(log, [term.name for term in terms])
        policy.facts["tokens of training"] = self.num_timesteps
        self.record_speed("update", started)
        self.gather_points()

    def _update_learning_rate(self, optimizers: Any) -> None:
        """Set the rates of the present progress; the critic may have its own."""
        super()._update_learning_rate(optimizers)
        if self.vf_learning_rate is not None and self.is_text:
            rate = FloatSchedule(self.vf_learning_rate)(self._current_progress_remaining)
            self.logger.record("train/vf_learning_rate", rate)
            for group in optimizers.param_groups:
                if group.get("name") == "critic":
                    group["lr"] = rate

    def _penalize_kl(self, buffer: SequenceRolloutBuffer) -> npt.NDArray[np.float32]:
        """Let the KL to the reference count, log it, adapt `kl_coef`, and return it by token."""
        if self.reference is None:
            raise RuntimeError("There is no reference yet: call set_reference first.")
        size = self.micro_batch_size or self.batch_size
        score_reference(self._text_policy(), self.reference, buffer, size)
        coefficient = self.kl_coef if self.kl_in == "reward" else 0.0
        kl = penalize_kl(buffer, coefficient, self.kl_estimator)
        of_episodes = self.record_kl(buffer, kl)
        if of_episodes and self.kl_target is not None:
            mean, count = float(np.mean(of_episodes)), len(of_episodes)
            self.kl_coef = adapt_kl_coef(self.kl_coef, mean, self.kl_target, count)
        return kl

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
