import sys
from collections.abc import Callable, Sequence

import pytest
import sacrebleu

from textenvs.rewards import metrics
from textenvs.task import Example, Transcript, Turn

Metric = Callable[[Sequence[Transcript]], list[float]]

REFERENCES = ("Heute sieht der kleine Hund eine Katze.", "Der kleine Hund sieht heute eine Katze.")
RESPONSES = (
    REFERENCES[0],
    "Der kleine Hund sieht heute eine Maus.",
    "Heute sieht die kleine Hund ein Katze",
    "Hund",
    "völlig anders",
)
COMPARING = [metrics.bleu, metrics.chrf, metrics.rouge_l, metrics.exact_match]


def make_transcript(response: str, references: tuple[str, ...] = REFERENCES) -> Transcript:
    example = Example("Today the small dog sees a cat.", references)
    return Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))


@pytest.mark.parametrize("response", RESPONSES)
def test_bleu_is_sacrebleus(response: str) -> None:
    expected = sacrebleu.sentence_bleu(response, REFERENCES, use_effective_order=True).score / 100
    assert metrics.bleu([make_transcript(response)]) == [pytest.approx(expected)]


def test_the_effective_order_gives_short_matches_full_bleu() -> None:
    assert metrics.bleu([make_transcript("Ja.", ("Ja.",))]) == [pytest.approx(1.0)]


@pytest.mark.parametrize("response", RESPONSES)
def test_chrf_is_sacrebleus_without_words(response: str) -> None:
    expected = sacrebleu.sentence_chrf(response, REFERENCES, word_order=0).score / 100
    assert metrics.chrf([make_transcript(response)]) == [pytest.approx(expected)]


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is "the cat sat": precision 3/4, recall 3/6.
    transcript = make_transcript("the cat sat down", ("the old cat sat by me",))
    assert metrics.rouge_l([transcript]) == [pytest.approx(2 * 0.75 * 0.5 / (0.75 + 0.5))]


def test_rouge_l_stems_and_takes_the_best_reference() -> None:
    transcript = make_transcript("the dogs barked", ("nothing at all", "the dog barks"))
    assert metrics.rouge_l([transcript]) == [pytest.approx(1.0)]


def test_exact_match_accepts_any_reference() -> None:
    responses = (*REFERENCES, REFERENCES[0].lower(), REFERENCES[0][:-1])
    assert metrics.exact_match([make_transcript(r) for r in responses]) == [1.0, 1.0, 0.0, 0.0]


def test_sentiment_is_vaders_compound_of_the_response_alone() -> None:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    texts = ["This is great!", "This is awful.", "It is a table.", ""]
    expected = [SentimentIntensityAnalyzer().polarity_scores(text)["compound"] for text in texts]
    assert metrics.sentiment([make_transcript(text, ()) for text in texts]) == expected
    assert expected[0] > 0.5 and expected[1] < -0.4 and expected[2:] == [0.0, 0.0]


@pytest.mark.parametrize("metric", COMPARING)
def test_scores_keep_the_order_of_the_batch(metric: Metric) -> None:
    transcripts = [make_transcript(response) for response in RESPONSES]
    batch = metric(transcripts)
    assert batch == [metric([transcript])[0] for transcript in transcripts]
    assert metric(transcripts[::-1]) == batch[::-1]
    assert len(set(batch)) > 1
    assert metric([]) == []


@pytest.mark.parametrize("metric", COMPARING)
def test_scores_go_from_zero_to_exactly_one(metric: Metric) -> None:
    perfect, empty, wrong = metric([make_transcript(text) for text in (REFERENCES[1], "", "xq")])
    assert perfect == 1.0
    assert empty == 0.0
    assert 0.0 <= wrong < 0.1


@pytest.mark.parametrize("metric", COMPARING)
@pytest.mark.parametrize("response", ["Hund", ""])
def test_missing_references_are_an_error_that_names_the_prompt(
    metric: Metric, response: str
) -> None:
    with pytest.raises(ValueError, match=r"'Today the small dog sees a cat\.' has none"):
        metric([make_transcript("Hund"), make_transcript(response, ())])


def test_without_rouge_score_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r'pip install "textenvs\[metrics\]"'):
        metrics.rouge_l([make_transcript("Hund")])
