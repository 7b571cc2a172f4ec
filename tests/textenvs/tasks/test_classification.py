import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from textenvs.task import SPLITS, Example, Transcript, Turn
from textenvs.tasks.classification.reviews import (
    AFFIRMED,
    CONFIRMED,
    CONTRADICTED,
    NEGATED,
    TOPICS,
    VERDICTS,
    aspect_clause,
    sample_review,
    verdict_clause,
)
from textenvs.tasks.classification.task import TextClassification


def all_examples() -> list[Example]:
    return [example for split in SPLITS for example in TextClassification().examples(split)]


def make_transcript(example: Example, response: str) -> Transcript:
    return Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))


def read_label(review: str) -> str:
    """Find the verdict and judge it, by rules written down apart from the grammar."""
    (sentence,) = (
        part
        for part in re.split(r"(?<=\.) ", review)
        if re.search(r"\b(overall|all in all|in the end|expected|called)\b", part.lower())
    )
    verdict = re.split(r", (?:although|because) ", sentence)[0].lower()
    negations = r"\b(not|far from|anything but|never|nobody|disagree|wrong)\b"
    negated = re.search(negations, verdict) is not None
    praised = any(re.search(rf"\b{word}\b", verdict) for word in VERDICTS[1])
    blamed = any(re.search(rf"\b{word}\b", verdict) for word in VERDICTS[0])
    assert praised != blamed
    return "positive" if praised != negated else "negative"


@pytest.mark.parametrize(
    ("review", "label"),
    [
        ("The room was ugly, but the staff were friendly. Overall, it was not bad.", "positive"),
        ("The food was tasty, and the place was clean. In the end, it was bad.", "negative"),
        ("I saw the film last week. Overall, it was far from great, although the plot was clever.",
         "negative"),
        ("I read the book on the train. All in all, it was anything but boring, because the jokes "
         "were witty.", "positive"),
        ("We watched the film on Sunday. The music was ugly, and the plot was never dull. A friend "
         "had called it boring, but I disagree.", "positive"),
        ("I bought the phone in March. The screen was bright, but the camera was slow. I expected "
         "it to be good, but it was not.", "negative"),
        ("I bought the phone in March. The critics called it good, and they were right, although "
         "the screen was not bright.", "positive"),
    ],
)  # fmt: skip
def test_the_reader_of_verdicts_is_right(review: str, label: str) -> None:
    assert read_label(review) == label


def test_labels_follow_from_the_verdict() -> None:
    for example in all_examples():
        assert example.data["label"] == read_label(example.prompt), example.prompt


@pytest.mark.parametrize("opinion", [False, True])
@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_a_negated_verdict_uses_the_opposite_word(
    positive: bool, negated: bool, opinion: bool
) -> None:
    frames = {
        (False, False): AFFIRMED,
        (True, False): NEGATED,
        (False, True): CONFIRMED,
        (True, True): CONTRADICTED,
    }[negated, opinion]
    words = VERDICTS[1] if positive is not negated else VERDICTS[0]
    expected = {frame.format(word) for frame in frames for word in words}
    rng = np.random.default_rng(0)
    clauses = [verdict_clause(positive, negated, opinion, rng) for _ in range(1000)]
    if not opinion:
        clauses = [re.sub(r"^(overall|all in all|in the end), ", "", clause) for clause in clauses]
    assert set(clauses) == expected


def test_a_negated_aspect_uses_the_opposite_word() -> None:
    room = TOPICS[0].aspects[0]
    rng = np.random.default_rng(0)
    clauses = {
        (positive, negated): {aspect_clause(room, positive, negated, rng) for _ in range(200)}
        for positive in (False, True)
        for negated in (False, True)
    }
    assert clauses[True, False] == {"the room was clean", "the room was beautiful"}
    assert clauses[False, False] == {"the room was dirty", "the room was ugly"}
    assert "the room was not clean" in clauses[False, True]
    assert "the room was far from dirty" in clauses[True, True]
    assert len(clauses[True, True]) == len(clauses[False, True]) == 8


def test_the_examples_are_distinct_and_balanced() -> None:
    examples = all_examples()
    assert len({example.prompt for example in examples}) == len(examples) == 8000
    labels = Counter(example.data["label"] for example in examples)
    assert labels == {"negative": 4000, "positive": 4000}
    for split in SPLITS:
        positive = np.mean(
            [e.data["label"] == "positive" for e in TextClassification().examples(split)]
        )
        assert 0.45 < positive < 0.55
    assert all(example.references == (example.data["label"],) for example in examples)
    assert {example.prompt.count(". ") + 1 for example in examples} == {2, 3}


@pytest.mark.parametrize("word", ["because", "although", "not", "but", *VERDICTS[0], *VERDICTS[1]])
def test_a_word_is_about_as_frequent_in_both_classes(word: str) -> None:
    labels = Counter(e.data["label"] for e in all_examples() if re.search(rf"\b{word}\b", e.prompt))
    assert labels.total() > 400
    assert 0.4 < labels["positive"] / labels.total() < 0.6


def test_reviews_depend_on_the_generator_alone() -> None:
    reviews = [sample_review(i % 2 == 0, np.random.default_rng(i)) for i in range(20)]
    again = [sample_review(i % 2 == 0, np.random.default_rng(i)) for i in range(20)]
    assert reviews == again
    assert len(set(reviews)) == 20


def unigram_accuracy(train: list[tuple[str, bool]], test: list[tuple[str, bool]]) -> float:
    """Return the test accuracy of a logistic regression on the words that occur."""
    words = sorted({word for text, _ in train for word in re.findall(r"\w+", text.lower())})
    column = {word: i for i, word in enumerate(words)}

    def featurize(pairs: list[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.zeros((len(pairs), len(words)))
        for row, (text, _) in enumerate(pairs):
            present = re.findall(r"\w+", text.lower())
            inputs[row, [column[word] for word in present if word in column]] = 1
        return inputs, np.array([label for _, label in pairs], float)

    inputs, targets = featurize(train)
    weights = np.zeros(len(words))
    for _ in range(200):
        probabilities = 1 / (1 + np.exp(-inputs @ weights))
        weights -= 0.5 * inputs.T @ (probabilities - targets) / len(targets)
    test_inputs, test_targets = featurize(test)
    return float(np.mean((test_inputs @ weights > 0) == test_targets))


def test_counting_words_does_not_solve_it() -> None:
    train, test = (
        [(e.prompt, e.data["label"] == "positive") for e in TextClassification().examples(split)]
        for split in ("train", "test")
    )
    assert unigram_accuracy(train, test) < 0.6
    # The same regression does solve what words do give away: whether a word is there.
    train, test = ([(text, "not" in text) for text, _ in pairs] for pairs in (train, test))
    assert unigram_accuracy(train, test) > 0.95


def test_the_reward_is_one_for_the_label() -> None:
    task = TextClassification()
    example = Example("Fine.", data={"label": "positive"})
    transcripts = [make_transcript(example, text) for text in ("positive", "negative", "pos", "")]
    assert task.score(transcripts) == [1.0, 0.0, 0.0, 0.0]
    assert [task.is_success(transcript) for transcript in transcripts] == [
        True,
        False,
        False,
        False,
    ]
    assert task.prompt(example) == "Review: Fine.\nSentiment:"
    assert task.best_response(example, ()) == "positive"


@pytest.mark.parametrize(
    ("label", "expected"),
    [(0, "bad"), (1, "fair"), (np.int64(2), "good"), ("1", "fair"), ("good", "good")],
)
def test_labels_are_choices_or_their_index(label: Any, expected: str) -> None:
    task = TextClassification(choices=["bad", "fair", "good"])
    assert task.label(Example("Fine.", data={"label": label})) == expected


@pytest.mark.parametrize("label", ["great", 2, -1, "2", 1.0, None, "", ["positive"]])
def test_other_labels_are_an_error(label: Any) -> None:
    example = Example("Fine.", data={"label": label})
    with pytest.raises(ValueError, match=r"'negative', 'positive' or .* from 0 to 1") as info:
        TextClassification().score([make_transcript(example, "positive")])
    assert repr(label) in str(info.value)


def test_choices_that_look_like_numbers_are_choices_first() -> None:
    task = TextClassification(choices=("1", "0"))
    assert task.label(Example("Fine.", data={"label": "0"})) == "0"
    assert task.label(Example("Fine.", data={"label": 0})) == "1"


def test_other_choices_rename_the_labels() -> None:
    renamed = TextClassification(choices=("bad", "good")).examples("test")
    names = {"negative": "bad", "positive": "good"}
    originals = TextClassification().examples("test")
    assert [e.prompt for e in renamed] == [e.prompt for e in originals]
    assert [e.data["label"] for e in renamed] == [names[e.data["label"]] for e in originals]


@pytest.mark.parametrize("choices", [(), ("positive",), ("same", "same"), "no"])
def test_unusable_choices_are_an_error(choices: Any) -> None:
    with pytest.raises(ValueError, match="two or more different labels"):
        TextClassification(choices=choices)


def test_three_choices_need_a_dataset() -> None:
    with pytest.raises(ValueError, match="choices has 3: pass dataset="):
        TextClassification(choices=("bad", "fair", "good")).examples("train")


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        TextClassification().examples("dev")


def test_demonstrations_are_right_nine_times_out_of_ten() -> None:
    task = TextClassification(choices=("bad", "fair", "good"))
    example = Example("Fine.", data={"label": 1})
    rng = np.random.default_rng(0)
    counts = Counter(task.demonstrate(example, (), rng) for _ in range(5000))
    assert counts["fair"] / 5000 == pytest.approx(0.9, abs=0.02)
    assert counts["bad"] / 5000 == pytest.approx(0.05, abs=0.02)
    assert counts["good"] / 5000 == pytest.approx(0.05, abs=0.02)
