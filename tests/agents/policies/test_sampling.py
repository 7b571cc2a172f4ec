from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from torch.distributions import Categorical

from agents.policies.sampling import Sampling, TokenDistribution, in_chunks, token_log_probs
from tests.agents.agents import LargestTensor

# Standard normal quantile of 1 - 1e-6, for Wilson-Hilferty's approximation of chi-square's.
QUANTILE = 4.753


def chi_square(counts: th.Tensor, probs: th.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def critical(freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + QUANTILE * math.sqrt(spread)) ** 3


def draw(log_probs: th.Tensor, count: int, seed: int = 0) -> th.Tensor:
    with th.random.fork_rng():
        th.manual_seed(seed)
        return TokenDistribution(log_probs[None, :].expand(count, -1)).sample()


def naive(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities by the definitions, one token after the other, in float64."""
    scaled = [value / temperature for value in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k:
        order = order[:top_k]

    def normalised(tokens: list[int]) -> dict[int, float]:
        weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in tokens}
        return {i: weight / sum(weights.values()) for i, weight in weights.items()}

    probs, nucleus, mass = normalised(order), [], 0.0
    for token in order:
        nucleus.append(token)
        mass += probs[token]
        if mass >= top_p:
            break
    kept = normalised(nucleus)
    return [kept.get(i, 0.0) for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.6), (0.7, 6, 0.8), (1.0, 1, 1.0)],
)
def test_processed_distribution_is_that_of_the_definitions(
    temperature: float, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 12)) * 2
    sampling = Sampling(temperature, top_k, top_p)
    probs = sampling.log_probs(th.tensor(logits, dtype=th.float32), None).exp().double()
    expected = th.tensor([naive(list(row), temperature, top_k, top_p) for row in logits])
    assert th.equal(probs > 0, expected > 0)
    assert (probs - expected).abs().max() < 1e-6


def test_top_k_larger_than_the_vocabulary_keeps_all() -> None:
    logits = th.randn(3, 5, generator=th.Generator().manual_seed(0))
    assert th.equal(Sampling(top_k=9).log_probs(logits, None), Sampling().log_probs(logits, None))


def test_allowed_tokens_come_before_top_k_and_top_p() -> None:
    logits = th.tensor([[9.0, 8.0, 3.0, 2.0, 1.0]])
    allowed = th.tensor([False, False, True, True, True])
    probs = Sampling(top_k=2).log_probs(logits, allowed).exp()[0]
    assert probs[:2].sum() == 0 and probs[4] == 0
    assert probs[2] == pytest.approx(1 / (1 + math.exp(-1)))
    nucleus = Sampling(top_p=0.5).log_probs(logits, allowed).exp()[0]
    assert nucleus.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.5)])
def test_keep_brings_a_token_back(sampling: Sampling) -> None:
    logits = th.tensor([[4.0, 3.0, 2.0, 1.0]])
    without = sampling.log_probs(logits, None)[0]
    kept = sampling.log_probs(logits, None, keep=th.tensor([3]))[0]
    assert without[3] == -th.inf and without[2] == -th.inf
    assert kept[2] == -th.inf
    inside = th.isfinite(kept)
    assert inside[3] and inside.sum() == th.isfinite(without).sum() + 1
    assert kept[inside].exp().sum() == pytest.approx(1)
    assert (kept[0] - kept[3]).item() == pytest.approx(3)
    # What is in the distribution anyway changes nothing.
    assert th.equal(sampling.log_probs(logits, None, keep=th.tensor([0]))[0], without)


def test_half_precision_logits_give_float32() -> None:
    logits = th.randn(4, 1000, generator=th.Generator().manual_seed(0)).bfloat16()
    log_probs = Sampling().log_probs(logits, None)
    assert log_probs.dtype == th.float32
    assert log_probs.exp().sum(-1) == pytest.approx([1] * 4, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_the_probabilities(seed: int) -> None:
    logits = th.randn(20, generator=th.Generator().manual_seed(seed))
    log_probs = logits.log_softmax(-1)
    counts = th.bincount(draw(log_probs, 50_000, seed), minlength=20)
    assert chi_square(counts, log_probs.exp()) < critical(19)
    # The test has power: a distribution that is off by a few per cent is told apart.
    assert chi_square(counts, (logits * 0.9).softmax(-1)) > critical(19)


def test_rows_are_drawn_from_their_own_distribution() -> None:
    log_probs = th.tensor([[0.9, 0.1], [0.1, 0.9]]).log().repeat(20_000, 1)
    with th.random.fork_rng():
        th.manual_seed(0)
        ones = TokenDistribution(log_probs).sample().reshape(-1, 2).float().mean(0)
    assert ones.tolist() == pytest.approx([0.1, 0.9], abs=0.01)


@pytest.mark.parametrize("zeros", [[0], [0, 1, 2], [9], [7, 8, 9], [0, 4, 5, 9]])
def test_impossible_tokens_are_never_drawn(zeros: list[int]) -> None:
    scores = th.zeros(10)
    scores[zeros] = -th.inf
    drawn = draw(scores.log_softmax(-1), 20_000)
    assert sorted(set(drawn.tolist())) == [i for i in range(10) if i not in zeros]


# 1 is never drawn, but what is drawn times the sum of the probabilities may round to that sum.
@pytest.mark.parametrize("number", [0.0, 1 - 2**-24, 1.0])
def test_the_ends_of_the_interval_hit_possible_tokens(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th, "rand", lambda *shape, **_: th.full(shape, number))
    scores = th.randn(50_257, generator=th.Generator().manual_seed(0)) * 3
    scores[:100] = scores[-100:] = scores[20_000:30_000] = -th.inf
    distribution = TokenDistribution(scores.log_softmax(-1)[None, :])
    (token,) = distribution.sample()
    assert th.isfinite(scores[token])
    assert token == (100 if number == 0 else token) and 100 <= token < 50_157


def test_large_vocabulary() -> None:
    logits = th.randn(50_257, generator=th.Generator().manual_seed(0)) * 2
    logits[::2] = -th.inf
    log_probs = logits.log_softmax(-1)
    drawn = th.cat([draw(log_probs, 200, seed) for seed in range(20)])
    assert (drawn % 2 == 1).all()
    bins = th.arange(50_257) * 20 // 50_257  # twenty bins of neighbours
    mass = th.zeros(20).scatter_add(0, bins, log_probs.exp())
    assert chi_square(th.bincount(bins[drawn], minlength=20), mass) < critical(19)


def test_entropy_and_log_prob_are_those_of_a_categorical() -> None:
    logits = th.randn(8, 40, generator=th.Generator().manual_seed(0)) * 3
    logits[:, ::3] = -th.inf
    logits.requires_grad_()
    ours = TokenDistribution(Sampling(temperature=0.7).log_probs(logits, None))
    theirs = Categorical(logits=(logits / 0.7).clamp(min=-1e30))
    tokens = th.tensor([1, 2, 4, 5, 7, 8, 10, 11])
    assert th.allclose(ours.entropy(), theirs.entropy(), atol=1e-6)
    assert th.allclose(ours.log_prob(tokens), theirs.log_prob(tokens), atol=1e-6)
    (gradient,) = th.autograd.grad(ours.entropy().sum() + ours.log_prob(tokens).sum(), logits)
    assert th.isfinite(gradient).all() and (gradient[:, ::3] == 0).all()
    assert gradient[:, 1::3].abs().min() > 0


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=9), Sampling(top_p=0.6)]
)
def test_tokens_are_scored_as_by_the_distribution(sampling: Sampling) -> None:
    random = th.Generator().manual_seed(0)
    logits = th.randn(8, 40, generator=random) * 3
    logits.requires_grad_()
    tokens, weights = th.randint(40, (8,), generator=random), th.randn(8, generator=random)
    scores = sampling.scores(logits, None, keep=tokens)
    log_probs, entropies = token_log_probs(scores, tokens)
    plain = TokenDistribution(sampling.log_probs(logits, None, keep=tokens))
    assert th.equal(log_probs, plain.log_prob(tokens))
    assert th.allclose(entropies, plain.entropy(), atol=1e-6)
    assert not entropies.requires_grad
    (gradient,) = th.autograd.grad((weights * log_probs).sum(), logits)
    (expected,) = th.autograd.grad((weights * plain.log_prob(tokens)).sum(), logits)
    assert th.allclose(gradient, expected, atol=1e-6)


def test_mode_is_the_most_likely_token() -> None:
    logits = th.randn(8, 40, generator=th.Generator().manual_seed(0))
    distribution = TokenDistribution(logits.log_softmax(-1))
    assert distribution.get_actions(deterministic=True).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("size", [3, 10])
def test_chunks_take_what_else_there_is_of_each_token(size: int) -> None:
    hidden, factors = th.arange(10.0, requires_grad=True)[:, None], [str(i) for i in range(10)]

    def score(hidden: th.Tensor, tokens: th.Tensor, factors: list[str]) -> tuple[th.Tensor]:
        return (hidden[:, 0] * th.tensor([float(factor) for factor in factors]),)

    (products,) = in_chunks(score, hidden, th.zeros(10), size, factors)
    assert products.tolist() == [float(i * i) for i in range(10)]
    (gradient,) = th.autograd.grad(products.sum(), hidden)
    assert gradient[:, 0].tolist() == [float(i) for i in range(10)]


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_chunks_change_nothing_and_hold_less(size: int) -> None:
    generator = th.Generator().manual_seed(0)
    head = th.nn.Linear(8, 300)
    hidden = th.randn(40, 8, generator=generator, requires_grad=True)
    tokens = th.randint(0, 300, (40,), generator=generator)
    calls = []

    def score(hidden: th.Tensor, tokens: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        calls.append(len(tokens))
        log_probs = Sampling(temperature=0.7, top_k=50).log_probs(head(hidden), None, tokens)
        distribution = TokenDistribution(log_probs)
        return distribution.log_prob(tokens), distribution.entropy()

    wanted = [hidden, *head.parameters()]
    expected = score(hidden, tokens)
    whole = th.autograd.grad(expected[0].sum() + expected[1].pow(2).sum(), wanted)
    calls.clear()
    with LargestTensor() as largest:
        answers = in_chunks(score, hidden, tokens, size)
        assert sum(calls) == 40 and max(calls) == min(size, 40)
        parts = th.autograd.grad(answers[0].sum() + answers[1].pow(2).sum(), wanted)
    assert sum(calls) == (80 if size < 40 else 40)  # Nothing was kept, but computed again.
    for answer, exact in zip((*answers, *parts), (*expected, *whole), strict=True):
        assert answer.shape == exact.shape and th.allclose(answer, exact, atol=1e-5)
    # The head itself has 300 x 8 numbers.
    assert largest.elements == max(2400, min(size, 40) * 300)
    calls.clear()
    with th.no_grad():
        assert th.equal(in_chunks(score, hidden, tokens, size)[0], answers[0].detach())
    assert sum(calls) == 40  # without gradients nothing is computed twice


@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.0}, {"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}]
)
def test_values_that_make_no_distribution(kwargs: dict[str, Any]) -> None:
    (name,) = kwargs
    with pytest.raises(ValueError, match=name):
        Sampling(**kwargs)
