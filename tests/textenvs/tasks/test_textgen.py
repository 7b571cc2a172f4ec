"""TextGen: the reward is VADER's, and the built-in reviews are what the docstring says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from textenvs.task import SPLITS, Example, Transcript, Turn
from textenvs.tasks.textgen import task as textgen
from textenvs.tasks.textgen.grammar import DOMAINS, continuation, expand
from textenvs.tasks.textgen.task import TextGen

TASK = TextGen()
VADER = SentimentIntensityAnalyzer()


def finished(response: str, example: Example | None = None) -> Transcript:
    example = example or Example("The soup at the corner cafe")
    return Transcript(example, (Turn("user", example.prompt), Turn("agent", response)))


def compound(text: str) -> float:
    return float(VADER.polarity_scores(text)["compound"])


@pytest.fixture(scope="module")
def reference_scores() -> np.ndarray:
    """Every reference's score, shape (examples, references)."""
    examples = [example for split in SPLITS for example in TASK.examples(split)]
    return np.array([TASK.score([finished(text, e) for text in e.references]) for e in examples])


def test_score_is_vader_compound_of_the_response_alone() -> None:
    responses = ["was great!", "was AWFUL, and nobody cared.", "was red.", "", "not good :("]
    example = Example("This terrible, terrible, terrible place")
    scores = TASK.score([finished(response, example) for response in responses])
    assert scores == [compound(response) for response in responses]
    assert scores[0] > 0.5 and scores[1] < 0 and scores[2] == scores[3] == 0


def test_score_needs_no_references_and_stays_in_range() -> None:
    scores = TASK.score([finished("good " * 500), finished("bad " * 500)])
    assert scores == pytest.approx([1.0, -1.0], abs=0.01)
    assert all(-1 <= score <= 1 for score in scores)


def test_success_is_a_compound_of_at_least_one_half() -> None:
    good, fair = "was good and nice.", "was fair."
    assert compound(good) >= TextGen.success_score == 0.5 > compound(fair) > 0
    assert TASK.is_success(finished(good))
    assert not TASK.is_success(finished(fair))


def test_splits_are_disjoint_and_cover_thousands_of_openings() -> None:
    prompts = [{example.prompt for example in TASK.examples(split)} for split in SPLITS]
    assert [len(part) for part in prompts] == [len(TASK.examples(split)) for split in SPLITS]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) > 3000
    with pytest.raises(ValueError, match="train, validation, test"):
        TASK.examples("dev")


def test_examples_are_deterministic() -> None:
    first = TASK.examples("test")
    textgen._all_examples.cache_clear()
    assert TextGen().examples("test") == first


def test_references_are_of_mixed_sentiment(reference_scores: np.ndarray) -> None:
    good, bad = (reference_scores >= 0.5).mean(), (reference_scores <= -0.5).mean()
    assert abs(reference_scores.mean()) < 0.1
    assert all(0.25 < share < 0.45 for share in (good, bad, 1 - good - bad))
    assert (reference_scores.max(axis=1) > 0.2).all()
    assert (reference_scores.min(axis=1) < -0.2).all()


def test_references_continue_the_opening_in_few_words() -> None:
    examples = [example for split in SPLITS for example in TASK.examples(split)]
    words = set()
    for example in examples:
        assert len(set(example.references)) == 4
        for text in example.references:
            assert re.fullmatch(r"[a-z][A-Za-z ,]+\.", text), text
            assert 8 <= len(text.split()) <= 20, text
        assert re.fullmatch(r"[A-Z][A-Za-z ]+[a-z]", example.prompt), example.prompt
        words.update(re.findall(r"\w+", " ".join((example.prompt, *example.references)).lower()))
    assert len(words) < 700


def test_openings_carry_no_sentiment() -> None:
    words = {word for domain in DOMAINS for text in expand(domain.opening) for word in text.split()}
    assert {word for word in words if compound(word)} == set()


def test_expand_and_moods() -> None:
    assert expand("{a|b} c{| d}", "e") == ("a c", "a c d", "b c", "b c d", "e")
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        for _ in range(50):
            assert compound(continuation(domain, "good", rng)) > 0.2
            assert compound(continuation(domain, "bad", rng)) < -0.2
            assert compound(continuation(domain, "plain", rng)) == 0
            assert ", but " in continuation(domain, "mixed", rng)


def test_best_response_reaches_best_return_and_demonstrations_do_not() -> None:
    examples, rng = TASK.examples("test"), np.random.default_rng(0)
    best, demonstrated = [], []
    for example in examples:
        turns = (Turn("user", example.prompt),)
        best.append(finished(TASK.best_response(example, turns), example))
        demonstrated.append(finished(TASK.demonstrate(example, turns, rng), example))
    assert TASK.best_return is not None
    assert TASK.best_return <= np.mean(TASK.score(best)) < TASK.best_return + 0.01
    assert abs(np.mean(TASK.score(demonstrated))) < 0.2
    assert np.mean([TASK.is_success(transcript) for transcript in best]) > 0.98


def test_demonstrations_need_references() -> None:
    with pytest.raises(ValueError, match="no references"):
        TASK.demonstrate(Example("My trip"), (Turn("user", "My trip"),), np.random.default_rng(0))
