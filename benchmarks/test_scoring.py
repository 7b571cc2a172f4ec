"""Metrics as rewards, in batches, against calling their library for one sentence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np
import pytest

from agents.vec_env import engine_of
from benchmarks.measuring import Comparison, Side
from textenvs.rewards import resolve_rewards, score_transcripts
from textenvs.task import Transcript, Turn

Scorer = Callable[[str, Sequence[str]], float]


def sacrebleu_bleu() -> Scorer:
    from sacrebleu import sentence_bleu

    return lambda text, others: sentence_bleu(text, others, use_effective_order=True).score / 100


def sacrebleu_chrf() -> Scorer:
    from sacrebleu import sentence_chrf

    return lambda text, others: sentence_chrf(text, others).score / 100


def rouge_score_l() -> Scorer:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], True)
    return lambda text, others: max(scorer.score(o, text)["rougeL"].fmeasure for o in others)


def vader() -> Scorer:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text, others: float(analyzer.polarity_scores(text)["compound"])


LIBRARIES = {
    "bleu": sacrebleu_bleu,
    "chrf": sacrebleu_chrf,
    "rouge_l": rouge_score_l,
    "sentiment": vader,
}


@pytest.mark.benchmark(group="scoring")
@pytest.mark.parametrize("reward", LIBRARIES)
def test_scoring(compare: Comparison, reward: str, small: bool) -> None:
    engine = engine_of(gym.make("TextGen-v0"))
    count = 8 if small else 256
    rng = np.random.default_rng(0)
    # Responses are the references of other examples, cut off at random.
    texts = [engine.examples[i].references[0].split() for i in rng.integers(100, size=count)]
    responses = [" ".join(words[: rng.integers(1, len(words) + 1)]) for words in texts]
    transcripts = [
        Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))
        for example, response in zip(engine.examples, responses, strict=False)
    ]
    (term,) = resolve_rewards(reward, engine.task)
    library = LIBRARIES[reward]()
    scores: dict[str, list[float]] = {}

    def batched() -> None:
        scores["ours"] = score_transcripts(term, transcripts)

    def one_at_a_time() -> None:
        scores["library"] = [library(t.response, t.references) for t in transcripts]

    sides = {"ours": Side(batched, count), "library": Side(one_at_a_time, count)}
    rates = compare.run(sides)
    assert scores["ours"] == pytest.approx(scores["library"])
    against = "its library, one sentence at a time"
    compare.row(rates, "ours", "library", f"reward {reward}", against, unit="sentences/s")
