"""Reward terms: what each scores, how `reward=` is read, and what bad rewards are told."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import gymnasium as gym
import numpy as np
import pytest

from tests.textenvs.toys import Chat, Echo, finished, say
from textenvs import (
    CallableReward,
    Example,
    LengthPenalty,
    MetricReward,
    RepetitionPenalty,
    RewardTerm,
    TaskReward,
    Transcript,
)
from textenvs.envs.env import TextEnv
from textenvs.importing import load_object
from textenvs.rewards import (
    REWARD_NAMES,
    metrics,
    resolve_rewards,
    score_transcripts,
    try_terms,
)

GOOD, BAD = finished("good", "first"), finished("bad", "second")


class WordOverlap(evaluate.Metric):
    """A metric of the `evaluate` library, of one reference or of several."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        references = datasets.Sequence(text) if self.config_name == "several" else text
        features = datasets.Features({"predictions": text, "references": references})
        if self.config_name == "free":
            features = datasets.Features({"predictions": text})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions: Any, references: Any = None, extra: float = 0.0) -> Any:
        words = predictions[0].split()
        if references is None:
            return {"count": len(words), "each": [float(len(words))]}
        options = references[0] if self.config_name == "several" else references
        shared = [len(set(words) & set(text.split())) / len(words) for text in options]
        mean = sum(shared) / len(shared)
        return {"overlap": np.float32(mean + extra), "references": [float(len(options))]}


def overlap(config: str, tmp_path: Path) -> Any:
    return WordOverlap(config_name=config, cache_dir=str(tmp_path))


def count_words(transcripts: Sequence[Transcript]) -> list[int]:
    return [len(transcript.response.split()) for transcript in transcripts]


class Constant(RewardTerm):
    def __init__(self, value: float = 1.0, name: str = "constant") -> None:
        super().__init__(name)
        self.value = value

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [self.value] * len(transcripts)


def names(reward: Any) -> list[str]:
    return [term.name for term in resolve_rewards(reward, Echo())]


def weights(reward: Any) -> list[float]:
    return [term.weight for term in resolve_rewards(reward, Echo())]


def test_length_penalty_counts_the_tokens_beyond_the_target() -> None:
    transcripts = [finished("a", tokens=n) for n in (1, 5, 8)]
    assert LengthPenalty(target=5).score(transcripts) == [0, 0, -3]
    assert score_transcripts(LengthPenalty(0.5), transcripts) == [-0.5, -2.5, -4.0]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d", 3, 0.0),
        ("a b c a b c", 3, -0.25),
        ("No no NO no", 1, -0.75),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
        # Without white space, what is said is counted, too.
        ("a" * 12, 3, -0.9),
        ("ha" * 8, 1, -7 / 8),
        ("so " + "!" * 7 + " no", 1, -6 / 9),
        ("\u54c8" * 12, 3, -0.9),
        ("\u597d\u6c64\u597d\u6c64\u597d\u6c64", 2, -3 / 5),
        ("www.example.com costs 1000 ... and more", 1, 0.0),
    ],
)
def test_repetition_penalty(text: str, n: int, expected: float) -> None:
    assert RepetitionPenalty(n=n).score([finished(text)])[0] == pytest.approx(expected)


def test_missing_eos_penalty_tests_the_tasks_own_stop() -> None:
    # The environment says whether its own EOS came; no token id is looked at again.
    env = gym.make("TextGen-v0", reward=["task", ("missing_eos_penalty", 0.5)], max_new_tokens=3)
    eos = env.unwrapped.engine.eos_token_id  # type: ignore[attr-defined]
    other = eos + 300
    for tokens, penalty in (([other, eos], 0.0), ([other] * 3, -0.5), ([other, other, eos], 0.0)):
        env.reset(seed=0)
        for token in tokens:
            _, reward, terminated, _, info = env.step(token)
        assert terminated
        assert info["reward_terms"]["missing_eos_penalty"] == penalty
        assert reward == sum(info["reward_terms"].values())


def test_repetition_penalty_needs_ngrams() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, but it is 0"):
        RepetitionPenalty(n=0)


def test_task_and_callable_rewards() -> None:
    assert TaskReward(Echo()).score([GOOD]) == [4.0] and not TaskReward(Echo()).every_turn
    assert TaskReward(Chat()).every_turn
    term = CallableReward(count_words)
    assert (term.name, term.score([GOOD])) == ("count_words", [1])
    assert CallableReward(count_words, name="n", every_turn=True).every_turn
    assert repr(LengthPenalty(0.1)) == "LengthPenalty('length_penalty', weight=0.1)"


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (None, ["task"]),
        ("chrf", ["chrf"]),
        (count_words, ["count_words"]),
        (LengthPenalty, ["length_penalty"]),
        (LengthPenalty(), ["length_penalty"]),
        ("tests.textenvs.rewards.test_terms:count_words", ["count_words"]),
        ("tests.textenvs.rewards.test_terms:Constant", ["constant"]),
        (["task", ("chrf", 2), count_words], ["task", "chrf", "count_words"]),
    ],
)
def test_what_reward_may_be(reward: Any, expected: list[str]) -> None:
    assert names(reward) == expected


def test_weights_are_set_on_a_copy() -> None:
    term = LengthPenalty(0.25)
    assert weights([(term, 0.5), "task", ("chrf", 2)]) == [0.5, 1.0, 2.0]
    assert weights(("length_penalty", 3)) == [3.0]
    assert term.weight == 0.25


@pytest.mark.parametrize("name", sorted({*REWARD_NAMES} - {"well_formed"}))
def test_every_named_reward_scores(name: str) -> None:
    (term,) = resolve_rewards(name, Echo())
    transcript = finished("was good", references=("was good", "was fine"), tokens=3)
    expected = {"task": 8.0, "length_penalty": -0.03}
    expected |= {"repetition_penalty": 0.0, "missing_eos_penalty": 0.0}
    if name == "sentiment":
        expected[name] = metrics.sentiment([transcript])[0]
    assert score_transcripts(term, [transcript]) == [pytest.approx(expected.get(name, 1.0))]


def test_an_unknown_reward_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"Unknown reward 'blue': expected one of task, .*bleu"):
        resolve_rewards("blue", Echo())
    with pytest.raises(ValueError, match=r"Could not import 'no.such:thing': No module named"):
        resolve_rewards("no.such:thing", Echo())
    with pytest.raises(
        ValueError, match=r"Could not import 'textenvs.rewards.metrics:chr': .*no attribute"
    ):
        load_object("textenvs.rewards.metrics:chr")


def test_bad_reward_arguments() -> None:
    with pytest.raises(ValueError, match=r"\(task, task\): set name="):
        resolve_rewards(["task", None], Echo())
    with pytest.raises(ValueError, match="must not be an empty list"):
        resolve_rewards([], Echo())
    with pytest.raises(TypeError, match=r"reward must be None, a name, .*but it is a int"):
        resolve_rewards(5, Echo())


def failing(message: str) -> Any:
    def bad(transcripts: Sequence[Transcript]) -> list[float]:
        if any(transcript.response == "bad" for transcript in transcripts):
            raise KeyError(message)
        return [1.0] * len(transcripts)

    return CallableReward(bad)


def returning(value: Any) -> Any:
    return CallableReward(lambda transcripts: value, name="odd")


def score_error(term: RewardTerm, batch: Sequence[Transcript] = (GOOD, BAD)) -> str:
    with pytest.raises(ValueError, match="The reward term") as error:
        score_transcripts(term, batch)
    return str(error.value)


def test_a_reward_that_raises_names_the_term_and_the_example() -> None:
    text = score_error(failing("oh"))
    assert "'bad' failed with KeyError: 'oh'" in text
    assert "prompt 'second', response 'bad'" in text


def test_a_reward_that_only_fails_on_the_batch_says_so() -> None:
    def pairs(transcripts: Sequence[Transcript]) -> list[float]:
        if len(transcripts) > 1:
            raise RuntimeError("two")
        return [0.0]

    assert "only on the whole batch of 2 transcripts" in score_error(CallableReward(pairs))


@pytest.mark.parametrize("value", [None, 1.0, True])
def test_a_reward_that_returns_no_list(value: Any) -> None:
    text = score_error(returning(value))
    assert "'odd'" in text and "expected a list with a number for each transcript" in text
    assert f"got {value!r}" in text and "prompt 'first'" in text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "much", [1.0]])
def test_a_score_that_is_no_finite_number(value: Any) -> None:
    text = score_error(returning([1.0, value]))
    assert re.search(r"'odd' returned .* prompt 'second' \(response 'bad'\)", text)
    assert "expected a finite number" in text


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_wrong_number_of_scores(count: int) -> None:
    text = score_error(returning([0.0] * count))
    assert f"'odd' returned {count} scores for 2 transcripts" in text and "'first'" in text


def test_scores_of_all_numeric_types_become_floats() -> None:
    for raw in ([1, 2], (True, np.float32(2)), np.array([1, 2]), iter([1.0, np.int64(2)])):
        scores = score_transcripts(returning(raw), [GOOD, BAD])
        assert scores == [1.0, 2.0] and all(type(score) is float for score in scores)


def test_terms_of_the_last_turn_are_not_asked_about_others() -> None:
    asked: list[int] = []

    def score(transcripts: Sequence[Transcript]) -> list[float]:
        asked.append(len(transcripts))
        return [1.0] * len(transcripts)

    batch = [finished("a", final=False), finished("b"), finished("c", final=False)]
    assert score_transcripts(CallableReward(score, weight=2), batch) == [0.0, 2.0, 0.0]
    assert score_transcripts(CallableReward(score), batch[:1]) == [0.0]
    assert score_transcripts(CallableReward(score, every_turn=True), batch) == [1.0] * 3
    assert asked == [1, 3]


def test_an_environment_names_the_failing_term_and_example() -> None:
    env = TextEnv(Echo, reward=["task", failing("oh")])
    env.reset(seed=0, options={"example": 1})
    with pytest.raises(ValueError, match=r"'bad' failed .*A small hotel near the sea"):
        say(env, "bad")
    env.reset()
    assert say(env, "fine")[4]["reward_terms"] == {"task": 4.0, "bad": 1.0}


def test_an_evaluate_metric_of_one_reference_takes_the_best(tmp_path: Path) -> None:
    term = MetricReward(overlap("one", tmp_path), key="overlap", name="words")
    transcript = finished("a b", references=("a c", "a b", "d"))
    assert term.score([transcript, finished("a b", references=("d",))]) == [1.0, 0.0]


def test_an_evaluate_metric_of_several_references_gets_them_all(tmp_path: Path) -> None:
    metric = overlap("several", tmp_path)
    transcript = finished("a b", references=("a c", "a b"))
    assert MetricReward(metric).score([transcript]) == [0.75]  # the only number
    assert MetricReward(metric, key="references").score([transcript]) == [2.0]
    assert MetricReward(metric, extra=0.125).score([transcript]) == [0.875]


def test_an_evaluate_metric_without_references(tmp_path: Path) -> None:
    metric = overlap("free", tmp_path)
    assert MetricReward(metric).score([finished("a b c")]) == [3.0]
    assert MetricReward(metric, key="each").score([finished("a b c")]) == [3.0]


def test_a_metric_works_as_the_reward_of_an_environment(tmp_path: Path) -> None:
    env = gym.make("textenvs:Translation-v0", reward=["task", (overlap("one", tmp_path), 2.0)])
    env.reset(seed=0)
    env.step(5)
    assert list(env.step(0)[4]["reward_terms"]) == ["task", "word_overlap"]


def test_a_metric_with_several_numbers_needs_a_key() -> None:
    class Two:
        def compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {"f1": 0.5, "recall": 1.0}

    transcript = finished("a", references=("a",))
    assert MetricReward(Two(), key="f1").score([transcript]) == [0.5]
    assert MetricReward(Two(), key="f1").name == "Two"
    for key in (None, "precision"):
        with pytest.raises(ValueError, match=f"'f1', 'recall', but it is {key!r}"):
            MetricReward(Two(), key=key).score([transcript])


def test_a_metric_needs_references_and_a_compute() -> None:
    class Any1:
        def compute(self, **_: Any) -> dict[str, float]:
            return {"x": 1.0}

    with pytest.raises(ValueError, match="give the dataset references"):
        MetricReward(Any1()).score([finished("a")])
    with pytest.raises(TypeError, match=r"must be an evaluate metric .* but it is a int"):
        MetricReward(5)


def test_terms_can_be_pickled_and_copied() -> None:
    for term in (LengthPenalty(0.2, 3), RepetitionPenalty(n=2), CallableReward(count_words)):
        for twin in (pickle.loads(pickle.dumps(term)), copy.deepcopy(term)):
            assert twin.score([GOOD]) == term.score([GOOD]) and twin.name == term.name


def test_terms_must_override_score() -> None:
    with pytest.raises(NotImplementedError, match="RewardTerm must override"):
        RewardTerm("x").score([GOOD])


def test_an_error_shows_the_users_own_lines_and_not_ours() -> None:
    text = score_error(failing("oh"))
    assert f'File "{__file__}", line' in text and "in bad" in text
    assert "raise KeyError(message)" in text
    assert "scoring.py" not in text and "terms.py" not in text.replace("test_terms.py", "")
    assert "File" not in score_error(returning(None))  # nothing of theirs was on the way


def test_terms_are_tried_on_one_example() -> None:
    seen: list[Transcript] = []

    def watch(transcripts: Sequence[Transcript]) -> list[float]:
        seen.extend(transcripts)
        return [0.0] * len(transcripts)

    terms = [CallableReward(watch), CallableReward(watch, every_turn=True, slow=True)]
    labelled = Echo()
    labelled.choices = ("yes", "no")
    for task, example in ((Echo(), GOOD.example), (labelled, GOOD.example), (Echo(), NAMED)):
        try_terms(task, terms, example)
    assert [t.response for t in seen[::2]] == ["", "yes", "was good"] and len(seen) == 6
    assert all(t.final and t.stopped for t in seen)
    with pytest.raises(ValueError, match="'odd' returned nan"):
        try_terms(Echo(), [returning([float("nan")])], NAMED)


NAMED = Example("The food", ("was good", "was fine"))


def test_which_terms_need_references(tmp_path: Path) -> None:
    needing = ["bleu", "chrf", "rouge_l", "exact_match", "bleu_char", metrics.chrf]
    needing += [overlap("one", tmp_path), overlap("several", tmp_path)]
    free = ["sentiment", "length_penalty", count_words, overlap("free", tmp_path), "task"]
    for rewards, expected in ((needing, True), (free, False)):
        for reward in rewards:
            (term,) = resolve_rewards(reward, Echo())
            assert term.needs_references == expected, reward
