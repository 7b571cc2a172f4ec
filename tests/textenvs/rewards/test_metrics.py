import pickle
import sys
import unicodedata
from collections.abc import Callable, Sequence

import pytest
import sacrebleu

from textenvs.rewards import metrics, resolve_rewards
from textenvs.rewards.words import words
from textenvs.task import Example, Task, Transcript, Turn

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
    metrics.rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r'pip install "textenvs\[metrics\]"'):
        metrics.rouge_l([make_transcript("Hund")])


SCRIPTS = {
    "Chinese": ("我喜欢这家餐厅的汤", "我喜欢这家旅馆的床"),
    "Japanese": ("この店のスープはおいしい", "この店のケーキはまずい"),
    "Thai": ("ซุปที่ร้านนี้อร่อยมาก", "เตียงที่โรงแรมนี้แข็งมาก"),
    "Korean": ("이 식당의 수프는 맛있다", "이 호텔의 침대는 딱딱하다"),
    "Hindi": ("यह सूप बहुत अच्छा था", "यह बिस्तर बहुत सख्त था"),
    "Arabic": ("كان الحساء لذيذا جدا", "كان السرير قاسيا جدا"),
    "Russian": ("Суп был очень вкусным", "Кровать была очень жёсткой"),
    "Greek": ("ένα νόστιμο σούπας πιάτο", "ένα σκληρό ξύλινο κρεβάτι"),
    "German": ("Männer mögen Öl", "Mönner mögen Äl"),
    "emoji": ("👍👍", "👎"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("metric", COMPARING)
def test_texts_of_any_script_are_compared(metric: Metric, script: str) -> None:
    text, other = SCRIPTS[script]
    same, different, second = metric(
        [
            make_transcript(*pair)
            for pair in ((text, (text,)), (other, (text,)), (text, (other, text)))
        ]
    )
    assert same == second == 1.0
    assert 0.0 <= different < 1.0


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"emoji"}))
def test_rouge_l_counts_the_words_of_a_script(script: str) -> None:
    """Half of the words, or of the characters where there are no spaces, give 2/3."""
    text = SCRIPTS[script][0]
    found = words(text)
    assert len(found) > 2 and rouge(text, text) == 1.0
    half = text[: text.index(found[len(found) // 2], len(found[0]))].strip()
    kept = len(words(half))
    assert 0 < kept < len(found)
    assert rouge(half, text) == pytest.approx(2 * kept / (kept + len(found)))


def rouge(response: str, reference: str) -> float:
    return metrics.rouge_l([make_transcript(response, (reference,))])[0]


def test_rouge_l_of_english_is_rouge_scores() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [
        "The dogs' barking wasn't_nice, 3 times!",
        "the dog barks nicely 3 time",
        "a-b-c",
        "x2y",
    ]
    for response in texts:
        for reference in set(texts) - {response}:
            expected = scorer.score(reference, response)["rougeL"].fmeasure
            assert rouge(response, reference) == pytest.approx(expected)


def test_how_characters_are_composed_does_not_matter_to_words() -> None:
    composed, decomposed = "Männer mögen Öl", unicodedata.normalize("NFD", "Männer mögen Öl")
    assert composed != decomposed and words(composed) == words(decomposed)
    assert rouge(decomposed, composed) == 1.0


def test_the_tokenisation_can_be_chosen() -> None:
    text, other = "我喜欢汤。", "我喜欢床。"
    pair = [make_transcript(other, (text,))]
    for tokenize in ("13a", "intl", "char", "zh", "none"):
        expected = sacrebleu.sentence_bleu(
            other, [text], tokenize=tokenize, use_effective_order=True
        )
        assert metrics.bleu(pair, tokenize=tokenize) == [pytest.approx(expected.score / 100)]
    assert metrics.bleu(pair, tokenize="zh")[0] > metrics.bleu(pair)[0]
    pair = [make_transcript("Mönner", ("Männer",))]
    assert metrics.rouge_l(pair) == [0.0]
    assert metrics.rouge_l(pair, tokenize="char") == [pytest.approx(5 / 6)]


@pytest.mark.parametrize("name", ["bleu_zh", "bleu_char", "bleu_intl", "rouge_l_char"])
def test_a_reward_can_name_its_tokenisation(name: str) -> None:
    (term,) = resolve_rewards(name, Task())
    metric, _, tokenize = name.rpartition("_")
    transcripts = [make_transcript(response) for response in RESPONSES]
    assert term.name == name and term.needs_references
    assert term.score(transcripts) == getattr(metrics, metric)(transcripts, tokenize=tokenize)
    assert pickle.loads(pickle.dumps(term)).score(transcripts) == term.score(transcripts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleu_klingon", "BLEU has no tokenisation 'klingon': expected one of 13a, intl, char"),
        ("rouge_l_13a", "ROUGE has no tokenisation '13a': expected one of words, char"),
        ("chrf_char", "Unknown reward 'chrf_char'.* Did you mean 'chrf'"),
        ("exact_mach", r"Unknown reward 'exact_mach'.* Did you mean 'exact_match'\?"),
    ],
)
def test_a_tokenisation_that_there_is_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_rewards(name, Task())


def test_a_tokenisation_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("MeCab", "ipadic", "sacrebleu.tokenizers.tokenizer_ja_mecab"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"tokenisation 'ja-mecab' needs a package: "):
        resolve_rewards("bleu_ja-mecab", Task())


@pytest.mark.parametrize("metric", COMPARING)
@pytest.mark.parametrize(
    ("response", "references", "expected"),
    [
        ("", ("",), 1.0),
        ("", ("", "a"), 1.0),
        ("", ("a",), 0.0),
        ("42", ("42\n",), 1.0),
        ("", (" ",), 1.0),
    ],
)
def test_nothing_is_nothing(
    metric: Metric, response: str, references: tuple[str, ...], expected: float
) -> None:
    """An empty reference is met by an empty response; white space around texts does not count."""
    assert metric([make_transcript(response, references)]) == [expected]


def test_marks_stay_with_their_characters() -> None:
    assert words("กิน ข้าว") == ["กิ", "น", "ข้", "า", "ว"]
    assert words("हिन्दी मैं") == ["हिन्दी", "मैं"]
    assert words("ABC好x 2") == ["abc", "好", "x", "2"]
