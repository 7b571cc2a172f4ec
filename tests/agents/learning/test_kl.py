from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th

from agents.learning.kl import adapt_kl_coef, estimate_kl


def test_estimators_are_those_of_schulman() -> None:
    log_probs, ref = th.tensor([[-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0]])
    assert estimate_kl(log_probs, ref, "k1").tolist() == [1.0, 0.0, -2.0]
    ratios = [math.exp(-1), 1.0, math.exp(2)]
    expected = [ratio - 1 - math.log(ratio) for ratio in ratios]
    assert estimate_kl(log_probs, ref, "k3").tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_have_the_kl_as_their_mean(estimator: str) -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(6)) for _ in range(2))
    values = estimate_kl(
        th.from_numpy(np.log(p)), th.from_numpy(np.log(q)), "k1" if estimator == "k1" else "k3"
    ).numpy()
    assert (p * values).sum() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
    assert (values.min() < 0) == (estimator == "k1")


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]
)
def test_controller_is_that_of_ziegler(kl: float, error: float) -> None:
    assert adapt_kl_coef(0.2, kl, 6.0, 256) == pytest.approx(0.2 * (1 + error * 256 / 10_000))
    assert adapt_kl_coef(0.2, kl, 6.0, 10, 100) == pytest.approx(0.2 * (1 + error * 0.1))
