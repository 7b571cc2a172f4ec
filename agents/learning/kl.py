"""The KL penalty to a reference model: estimators and the adaptive coefficient."""

from __future__ import annotations

from typing import Literal, get_args

import torch as th

KLEstimator = Literal["k1", "k3"]
KLPlace = Literal["reward", "loss", "advantage"]


def estimate_kl(
    log_probs: th.Tensor, ref_log_probs: th.Tensor, estimator: KLEstimator = "k1"
) -> th.Tensor:
    """Return an estimate of KL(policy || reference) for each token, in nats.

    Args:
        log_probs: Of tokens that the policy sampled, under the policy.
        ref_log_probs: Of the same tokens under the reference.
        estimator: "k1", log p - log q: unbiased, of either sign. "k3", q/p - 1 - log(q/p): never
            negative, with less variance; unbiased unless top-k or top-p cut the reference to
            other tokens than the policy. Schulman, "Approximating KL Divergence" (2020).
    """
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else th.expm1(log_ratio) - log_ratio


def adapt_kl_coef(
    kl_coef: float, kl: float, target: float, episodes: int, horizon: int = 10_000
) -> float:
    """Return the next coefficient of the adaptive controller of Ziegler et al. (2019).

    Args:
        kl_coef: The present coefficient.
        kl: The mean KL of the last rollout, in nats per episode.
        target: What it should be.
        episodes: How many episodes the rollout had.
        horizon: Over how many episodes an error of 100 % would double the coefficient, were it
            not clipped to 20 %.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def check_kl_arguments(
    kl_coef: float,
    kl_target: float | None,
    estimator: str,
    place: str,
    ref_model: str | None,
) -> None:
    """Raise a ValueError for arguments of `agents.PPO` that make no sense together."""
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be at least 0, but it is {kl_coef}.")
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"kl_estimator must be 'k1' or 'k3', but it is {estimator!r}.")
    if place not in get_args(KLPlace):
        raise ValueError(f"kl_in must be 'reward', 'loss' or 'advantage', but it is {place!r}.")
    if kl_target is not None and not (kl_target > 0 and kl_coef > 0):
        raise ValueError(
            f"kl_target={kl_target} adapts kl_coef, so both must be positive; kl_coef is {kl_coef}."
        )
    if ref_model is not None and not kl_coef:
        raise ValueError("ref_model is for a KL penalty: give kl_coef, too, or leave it out.")
