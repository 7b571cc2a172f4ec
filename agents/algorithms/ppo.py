"""Proximal Policy Optimization."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import stable_baselines3
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

from agents import parallel
from agents.algorithms.arguments import for_transformers
from agents.algorithms.base import TransformerAlgorithm
from agents.learning.losses import (
    ClipFraction,
    ClippedPolicyLoss,
    EntropyLoss,
    LossTerm,
    ValueLoss,
)
from agents.models.loading import ModelKind

TEXT_DEFAULTS: dict[str, Any] = {
    "learning_rate": LinearSchedule(2e-4, 0.0, 1.0),
    "n_steps": 64,
    "batch_size": 1024,
    "n_epochs": 4,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "max_grad_norm": 1.0,
    "vf_coef": 0.5,
    "target_kl": 0.03,
    "warmup_steps": 8,
}


class PPO(TransformerAlgorithm, stable_baselines3.PPO):
    """Proximal Policy Optimization, as in SB3, with what language needs.

    With `"TransformerPolicy"`, rollouts are stored as sequences and updates run one forward for
    each of them. With any other policy it is SB3's PPO. Arguments that are left at None take SB3's
    default for SB3's policies, and for `TransformerPolicy` those of `text_defaults`.

    Launched as several processes (`torchrun`, `accelerate launch`), all of them train one agent:
    `n_steps`, `batch_size`, `micro_batch_size` and the environments are those of each process, and
    time steps are counted over all.

    Args:
        policy: "TransformerPolicy", SB3's names, or a policy class.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        learning_rate: A number or a function of the remaining progress. Text: linear to 0, from
            2e-4 for a new model (less for one wider than 128, in proportion), 3e-5 for a pretrained
            one, 2e-3 for an adapter (less for a `lora_alpha` above `peft`'s 8, in proportion).
        n_steps: Tokens from each environment between updates. Text: 64.
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
            exceeds 1.5 times this. Text: 0.03; `float("inf")`: never.
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
        whole_episodes: Whether to learn from complete episodes alone, instead of trusting the
            critic's value of what the end of a rollout cuts. What is cut is kept and learned when
            the episode has ended, with its own log-probabilities.
        episodes_per_slot: Collect so many whole episodes from each environment between updates,
            instead of `n_steps` tokens; environments that have had theirs leave the batch. For
            environments made by `gym.make_vec`, without wrappers.
        micro_batch_size: Compute a minibatch's gradient in parts of at most so many tokens (one
            sequence at least), to hold less at a time; the result is the same. None: at once.
        whiten_floor: The least standard deviation that whitening divides by, of rewards and
            advantages alike, so that noise is not blown up where all episodes earn the same.
        fit_critic: Whether a new value head is fitted to the returns of the first rollout, by least
            squares, before there are advantages.
        critic_warmup: So many updates at the beginning train the critic's own parameters alone.
        vf_learning_rate: The learning rate of the critic's own parameters (its head, and its model
            if it has one): a number or a function of the remaining progress. None: as the actor's.
        vf_detach: Whether the value loss leaves the trunk alone that actor and critic share.
        gae_lambda_vf: The lambda of the returns that the critic learns. None: `gae_lambda`.
        warmup_steps: Over so many first steps of the optimizer the learning rate rises to its full
            height, since Adam's first ones are as long as the rate whatever the gradients say.
            Text: 8; 0: none.
        gae_length_alpha: Advantages take the lambda 1 - 1 / (alpha l) for an episode of l tokens
            (Yuan et al., "VAPO", 2025), and returns `gae_lambda_vf`. None: `gae_lambda` for all.

    Raises:
        ValueError: For arguments that make no sense together; for what the policy finds wrong
            with model, tokenizer and budgets.
    """

    text_defaults: ClassVar[dict[str, Any]] = TEXT_DEFAULTS
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 3e-5, "adapter": 2e-3}
    # Ctrl-C ends all ranks at the same place.
    learn = parallel.interrupted_together()(stable_baselines3.PPO.learn)

    def losses(self) -> list[LossTerm]:
        """Return PPO's: clipped surrogate, entropy and value, with what is logged beside them."""
        clip_range, clip_range_vf = self._clip_ranges()
        return [
            ClippedPolicyLoss(clip_range),
            EntropyLoss(self.ent_coef),
            ValueLoss(self.vf_coef, clip_range_vf),
            ClipFraction(clip_range),
        ]

    @for_transformers
    def train(self) -> None:
        """Update the policy from the rollout, and log how it went."""
        clip_range, clip_range_vf = self._clip_ranges()
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)
        super().train()

    def _clip_ranges(self) -> tuple[float, float | None]:
        """Return the clipping of ratio and value at the present progress."""
        progress = self._current_progress_remaining
        ranges = cast("tuple[Schedule, Schedule | None]", (self.clip_range, self.clip_range_vf))
        return ranges[0](progress), None if ranges[1] is None else ranges[1](progress)
