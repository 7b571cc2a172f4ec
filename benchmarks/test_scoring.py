"""Metrics as rewards, in batches, against calling their library for one sentence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gymnasium as gym
import numpy as np
import pytest

from agents.rollouts.vec_env import engine_of
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


def start(text: str, rng: np.random.Generator) -> str:
    """Return a text's first words."""
    words = text.split()
    return " ".join(words[: rng.integers(1, len(words) + 1)])


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
    transcripts: list[Transcript] = []

    def respond() -> None:
        """Make responses that nobody has seen: the starts of two references each."""
        picks = rng.integers(100, size=(2, count))
        starts = ([start(engine.examples[i].references[0], rng) for i in row] for row in picks)
        transcripts[:] = [
            Transcript(example, (Turn("user", example.prompt), Turn("agent", " ".join(words))))
            for example, *words in zip(engine.examples, *starts, strict=False)
        ]

    (term,) = resolve_rewards(reward, engine.task)
    library = LIBRARIES[reward]()
    scores: dict[str, list[float]] = {}

    def batched() -> None:
        scores["ours"] = score_transcripts(term, transcripts)

    def one_at_a_time() -> None:
        scores["library"] = [library(t.response, t.references) for t in transcripts]

    sides = {"ours": Side(batched, count), "library": Side(one_at_a_time, count, respond)}
    rates = compare.run(sides)
    assert scores["ours"] == pytest.approx(scores["library"])
    against = "its library, one sentence at a time"
    compare.row(rates, "ours", "library", f"reward {reward}", against, unit="sentences/s")
