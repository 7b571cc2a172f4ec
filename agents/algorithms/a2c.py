"""Advantage actor-critic."""

from __future__ import annotations

from typing import Any, ClassVar

import stable_baselines3
from stable_baselines3.common.utils import LinearSchedule

from agents import parallel
from agents.algorithms.base import TransformerAlgorithm
from agents.learning.losses import EntropyLoss, LossTerm, PolicyGradientLoss, ValueLoss
from agents.models.loading import ModelKind


class A2C(TransformerAlgorithm, stable_baselines3.A2C):
    """Advantage actor-critic (Mnih et al. 2016), as in SB3: one step for each rollout.

    With any other policy than `"TransformerPolicy"` it is SB3's A2C. Arguments that are left at
    None take SB3's default for SB3's policies, and for `TransformerPolicy` those of
    `text_defaults`.

    Args:
        policy: "TransformerPolicy", SB3's names, or a policy class.
        env: A Gymnasium environment, its id, an SB3 `VecEnv`, or a Gymnasium vector environment.
        learning_rate: A number or a function of the remaining progress. Text: 1e-3, linear to 0.
        n_steps: Tokens from each environment between updates. Text: 32.
        gamma: The discount. Text: 1.0.
        gae_lambda: The lambda of generalised advantage estimation. Text: 0.95.
        ent_coef: The weight of the entropy bonus.
        vf_coef: The weight of the value loss. 0.5.
        max_grad_norm: The global norm that gradients are clipped to. Text: 1.0.
        rms_prop_eps: RMSprop's epsilon, with `use_rms_prop`.
        use_rms_prop: Whether to use RMSprop and not the policy's optimizer. Text: no.
        use_sde: For SB3's policies.
        sde_sample_freq: For SB3's policies.
        rollout_buffer_class: None: `SequenceRolloutBuffer` for `TransformerPolicy`.
        rollout_buffer_kwargs: Its further arguments.
        normalize_advantage: Whether to whiten advantages over a rollout's tokens. Text: yes.
        stats_window_size: Over how many episodes statistics are averaged.
        tensorboard_log: A folder for TensorBoard, or None.
        policy_kwargs: The policy's arguments, e.g. `dict(model="gpt2", temperature=0.7)`.
        verbose: 0: nothing, 1: logs, 2: everything.
        seed: Seeds Python, NumPy, torch and the environment.
        device: "auto", "cpu", "cuda", ...
        _init_setup_model: Whether to build the networks at once.
        kl_coef: What a nat of KL to the reference model costs. 0: no reference model is kept.
        kl_target: The KL in nats per episode that `kl_coef` is adapted to reach, or None.
        kl_estimator: "k1" or "k3"; see `agents.learning.kl.estimate_kl`.
        kl_in: "reward" or "loss": where the KL counts.
        ref_model: The reference: a name or path. None: the policy when `learn` is first called.
        whiten_rewards: Whether to divide each rollout's rewards by their standard deviation.
        whole_episodes: Whether to learn from complete episodes alone; see `agents.PPO`.
        episodes_per_slot: Whole episodes from each environment, instead of `n_steps` tokens.
        micro_batch_size: Compute the gradient in parts of at most so many tokens, or at once.
        whiten_floor: The least standard deviation that whitening divides by.
        fit_critic: Whether a new value head is fitted to the first rollout before it is used.
        critic_warmup: So many updates at the beginning train the critic's own parameters alone.
        vf_learning_rate: The critic's own learning rate. None: as the actor's.
        vf_detach: Whether the value loss leaves the trunk alone that actor and critic share.
        gae_lambda_vf: The lambda of the returns that the critic learns. None: `gae_lambda`.
        gae_length_alpha: See `agents.PPO`.
        warmup_steps: Over so many first steps the learning rate rises to its full height. None: 0.
    """

    text_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
        "n_steps": 32,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "vf_coef": 0.5,
        "max_grad_norm": 1.0,
        "use_rms_prop": False,
        "normalize_advantage": True,
    }
    learning_rates: ClassVar[dict[ModelKind, float]] = {"pretrained": 1e-4}
    # Ctrl-C ends all ranks at the same place.
    learn = parallel.interrupted_together()(stable_baselines3.A2C.learn)

    def losses(self) -> list[LossTerm]:
        """Return A2C's: policy gradient, entropy and value."""
        return [PolicyGradientLoss(), EntropyLoss(self.ent_coef), ValueLoss(self.vf_coef)]
