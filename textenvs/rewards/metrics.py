"""Text metrics as reward terms: each takes finished transcripts and returns one score for each.

Named rewards refer to them (`"chrf"`), and tasks call them, so that every metric has one home.
All but `sentiment` compare the response to the example's references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

from textenvs.rewards.words import characters, words
from textenvs.task import Transcript

# What `bleu` takes: those of sacrebleu that need no download.
BLEU_TOKENIZERS = ("13a", "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")
# How `rouge_l` makes words of a text.
ROUGE_TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"words": words, "char": characters}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def compares(function: _Function) -> _Function:
    """Mark a function that compares responses to references, and so needs some."""
    function.needs_references = True  # type: ignore[attr-defined]
    return function


@compares
def bleu(transcripts: Sequence[Transcript], tokenize: str = "13a") -> list[float]:
    """Return each response's sentence BLEU against all its references, in [0, 1].

    The effective order is on: a response of three tokens is judged by its n-grams up to three.
    Source: Papineni et al. (2002), as computed by `sacrebleu.sentence_bleu`.

    Args:
        transcripts: Finished ones.
        tokenize: sacrebleu's name for what makes tokens of a text: "13a" separates words at spaces
            and punctuation, "intl" by Unicode's classes, "none" at spaces, "char" takes characters,
            and "zh", "ja-mecab" and "ko-mecab" are for Chinese, Japanese and Korean (the last two
            need packages of their own). The reward "bleu_zh" has "zh", and so on.

    Raises:
        ValueError: If an example has no references, or there is no such tokenisation.
    """
    scorer = bleu_scorer(tokenize)
    return _compare(transcripts, lambda r, refs: float(scorer.sentence_score(r, refs).score) / 100)


@compares
def chrf(transcripts: Sequence[Transcript]) -> list[float]:
    """Return each response's sentence chrF against its references, in [0, 1].

    It is the F2 score of character n-grams up to six; the best reference counts.
    Source: Popović (2015), as computed by `sacrebleu.sentence_chrf`.

    Raises:
        ValueError: If an example has no references.
    """
    return _compare(transcripts, _chrf)


@compares
def rouge_l(transcripts: Sequence[Transcript], tokenize: str = "words") -> list[float]:
    """Return each response's ROUGE-L F-measure against its best reference, in [0, 1].

    Source: Lin (2004), as computed by `rouge_score`, but for what makes words of a text.

    Args:
        transcripts: Finished ones.
        tokenize: "words": runs of letters, marks and digits of any script, in lower case, and
            single characters in scripts without spaces; English words are stemmed, as those of
            `rouge_score`. "char": characters, which the reward "rouge_l_char" has.

    Raises:
        ImportError: If `rouge_score` is not installed.
        ValueError: If an example has no references, or there is no such tokenisation.
    """
    scorer = rouge_scorer(tokenize)

    def similarity(response: str, references: Sequence[str]) -> float:
        return max(float(scorer.score(text, response)["rougeL"].fmeasure) for text in references)

    return _compare(transcripts, similarity)


@compares
def exact_match(transcripts: Sequence[Transcript]) -> list[float]:
    """Return 1.0 for each response that is one of its references, else 0.0.

    White space around them does not count.

    Raises:
        ValueError: If an example has no references.
    """
    return _compare(transcripts, lambda response, references: 0.0)


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
    """Score each response against its references; what equals one of them scores 1."""
    scores = []
    for transcript in transcripts:
        response = transcript.response
        references = [text.strip() for text in references_of(transcript)]
        if response in references:
            score = 1.0
        else:
            score = similarity(response, references) if response else 0.0
        scores.append(min(1.0, score))  # sacrebleu goes up to 100.00000000000004
    return scores


def _chrf(response: str, references: Sequence[str]) -> float:
    import sacrebleu

    return sacrebleu.sentence_chrf(response, references).score / 100


# Cached, since making a scorer takes longer than scoring a sentence.
@lru_cache(maxsize=8)
def bleu_scorer(tokenize: str) -> Any:
    """Return sacrebleu's BLEU with a tokenisation.

    Raises:
        ValueError: If there is none of this name, or it needs a package that is not installed.
    """
    from sacrebleu.metrics import BLEU

    _check_tokenizer("BLEU", tokenize, BLEU_TOKENIZERS)
    try:
        return BLEU(effective_order=True, tokenize=tokenize)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"BLEU's tokenisation {tokenize!r} needs a package: {error}") from error


@lru_cache(maxsize=2)
def rouge_scorer(tokenize: str) -> Any:
    """Return rouge_score's ROUGE-L with a tokenisation.

    Raises:
        ImportError: If `rouge_score` is not installed.
        ValueError: If there is no such tokenisation.
    """
    _check_tokenizer("ROUGE", tokenize, ROUGE_TOKENIZERS)
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise ImportError(
            'rouge_l needs the package rouge_score: pip install "textenvs[metrics]".'
        ) from error

    stem, split = DefaultTokenizer(use_stemmer=True).tokenize, ROUGE_TOKENIZERS[tokenize]

    # Stemming is most of the work, and the same references are stemmed again and again.
    @lru_cache(maxsize=4096)
    def tokens(text: str) -> list[str]:
        found = split(text)
        if split is words:
            found = [part for word in found for part in (stem(word) if word.isascii() else [word])]
        return found

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokens))


def _check_tokenizer(metric: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(
            f"{metric} has no tokenisation {name!r}: expected one of {', '.join(known)}."
        )


# Cached, since it is paid and observed, or asked for each reference, of the same texts.
@lru_cache(maxsize=1024)
def _sentiment(text: str) -> float:
    return float(_sentiment_analyzer().polarity_scores(text)["compound"])


@lru_cache(maxsize=1)
def _sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
