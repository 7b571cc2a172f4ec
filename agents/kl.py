"""The KL penalty to a reference model: estimators and the adaptive coefficient."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

KLEstimator = Literal["k1", "k3"]
ESTIMATORS = ("k1", "k3")

Floats = npt.NDArray[np.float32]


def estimate_kl(log_probs: Floats, ref_log_probs: Floats, estimator: KLEstimator = "k1") -> Floats:
    """Return an estimate of KL(policy || reference) for each token, in nats.

    Args:
        log_probs: Of tokens that the policy sampled, under the policy.
        ref_log_probs: Of the same tokens under the reference.
        estimator: "k1", log p - log q: unbiased, of either sign. "k3", q/p - 1 - log(q/p): never
            negative, with less variance; unbiased as a value. Schulman, "Approximating KL
            Divergence" (2020).
    """
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else np.expm1(log_ratio) - log_ratio


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
    error = float(np.clip(kl / target - 1, -0.2, 0.2))
    return kl_coef * (1 + error * episodes / horizon)
