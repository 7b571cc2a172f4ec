"""What is observed without being paid for, and successes that the score tells."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.textenvs.toys import Chat, Echo, finished, random_actions, same, say
from textenvs import CallableReward, LengthPenalty, RewardTerm, Task, Transcript
from textenvs.envs.engine import TextEngine
from textenvs.envs.env import TextEnv
from textenvs.envs.playing import ScriptedAgent, play
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.rewards import WellFormed, resolve_observed, resolve_rewards
from textenvs.rewards.deferred import DeferredScorer
from textenvs.tasks.translation.task import Translation


def characters(transcripts: Sequence[Transcript]) -> list[float]:
    return [float(len(t.response)) for t in transcripts]


class Polite(Echo):
    """Knows what is well formed, but not after "Why"."""

    def is_well_formed(self, transcript: Transcript) -> bool | None:
        if transcript.prompt == "Why":
            return None
        return transcript.response.startswith("was")


# One for each turn, one for the last turn, one with a weight.
OBSERVED: list[Any] = [LengthPenalty(0.5), characters, (CallableReward(characters, "twice"), 2.0)]


def names(observe: Any, task: Task | None = None, reward: Any = None) -> list[str]:
    task = task or Echo()
    return [term.name for term in resolve_observed(observe, task, resolve_rewards(reward, task))]


def test_what_observe_may_be() -> None:
    assert names(None) == names([]) == []
    assert names("chrf") == ["chrf"]
    assert names(OBSERVED) == ["length_penalty", "characters", "twice"]
    assert names("tests.textenvs.rewards.test_observed:characters") == ["characters"]
    assert names(None, Polite()) == ["well_formed"]
    assert names(["well_formed", "chrf"], Polite()) == ["well_formed", "chrf"]
    assert names("chrf", Polite()) == ["chrf", "well_formed"]
    assert names(None, Polite(), ["task", "well_formed"]) == []  # it is paid


def test_what_observe_may_not_be() -> None:
    with pytest.raises(ValueError, match=r"already is a reward term 'chrf': .* leave one of them"):
        names("chrf", reward=["task", "chrf"])
    with pytest.raises(ValueError, match=r"Unknown reward 'crhf'.* Did you mean 'chrf'"):
        names("crhf")
    with pytest.raises(ValueError, match="Echo cannot say whether a response is well formed"):
        names("well_formed")
    with pytest.raises(ValueError, match="Echo cannot say"):
        resolve_rewards("well_formed", Echo())
    with pytest.raises(TypeError, match="but it is a int"):
        names(5)


def test_observed_terms_are_reported_and_not_paid() -> None:
    env = TextEnv(Echo, observe=OBSERVED)
    env.reset(seed=0)
    _, reward, terminated, _, info = say(env, "hm")
    assert terminated and reward == 2.0 and info["reward_terms"] == {"task": 2.0}
    tokens = info["transcript"].response_tokens
    assert info["observed"] == {"length_penalty": -0.5 * tokens, "characters": 2.0, "twice": 4.0}
    plain = TextEnv(Echo)
    plain.reset(seed=0)
    assert "observed" not in say(plain, "hm")[4]


def test_in_a_dialogue_each_turn_has_what_scores_it() -> None:
    env = TextEnv(Chat, observe=OBSERVED)
    env.reset(seed=0)
    info = say(env, "hm")[4]
    assert list(info["observed"]) == ["length_penalty"]
    info = say(env, "stop")[4]
    assert list(info["observed"]) == ["length_penalty", "characters", "twice"]


def test_well_formedness_is_observed_by_itself() -> None:
    env = TextEnv(Polite)
    for example, text, expected in ((0, "was", 1.0), (0, "is", 0.0), (2, "was", None)):
        env.reset(seed=0, options={"example": example})
        info = say(env, text)[4]
        assert info.get("observed") == (None if expected is None else {"well_formed": expected})
    (term,) = resolve_rewards(("well_formed", 0.5), Polite())
    assert term.score([finished("was"), finished("x")]) == [1.0, 0.0] and term.weight == 0.5
    assert pickle.loads(pickle.dumps(WellFormed(Polite()))).name == "well_formed"


@pytest.mark.parametrize("mode", AutoresetMode, ids=lambda mode: str(mode.value))
def test_single_and_vectorised_agree(mode: AutoresetMode) -> None:
    native = TextVectorEnv(Chat, 2, observe=OBSERVED, max_new_tokens=5, autoreset_mode=mode)
    sync = SyncVectorEnv(
        [lambda: TextEnv(Chat, observe=OBSERVED, max_new_tokens=5)] * 2, autoreset_mode=mode
    )
    assert same(native.reset(seed=3), sync.reset(seed=3))
    rng, seen = np.random.default_rng(0), 0
    for _ in range(60):
        actions = random_actions(rng, native.single_action_space, 2)
        ours, theirs = native.step(actions), sync.step(actions)
        assert same(ours, theirs)
        seen += "observed" in {**ours[4], **ours[4].get("final_info", {})}
        done = ours[2] | ours[3]
        if mode == AutoresetMode.DISABLED and done.any():
            for env in (native, sync):
                env.reset(options={"reset_mask": done})
    assert seen > 10


def test_the_reward_and_the_run_are_those_without_observing() -> None:
    plain, watched = (
        TextVectorEnv(Chat, 2, max_new_tokens=5, observe=observe) for observe in (None, OBSERVED)
    )
    assert same(plain.reset(seed=3), watched.reset(seed=3))
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = random_actions(rng, plain.single_action_space, 2)
        ours, theirs = plain.step(actions), watched.step(actions)
        assert same(ours[:4], theirs[:4])
        assert same(ours[4].get("reward_terms"), theirs[4].get("reward_terms"))


def test_episodes_have_the_mean_over_their_turns() -> None:
    engine = TextEngine(Chat, 2, observe=[LengthPenalty(1.0), characters])
    agent = ScriptedAgent(lambda example, turns, rng: "on we go" if len(turns) < 3 else "stop")
    for episode in play(engine, agent, [0, 1, 2]):
        lengths = [len(response) for _, response in episode.turns]
        assert len(lengths) == 2 and lengths[0] != lengths[1]
        assert episode.observed["length_penalty"] == pytest.approx(-np.mean(lengths))
        assert episode.observed["characters"] == 4.0
        assert episode.reward == 2.0


class Judge:
    """Counts its calls."""

    __name__ = "judge"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        self.calls += 1
        return characters(transcripts)


def test_slow_observed_terms_are_scored_later() -> None:
    judge = Judge()
    watched = CallableReward(judge, slow=True)
    engine = TextEngine(Echo, 1, observe=["length_penalty", watched], max_new_tokens=1)
    scorer = DeferredScorer(engine.terms, 1, engine.observed)
    engine.deferred_scorer = scorer
    rng = np.random.default_rng(0)
    engine.reset(0, rng)
    *_, [(_, info)] = engine.step(np.array([301]), [rng])
    assert info["observed"] == {"length_penalty": -0.01}
    scorer.resolve()
    scorer.close()
    assert judge.calls == 1
    said = float(len(info["transcript"].response))
    assert info["observed"] == {"length_penalty": -0.01, "judge": said}
    assert info["reward_terms"] == {"task": said}


def test_failing_observed_terms_are_named() -> None:
    env = TextEnv(Echo, observe=CallableReward(lambda ts: [np.nan] * len(ts), name="odd"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="The reward term 'odd' returned nan"):
        say(env, "hm")


class Graded(Echo):
    """Counts how often it is asked; three characters are a success."""

    success_score = 3.0
    asked = 0

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        type(self).asked += len(transcripts)
        return characters(transcripts)

    is_success = Task.is_success  # type: ignore[assignment]


class SlowGraded(Graded):
    slow_score = True


def success(task: type[Task], text: str, **kwargs: Any) -> Any:
    env = TextEnv(task, **kwargs)
    env.reset(seed=0)
    return say(env, text)[4].get("is_success")


def test_success_is_told_by_the_score_without_asking_again() -> None:
    Graded.asked = 0
    assert success(Graded, "abc") is True and success(Graded, "ab") is False
    assert Graded.asked == 2
    # The weight of the term does not count; another reward leaves the task to be asked.
    for weight in (0.0, 0.5, -2.0):
        assert success(Graded, "abc", reward=("task", weight)) is True
    assert success(Graded, "abc", reward="length_penalty") is True
    assert success(Graded, "ab", reward="length_penalty") is False


def test_a_success_of_ones_own_counts() -> None:
    class Never(Graded):
        def is_success(self, transcript: Transcript) -> bool:
            return False

    assert success(Never, "abcd") is False


def test_a_slow_success_does_not_stall() -> None:
    SlowGraded.asked = 0
    engine = TextEngine(SlowGraded, 1, max_new_tokens=1)
    scorer = DeferredScorer(engine.terms, 2)
    engine.deferred_scorer = scorer
    rng = np.random.default_rng(0)
    engine.reset(0, rng)
    *_, [(_, info)] = engine.step(np.array([301]), [rng])
    assert SlowGraded.asked == 0 and "is_success" not in info
    scorer.resolve()
    scorer.close()
    assert SlowGraded.asked == 1
    assert info["is_success"] == (info["reward_terms"]["task"] >= 3)


def test_demonstrations_ask_for_no_score() -> None:
    SlowGraded.asked = 0
    engine = TextEngine(SlowGraded, 1)
    engine.terms = []
    play(engine, ScriptedAgent(lambda example, turns, rng: "abc"), [0, 1])
    assert SlowGraded.asked == 0


def test_the_tasks_that_come_along_say_what_is_well_formed() -> None:
    for env_id in ("TextGen-v0", "Translation-v0", "TextClassification-v0"):
        env: Any = gym.make(env_id)
        assert [term.name for term in env.unwrapped.engine.observed] == ["well_formed"]
    assert issubclass(WellFormed, RewardTerm) and not WellFormed(Translation()).slow
