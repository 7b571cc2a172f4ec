"""Slow terms scored later: in which batches, with what result, and what becomes of failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import textenvs  # noqa: F401 (registers the ids)
from tests.textenvs.toys import Chat, Echo, finished
from textenvs import CallableReward, Example, MetricReward, TaskReward, Transcript, register_task
from textenvs.rewards import resolve_rewards, score_transcripts
from textenvs.rewards.deferred import DeferredScorer

# A failure must not hang.
BARRIER_TIMEOUT = 60.0


def turns(count: int, final: bool = True) -> list[dict[str, Any]]:
    """Infos whose responses have 1, 2, 3, ... characters, and a term that came with the step."""
    return [
        {"transcript": finished("x" * i, final=final), "reward_terms": {"fast": -float(i)}}
        for i in range(1, count + 1)
    ]


class Judge:
    """Scores the number of characters, and keeps what it was called with."""

    __name__ = "judge"

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.before = before
        self.batches: list[list[str]] = []

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        self.batches.append([transcript.response for transcript in transcripts])
        self.before()
        return [float(len(transcript.response)) for transcript in transcripts]

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


def deferred(*terms: Any, size: int = 3) -> DeferredScorer:
    return DeferredScorer([*terms, CallableReward(no_scores, "fast")], size)


def no_scores(transcripts: Sequence[Transcript]) -> list[float]:
    raise AssertionError("This term is not slow.")


def test_batches_are_of_one_size_in_the_order_of_the_turns() -> None:
    judge = Judge()
    scorer = deferred(CallableReward(judge, weight=0.5, slow=True))
    infos = turns(8)
    for some in (infos[:1], infos[1:2], infos[2:7], infos[7:]):
        scorer.defer(some)
    assert scorer.resolve() == infos
    scorer.close()
    assert judge.batches == [["x" * i for i in own] for own in ((1, 2, 3), (4, 5, 6), (7, 8))]
    # In the order of the terms.
    assert [list(info["reward_terms"].items()) for info in infos] == [
        [("judge", 0.5 * i), ("fast", -float(i))] for i in range(1, 9)
    ]


def test_each_term_has_batches_of_what_it_scores() -> None:
    last, every = Judge(), Judge()
    scorer = deferred(
        CallableReward(last, "last", slow=True),
        CallableReward(every, "every", every_turn=True, slow=True),
    )
    infos = [info for pair in zip(turns(4, final=False), turns(4), strict=True) for info in pair]
    scorer.defer(infos)
    scorer.resolve()
    scorer.close()
    assert (last.sizes, every.sizes) == ([3, 1], [3, 3, 2])
    for info in infos:
        length = float(len(info["transcript"].response))
        expected = length if info["transcript"].final else 0.0
        assert info["reward_terms"] == {"last": expected, "every": length, "fast": -length}


def test_nothing_to_score() -> None:
    judge = Judge()
    scorer = deferred(CallableReward(judge, slow=True))
    assert scorer.resolve() == []
    scorer.close()
    assert not judge.batches


def fail() -> None:
    raise KeyError("no model")


def test_failures_say_what_they_always_say() -> None:
    term = CallableReward(Judge(fail), slow=True)
    infos = turns(2)
    with pytest.raises(ValueError, match=r"'judge' failed with KeyError: 'no model'") as expected:
        score_transcripts(term, [info["transcript"] for info in infos])
    scorer = deferred(term)
    scorer.defer(infos)
    with pytest.raises(ValueError, match="judge") as error:
        scorer.resolve()
    scorer.close()
    assert str(error.value) == str(expected.value)
    assert [info["reward_terms"] for info in infos] == [{"fast": -1.0}, {"fast": -2.0}]


def test_failures_are_told_with_the_next_batch() -> None:
    both_wait, first_failed = threading.Event(), threading.Event()

    def fail_first() -> None:
        if judge.batches[-1] == ["x"]:
            assert both_wait.wait(BARRIER_TIMEOUT)
            fail()
        first_failed.set()

    judge = Judge(fail_first)
    scorer = deferred(CallableReward(judge, slow=True), size=1)
    for info in turns(2):
        scorer.defer([info])
    both_wait.set()
    # Batches are scored one after the other.
    assert first_failed.wait(BARRIER_TIMEOUT)
    with pytest.raises(ValueError, match="no model"):
        scorer.defer(turns(1))
    scorer.close()


def test_closing_waits_for_one_batch_and_drops_the_rest() -> None:
    begun, restore = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert restore.wait(BARRIER_TIMEOUT)

    judge = Judge(wait)
    scorer = deferred(CallableReward(judge, slow=True), size=1)
    scorer.defer(turns(5))
    assert begun.wait(BARRIER_TIMEOUT)
    closing = threading.Thread(target=scorer.close, daemon=True)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    restore.set()
    closing.join(BARRIER_TIMEOUT)
    assert not closing.is_alive() and judge.sizes == [1]


class SlowEcho(Echo):
    slow_score = True


def test_what_may_be_slow() -> None:
    class Metric:
        def compute(self) -> None: ...

    judge = Judge()
    assert not CallableReward(judge).slow and CallableReward(judge, slow=True).slow
    assert not MetricReward(Metric()).slow and MetricReward(Metric(), slow=True).slow
    assert not TaskReward(Echo()).slow and TaskReward(SlowEcho()).slow
    term = CallableReward(judge, slow=True)
    weighted, plain = resolve_rewards([(term, 0.5), "task"], Chat())
    assert weighted.slow and weighted.weight == 0.5 and not plain.slow


def test_a_registered_function_may_be_slow() -> None:
    register_task("SlowToy-v0", examples=[Example("a")], score=Judge(), slow_score=True)
    try:
        env: Any = gym.make("SlowToy-v0").unwrapped
        assert [term.slow for term in env.engine.terms] == [True]
    finally:
        del gym.registry["SlowToy-v0"]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_gymnasiums_steps_wait(mode: str) -> None:
    judge = Judge()
    env: Any = gym.make_vec(
        "TextGen-v0",
        num_envs=2,
        max_new_tokens=2,
        reward=CallableReward(judge, slow=True),
        autoreset_mode=mode,
    )
    env.reset(seed=0)
    env.step(np.array([301, 302]))
    rewards = env.step(np.array([303, 304]))[1]
    assert judge.sizes == [2] and rewards.tolist() == [len(text) for text in judge.batches[0]]


def test_an_engine_leaves_slow_terms_to_a_scorer_and_its_copies_do_not() -> None:
    judge = Judge()
    reward = [CallableReward(judge, slow=True), "length_penalty"]
    env: Any = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=1, reward=reward)
    env.reset(seed=0)
    engine, rngs = env.engine, [np.random.default_rng(0)] * 2
    scorer = DeferredScorer(engine.terms, 2)
    engine.deferred_scorer = scorer
    copied = engine.with_slots(2)
    for slot in range(2):
        copied.reset(slot, rngs[slot])
    rewards, _, infos = copied.step(np.array([301, 302]), rngs)
    assert judge.sizes == [2] and all("judge" in info["reward_terms"] for _, info in infos)
    judge.batches.clear()
    rewards, terminated, infos = engine.step(np.array([301, 302]), rngs)
    assert rewards.tolist() == [-0.01, -0.01] and terminated.all()
    assert [info["reward_terms"] for _, info in infos] == [{"length_penalty": -0.01}] * 2
    scorer.resolve()
    scorer.close()
    assert [list(info["reward_terms"]) for _, info in infos] == [["judge", "length_penalty"]] * 2
