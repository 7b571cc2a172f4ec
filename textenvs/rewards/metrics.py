"""Text metrics as reward terms: each takes finished transcripts and returns one score for each.

Named rewards refer to them (`"chrf"`), and tasks call them, so that every metric has one home.
All but `sentiment` compare the response to the example's references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from textenvs.task import Transcript


def bleu(transcripts: Sequence[Transcript]) -> list[float]:
    """Return each response's sentence BLEU against all its references, in [0, 1].

    The effective order is on: a response of three tokens is judged by its n-grams up to three.
    Source: Papineni et al. (2002), as computed by `sacrebleu.sentence_bleu`.

    Raises:
        ValueError: If an example has no references.
    """
    return _compare(transcripts, _bleu)


def chrf(transcripts: Sequence[Transcript]) -> list[float]:
    """Return each response's sentence chrF against its references, in [0, 1].

    It is the F2 score of character n-grams up to six; the best reference counts.
    Source: Popović (2015), as computed by `sacrebleu.sentence_chrf`.

    Raises:
        ValueError: If an example has no references.
    """
    return _compare(transcripts, _chrf)


def rouge_l(transcripts: Sequence[Transcript]) -> list[float]:
    """Return each response's ROUGE-L F-measure against its best reference, in [0, 1].

    Words are stemmed. Source: Lin (2004), as computed by `rouge_score`.

    Raises:
        ImportError: If `rouge_score` is not installed.
        ValueError: If an example has no references.
    """
    return _compare(transcripts, _rouge_l)


def exact_match(transcripts: Sequence[Transcript]) -> list[float]:
    """Return 1.0 for each response that is one of its references, else 0.0.

    Raises:
        ValueError: If an example has no references.
    """
    return _compare(transcripts, _exact_match)


def sentiment(transcripts: Sequence[Transcript]) -> list[float]:
    """Return how positive each response is: VADER's compound score, in [-1, 1].

    Source: Hutto & Gilbert (2014), as computed by `vaderSentiment`.
    """
    return [_sentiment(transcript.response) for transcript in transcripts]


def references_of(transcript: Transcript) -> tuple[str, ...]:
    """Return the example's references.

    Raises:
        ValueError: If it has none.
    """
    if not transcript.references:
        raise ValueError(
            "This metric compares responses to references, but the example with prompt "
            f"{transcript.example.prompt!r} has none: give the dataset references, or use a "
            "metric that needs none."
        )
    return transcript.references


def _compare(
    transcripts: Sequence[Transcript], similarity: Callable[[str, Sequence[str]], float]
) -> list[float]:
    """Score each response against its references; an empty response scores 0."""
    scores = []
    for transcript in transcripts:
        references = references_of(transcript)
        score = similarity(transcript.response, references) if transcript.response else 0.0
        scores.append(min(1.0, score))  # sacrebleu goes up to 100.00000000000004
    return scores


def _bleu(response: str, references: Sequence[str]) -> float:
    return float(_bleu_scorer().sentence_score(response, references).score) / 100


def _chrf(response: str, references: Sequence[str]) -> float:
    import sacrebleu

    return sacrebleu.sentence_chrf(response, references).score / 100


def _rouge_l(response: str, references: Sequence[str]) -> float:
    scorer = _rouge_scorer()
    return max(float(scorer.score(text, response)["rougeL"].fmeasure) for text in references)


def _exact_match(response: str, references: Sequence[str]) -> float:
    return float(response in references)


# Cached, since making a scorer takes longer than scoring a sentence.
@lru_cache(maxsize=1)
def _bleu_scorer() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise ImportError(
            'rouge_l needs the package rouge_score: pip install "textenvs[metrics]".'
        ) from error

    tokenizer = DefaultTokenizer(use_stemmer=True)
    # Stemming is most of the work, and the same references are stemmed again and again.
    tokenizer.tokenize = lru_cache(maxsize=4096)(tokenizer.tokenize)
    return RougeScorer(["rougeL"], tokenizer=tokenizer)


# Cached, since a task asks twice about a text: for the reward and for the success.
@lru_cache(maxsize=1024)
def _sentiment(text: str) -> float:
    return float(_sentiment_analyzer().polarity_scores(text)["compound"])


@lru_cache(maxsize=1)
def _sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
