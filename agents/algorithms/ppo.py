"""PPO for token-level text environments, a subclass of stable-baselines3's."""

from __future__ import annotations

import copy
import inspect
import io
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import stable_baselines3
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, unwrap_vec_normalize
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from agents import parallel
from agents.algorithms.progress import ProgressBar
from agents.algorithms.resume import ResumePoint, is_in_step, point_of_rank, restore, resume_point
from agents.learning.kl import KLEstimator, KLPlace, check_kl_arguments
from agents.learning.shaping import Truncation, bootstrap, score_kl, whiten_rewards
from agents.learning.updater import update
from agents.models.backbone import Backbone
from agents.policies.transformer import TransformerPolicy
from agents.rollouts.buffer import SequenceRolloutBuffer
from agents.rollouts.rewards import LateRewards, late_rewards
from agents.rollouts.statistics import EpisodeSums, TurnStatistics, peak_memory
from agents.rollouts.vec_env import GymnasiumVecEnv, as_vec_env

SelfPPO = TypeVar("SelfPPO", bound="PPO")

SB3_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(stable_baselines3.PPO.__init__).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}

# What `TransformerPolicy` takes where SB3's default is made for control tasks.
TEXT_DEFAULTS: dict[str, Any] = {
    "learning_rate": LinearSchedule(3e-4, 0.0, 1.0),
    "n_steps": 128,
    "batch_size": 1024,
    "n_epochs": 4,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "max_grad_norm": 1.0,
    "vf_coef": 0.5,
}

# What is not worth saving.
TRANSIENT = ("truncations", "late_rewards", "awaits_update", "rank_points")

# What several ranks must agree on, or one would wait for what the others never do.
RANK_INVARIANT = (
    "num_timesteps",
    "n_envs",
    "n_steps",
    "batch_size",
    "n_epochs",
    "kl_coef",
    "target_kl",
)

# The advantages of one token alone cannot be whitened.
MINIMUMS = {"n_steps": 1, "batch_size": 2, "n_epochs": 1, "micro_batch_size": 1}


class PPO(stable_baselines3.PPO):
    """Proximal Policy Optimization, as in SB3, with what language needs.

    With `"TransformerPolicy"`, rollouts are stored as sequences and updates run one forward for
    each of them. With any other policy it is SB3's PPO. Arguments left at None take SB3's default
    for SB3's policies, and for `TransformerPolicy` those of `TEXT_DEFAULTS`.

    Launched as several processes (`torchrun`, `accelerate launch`), all of them train one agent:
    `n_steps`, `batch_size`, `micro_batch_size` and the environments are those of each process, and
    time steps are counted over all.

    Args:
        policy: "TransformerPolicy", SB3's names, or a policy class.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        learning_rate: A number or a function of the remaining progress. Text: 3e-4, linear to 0.
        n_steps: Tokens from each environment between updates. Text: 128.
        batch_size: Tokens to a minibatch, about, as sequences stay whole. Text: 1024.
        n_epochs: Passes over the rollout in an update. Text: 4.
        gamma: The discount. Text: 1.0.
        gae_lambda: The lambda of generalised advantage estimation. 0.95.
        clip_range: The clipping of the ratio. 0.2.
        clip_range_vf: The clipping of the value, or None.
        normalize_advantage: Whether to whiten advantages over a minibatch's tokens.
        ent_coef: The weight of the entropy bonus.
        vf_coef: The weight of the value loss. 0.5.
        max_grad_norm: The global norm that gradients are clipped to. Text: 1.0.
        use_sde: For SB3's policies.
        sde_sample_freq: For SB3's policies.
        rollout_buffer_class: None: `SequenceRolloutBuffer` for `TransformerPolicy`.
        rollout_buffer_kwargs: Its further arguments.
        target_kl: Stop an update's epochs when the approximate KL to the policy before the update
            exceeds 1.5 times this. None: never.
        stats_window_size: Over how many episodes statistics are averaged.
        tensorboard_log: A folder for TensorBoard, or None.
        policy_kwargs: The policy's arguments, e.g. `dict(model="gpt2", temperature=0.7)`.
        verbose: 0: nothing, 1: logs, 2: everything.
        seed: Seeds Python, NumPy, torch and the environment.
        device: "auto", "cpu", "cuda", ...
        _init_setup_model: Whether to build the networks at once.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_target: The KL in nats per episode that `kl_coef` is adapted to reach (Ziegler et al.
            2019). None: `kl_coef` stays as it is.
        kl_estimator: "k1" or "k3"; see `agents.learning.kl.estimate_kl`.
        kl_in: "reward": the KL of each token is taken off its reward. "loss": its mean over a
            minibatch is added to the loss, each token weighted by its ratio.
        ref_model: The reference: a name or path. None: the policy as it is when `learn` is first
            called, so after a warm start; with LoRA, the model without its adapter.
        whiten_rewards: Whether to divide each rollout's rewards by their standard deviation, less
            the mean before and plus the mean after, so that the mean stays.
        whole_episodes: Whether to learn nothing from what the end of a rollout leaves of an
            episode, instead of trusting the critic's value of it. For episodes that are short to
            `n_steps`: a critic that knows nothing yet makes what is cut off look bad.
        micro_batch_size: Compute a minibatch's gradient in parts of at most so many tokens (one
            sequence at least), to hold less at a time; the result is the same. None: at once.

    Raises:
        ValueError: For arguments that make no sense together; for what the policy finds wrong
            with model, tokenizer and budgets.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        **stable_baselines3.PPO.policy_aliases,
        "TransformerPolicy": TransformerPolicy,
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | gym.vector.VectorEnv[Any, Any, Any] | str | None,
        learning_rate: float | Schedule | None = None,
        n_steps: int | None = None,
        batch_size: int | None = None,
        n_epochs: int | None = None,
        gamma: float | None = None,
        gae_lambda: float | None = None,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float | None = None,
        max_grad_norm: float | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        kl_coef: float = 0.0,
        kl_target: float | None = None,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLPlace = "reward",
        ref_model: str | None = None,
        whiten_rewards: bool = False,
        whole_episodes: bool = False,
        micro_batch_size: int | None = None,
    ) -> None:
        policy_class = self.policy_aliases.get(policy) if isinstance(policy, str) else policy
        text = policy_class is not None and issubclass(policy_class, TransformerPolicy)
        defaults = {**SB3_DEFAULTS, **(TEXT_DEFAULTS if text else {})}
        given: dict[str, Any] = {
            "learning_rate": learning_rate,
            "n_steps": n_steps,
            "batch_size": batch_size,
            "n_epochs": n_epochs,
            "gamma": gamma,
            "gae_lambda": gae_lambda,
            "vf_coef": vf_coef,
            "max_grad_norm": max_grad_norm,
        }
        if not text and parallel.count() > 1:
            raise ValueError(
                "Several processes train the policy 'TransformerPolicy' together, and no other: "
                f"expected one process for {policy!r}, but {parallel.count()} were launched."
            )
        if not text and (kl_coef or ref_model):
            raise ValueError("kl_coef and ref_model need the policy 'TransformerPolicy'.")
        if not text and (whiten_rewards or whole_episodes or micro_batch_size is not None):
            raise ValueError(
                "whiten_rewards, whole_episodes and micro_batch_size need the policy "
                "'TransformerPolicy'."
            )
        self.kl_coef = kl_coef
        self.kl_target = kl_target
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in: KLPlace = kl_in
        self.whiten_rewards = whiten_rewards
        self.whole_episodes = whole_episodes
        self.micro_batch_size = micro_batch_size
        self.turn_statistics = TurnStatistics(stats_window_size)
        self.episode_kl: EpisodeSums | None = None
        self.truncations: list[Truncation] = []
        self.late_rewards: LateRewards | None = None
        self.ref_model = ref_model
        self.reference: Backbone | None = None
        self.ref_config: PretrainedConfig | None = None
        # Whether the first weights were somebody's work; known once there is a policy.
        self.pretrained: bool | None = None
        # With several ranks there is one for each.
        self.resume_point: ResumePoint | list[ResumePoint | None] | None = None
        self.rank_points: list[ResumePoint | None] | None = None
        self.awaits_update = False
        chosen: Any = {name: defaults[name] if v is None else v for name, v in given.items()}
        if text:
            _check_sizes({**chosen, "micro_batch_size": micro_batch_size})
        with warnings.catch_warnings():
            if text:  # Sequences stay whole, so minibatches are never of one exact size.
                warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            super().__init__(
                policy,
                cast("GymEnv", env),
                **chosen,
                clip_range=clip_range,
                clip_range_vf=clip_range_vf,
                normalize_advantage=normalize_advantage,
                ent_coef=ent_coef,
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class,
                rollout_buffer_kwargs=rollout_buffer_kwargs,
                target_kl=target_kl,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose if parallel.is_main() else 0,
                seed=seed,
                device=device,
                _init_setup_model=_init_setup_model,
            )

    @property
    def is_text(self) -> bool:
        """Whether the policy is a transformer (and not one of SB3's)."""
        return issubclass(self.policy_class, TransformerPolicy)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """Accept a Gymnasium vector environment, too."""
        adapted = as_vec_env(env)
        if isinstance(adapted, GymnasiumVecEnv) and monitor_wrapper:
            adapted = VecMonitor(adapted)
        return super(PPO, PPO)._wrap_env(adapted, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        if self.is_text:
            self._check_arguments()
            if self.rollout_buffer_class is None:
                self.rollout_buffer_class = SequenceRolloutBuffer
        loaded = self.resume_point
        super()._setup_model()
        if parallel.count() > 1:  # The first weights are the same everywhere, and nothing else is.
            self._seed_rank(self.seed)
        self.resume_point = loaded  # SB3 seeds while it loads, too.
        if isinstance(self.policy, TransformerPolicy):
            # A saved agent must not depend on the path that its first weights came from.
            self.policy_kwargs = {
                **self.policy_kwargs,
                "model": self.policy.backbone.config,
                "value_model": self.policy.saved_value_model(),
            }
            if self.pretrained is None:
                self.pretrained = self.policy.pretrained
            self.policy.pretrained = self.pretrained
            self.reference = self._saved_reference()
            if self.reference is None and self.ref_model is not None:
                self.set_reference()
            self._take_in_env()

    def _take_in_env(self) -> None:
        """Check a new environment, and give the policy its tokenizer."""
        if isinstance(self.policy, TransformerPolicy) and self.env is not None:
            _check_tokens(self.env)
            self.policy.tokenizer = _tokenizer(self.env)

    def _check_arguments(self) -> None:
        """Raise a ValueError for what makes no sense, whether it was given or loaded."""
        check_kl_arguments(
            self.kl_coef, self.kl_target, self.kl_estimator, self.kl_in, self.ref_model
        )
        _check_sizes({name: getattr(self, name) for name in MINIMUMS})
        buffer_class = self.rollout_buffer_class or SequenceRolloutBuffer
        if not issubclass(buffer_class, SequenceRolloutBuffer):
            raise ValueError(
                "A TransformerPolicy needs a SequenceRolloutBuffer, but rollout_buffer_class is "
                f"{buffer_class.__name__}: leave it out."
            )

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Reckon schedules for text from where a rollout began.

        SB3 reckons from where it ended, so a rate that falls to 0 would waste the last update.
        """
        if self.is_text:
            num_timesteps -= self.n_steps * self.n_envs * parallel.count()
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        point = None if reset_num_timesteps else point_of_rank(self.resume_point)
        if self.is_text:
            if self.env is None:
                raise ValueError("There is no environment to learn in: call set_env first.")
            if parallel.count() > 1:
                self._come_together(total_timesteps)
            if self.kl_coef > 0 and self.reference is None:
                self.set_reference()
            if reset_num_timesteps:
                self.turn_statistics = TurnStatistics(self._stats_window_size)
            elif point is not None or not is_in_step(self):
                self._last_obs = None  # A reset first: it starts what a state does not hold.
        setup = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self.resume_point = None
        if point is not None:
            restore(self, point)
        self._gather_points()
        return setup

    def _gather_points(self) -> None:
        """Let every rank know where all of them stand: one that saves asks no other."""
        if parallel.count() > 1:
            self.rank_points = parallel.all_gather([resume_point(self)])

    def _come_together(self, total_timesteps: int) -> None:
        """Give every rank the main one's weights, and let that one alone write logs.

        Raises:
            ValueError: If the ranks are about to do different things.
        """
        own = {
            "total_timesteps": total_timesteps,
            **{name: getattr(self, name) for name in RANK_INVARIANT},
        }
        for rank, other in enumerate(parallel.all_gather([own])):
            if other != own:
                raise ValueError(
                    f"All ranks must do the same, but rank {parallel.rank()} has {own}, and rank "
                    f"{rank} has {other}: give them the same arguments."
                )
        parallel.broadcast(self.policy, *([] if self.reference is None else [self.reference]))
        self._text_policy().clear_cache()
        if not parallel.is_main():
            self.set_logger(Logger(None, []))

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not progress_bar or parallel.count() == 1:
            return super()._init_callback(callback, progress_bar)
        bars: list[BaseCallback] = [ProgressBar()] if parallel.is_main() else []
        together = CallbackList([super()._init_callback(callback), *bars])
        together.init_callback(self)
        return together

    # Ctrl-C ends all ranks at the same place.
    learn = parallel.interrupted_together()(stable_baselines3.PPO.learn)

    @classmethod
    def load(
        cls: type[SelfPPO],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | gym.vector.VectorEnv[Any, Any, Any] | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfPPO:
        """Load as SB3 does; keywords replace what was saved.

        With another `seed` the agent starts new episodes; another `ref_model`, or `kl_coef=0`,
        ends the saved reference.
        """
        if kwargs.get("kl_coef") == 0:
            kwargs.setdefault("ref_model", None)
        model = super().load(
            path,
            cast("GymEnv | None", env),
            device,
            custom_objects,
            print_system_info,
            force_reset,
            **kwargs,
        )
        if "seed" in kwargs:
            model.resume_point = None
        if model.reference is not None and ("ref_model" in kwargs or not model.kl_coef):
            model.reference = model.ref_config = None
            if model.ref_model is not None:
                model.set_reference()
        return model

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed every generator, as in SB3; a loaded agent then goes on with a new episode.

        Several ranks sample with `seed` + rank, and no two of their environments share a seed.
        """
        super().set_random_seed(seed)
        if seed is not None:
            self.resume_point = None
            if hasattr(self, "policy") and parallel.count() > 1:
                self._seed_rank(seed)

    def _seed_rank(self, seed: int | None) -> None:
        """Let this rank draw other random numbers than the other ones."""
        rank = parallel.rank()
        if seed is None:  # The script itself may have seeded torch.
            th.manual_seed((th.initial_seed() + rank) % 2**63)
            return
        super().set_random_seed(seed + rank)
        if self.env is not None:
            self.env.seed(seed + rank * self.n_envs)

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save as SB3 does, for text together with where the run stands.

        After `PPO.load(path, env=...)` into environments made alike,
        `learn(..., reset_num_timesteps=False)` goes on as if it had never ended: in the middle of
        the episodes and with the same random numbers. That is exact for what is saved between
        rollouts, by `agents.CheckpointCallback` or after `learn`; what is saved during one starts
        with new episodes, as in SB3. Of several ranks the main one writes, unless `path` is an
        open file.
        """
        if not parallel.is_main() and not isinstance(path, io.BufferedIOBase):
            return
        loaded = self.resume_point  # and not yet gone on from
        if self.is_text and loaded is None:
            self.resume_point = resume_point(self)
            if self.resume_point is not None and parallel.count() > 1:
                self.resume_point = self.rank_points
        try:
            super().save(path, exclude, include)
        finally:
            self.resume_point = loaded

    def _excluded_save_params(self) -> list[str]:
        text_only = ["resume_point"] * (not self.is_text)
        return [*super()._excluded_save_params(), *TRANSIENT, *text_only]

    def set_reference(self) -> None:
        """Make `ref_model`, or else the present policy, the reference of the KL penalty.

        With LoRA and no `ref_model`, it is the model with its adapter switched off.
        """
        policy = self._text_policy()
        if self.ref_model is not None:
            reference = policy.make_backbone(self.ref_model)
        elif policy.backbone.adapter is not None:
            return
        else:
            policy.backbone.clear_cache()
            reference = copy.deepcopy(policy.backbone)
        self.reference = reference.to(policy.device).requires_grad_(False)
        self.ref_config = self.reference.config

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Collect a rollout as SB3 does; for text, then settle its rewards.

        In this order: the KL penalty, the whitening, and for episodes that were cut off the value
        of what would have followed. Callbacks see the rewards as they were before.
        """
        if not self.is_text:
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        started = time.perf_counter()
        self.truncations.clear()
        self.awaits_update = True
        buffer = cast("SequenceRolloutBuffer", rollout_buffer)
        before, collect = self.num_timesteps, super().collect_rollouts

        policy = self._text_policy()
        policy.start_rollout(n_rollout_steps)

        def act() -> bool:
            with self._observing_on_host(), late_rewards(self, env, buffer):
                return collect(env, callback, rollout_buffer, n_rollout_steps)

        goes_on = parallel.run_on_all(act)
        self.num_timesteps = before + sum(parallel.all_gather([self.num_timesteps - before]))
        if not goes_on:
            return False
        if self.kl_coef > 0:
            score_kl(self, buffer)
        if self.whiten_rewards:
            whiten_rewards(buffer)
        bootstrap(self, buffer)
        buffer.recompute_returns_and_advantage()
        if self.whole_episodes:
            buffer.drop_unfinished()
        self._record_speed("rollout", started)
        return True

    @contextmanager
    def _observing_on_host(self) -> Iterator[None]:
        """Let SB3 leave observations on the host; the policy sends to its device what is new."""
        device, self.device = self.device, th.device("cpu")
        try:
            yield
        finally:
            self.device = device

    def _update_info_buffer(
        self, infos: list[dict[str, Any]], dones: npt.NDArray[np.bool_] | None = None
    ) -> None:
        if self.late_rewards is not None and dones is not None:
            self.late_rewards.hold(infos, dones)  # They come back when they are complete.
        else:
            super()._update_info_buffer(infos, dones)
        if not self.is_text:
            return
        for slot, info in enumerate(infos):
            if not info:
                continue
            if self.late_rewards is None:
                self.turn_statistics.add(info)
            if info.get("TimeLimit.truncated"):
                # Without this, SB3 would compute a value for each of them by itself.
                last = info.pop("terminal_observation", None)
                if last is not None:
                    self.truncations.append(Truncation(self.rollout_buffer.pos, slot, last))

    def train(self) -> None:
        """Update the policy from the rollout: SB3's update, or for text ours."""
        if not self.is_text:
            super().train()
            return
        started = time.perf_counter()
        update(self)
        self.awaits_update = False
        self._record_speed("update", started)
        peak = peak_memory(self.device)
        if peak is not None:
            self.logger.record("time/peak_memory_mib", peak)
        self._gather_points()

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log."""
        if self.is_text:
            self.turn_statistics.record(self.logger)
        own = self.ep_info_buffer, self.ep_success_buffer
        if parallel.count() > 1:
            self.ep_info_buffer, self.ep_success_buffer = (
                deque(parallel.all_gather(list(episodes or ()))) for episodes in own
            )
        super().dump_logs(iteration)
        self.ep_info_buffer, self.ep_success_buffer = own

    def _record_speed(self, what: str, started: float) -> None:
        """Log the rollout's tokens, of all ranks, by the second that something took."""
        seconds = time.perf_counter() - started
        tokens = self.n_steps * self.n_envs * parallel.count()
        self.logger.record(f"time/{what}_tokens_per_second", tokens / max(seconds, 1e-9))

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Set the environment; a Gymnasium vector environment is welcome, too."""
        super().set_env(env, force_reset)
        self._take_in_env()

    def set_parameters(
        self,
        load_path_or_dict: Any,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Load parameters, as in SB3; those of a reference only if there is or will be one."""
        params = load_path_or_dict
        if not isinstance(params, dict):
            params = load_from_zip_file(params, device=device, load_data=False)[1]
        if "reference" in params and self.reference is None:
            if self.is_text and self.kl_coef > 0:
                self.set_reference()
            else:
                params = {name: value for name, value in params.items() if name != "reference"}
        elif self.reference is not None and "reference" not in params:
            params = {**params, "reference": self.reference.state_dict()}
        super().set_parameters(params, exact_match, device)

    def _text_policy(self) -> TransformerPolicy:
        if not isinstance(self.policy, TransformerPolicy):
            raise TypeError(
                f"This needs a TransformerPolicy, but the policy is a {type(self.policy).__name__}."
            )
        return self.policy

    def _saved_reference(self) -> Backbone | None:
        """Return a reference for saved weights to go into, if the agent had one."""
        if self.ref_config is None:
            return None
        reference = self._text_policy().make_backbone(self.ref_config)
        return reference.to(self.policy.device).requires_grad_(False)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + ["reference"] * (self.reference is not None), variables


def _check_sizes(arguments: dict[str, Any]) -> None:
    for name, least in MINIMUMS.items():
        value = arguments[name]
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but it is {value}.")


def _check_tokens(env: VecEnv) -> None:
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.norm_obs:
        raise ValueError("Tokens cannot be normalized: give VecNormalize norm_obs=False.")


def _tokenizer(env: VecEnv) -> PreTrainedTokenizerBase | None:
    """Return the environment's tokenizer, if it has one."""
    # To ask a subprocess for what it does not have would end it.
    if not env.has_attr("tokenizer"):
        return None
    return cast("PreTrainedTokenizerBase", env.get_attr("tokenizer", indices=[0])[0])
