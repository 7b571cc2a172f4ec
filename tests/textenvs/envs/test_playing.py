"""Playing: each example once, whatever the slots; scripted agents speak text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from tests.textenvs.toys import EXAMPLES, Chat, Echo, encode
from textenvs import Example, LengthPenalty, Turn
from textenvs.envs.engine import Observation, TextEngine
from textenvs.envs.playing import Episode, ScriptedAgent, play
from textenvs.registration import BUILTIN_TASKS, load_task

EOS = 0


def by_content(engine: TextEngine, observations: Observation) -> npt.NDArray[np.int64]:
    """Choose tokens as a policy does: from each row of the observation alone."""
    keys = ("prompt", "prompt_length", "response", "response_length")
    actions = []
    for slot in range(engine.num_envs):
        seed = [int(x) for key in keys for x in observations[key][slot]]
        rng = np.random.default_rng(seed)
        actions.append(EOS if rng.random() < 0.3 else int(rng.integers(2, 500)))
    return np.array(actions)


def same_episodes(first: Sequence[Episode], second: Sequence[Episode]) -> bool:
    return all(
        (a.example, a.transcript, a.reward, a.reward_terms, a.is_success)
        == (b.example, b.transcript, b.reward, b.reward_terms, b.is_success)
        and all(
            np.array_equal(x, y)
            for s, t in zip(a.turns, b.turns, strict=True)
            for x, y in zip(s, t, strict=True)
        )
        for a, b in zip(first, second, strict=True)
    )


def polite(example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
    return "stop" if len(turns) > 3 else f"ok {len(turns)}"


@pytest.mark.parametrize("task", [Echo, Chat])
def test_playing_does_not_depend_on_the_number_of_slots(task: type[Echo] | type[Chat]) -> None:
    rows = [Example(f"example {i}") for i in range(11)]
    order = [7, 0, 3, 10, 1, 2, 9, 4, 8, 5, 6]
    engine = TextEngine(task, 4, dataset=rows, reward=["task", LengthPenalty()])
    expected = play(engine, by_content, order, seed=1)
    assert [episode.example for episode in expected] == order
    for episode in expected:
        assert episode.transcript is not None and episode.transcript.final
        assert episode.transcript.example == rows[episode.example]
        assert episode.reward == pytest.approx(sum(episode.reward_terms.values()))
    for slots in (1, 3, 16):
        assert same_episodes(play(engine.with_slots(slots), by_content, order, seed=1), expected)
    if task is Chat:
        assert not same_episodes(play(engine, by_content, order, seed=2), expected)


def test_examples_may_be_few_many_or_repeated() -> None:
    engine = TextEngine(Echo, 4)
    assert play(engine, by_content, []) == []
    twice = play(engine, by_content, [1, 1, 1])
    assert same_episodes(twice[:1], twice[1:2]) and len(twice) == 3
    assert same_episodes(play(engine, by_content, range(3)), play(engine, by_content, [0, 1, 2]))
    with pytest.raises(ValueError, match=r"\[0, 3\).*but it is 3"):
        play(engine, by_content, [3])


def test_turns_are_recorded_as_tokens() -> None:
    (episode,) = play(TextEngine(Chat, 2), ScriptedAgent(polite), [0])
    assert len(episode.turns) == 3 and episode.reward == 3.0
    first, second, _ = episode.turns
    assert first[0].tolist() == encode("User: The food\nAgent:")
    assert first[1].tolist() == [*encode(" ok 1"), EOS]
    start = [*first[0], *first[1]]
    assert second[0][: len(start)].tolist() == start
    assert episode.transcript is not None
    assert episode.transcript.responses == ("ok 1", "ok 3", "stop")


def test_a_scripted_agent_is_asked_once_a_turn() -> None:
    asked: list[str] = []

    def respond(example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        asked.append(example.prompt)
        return "one two three"

    episodes = play(TextEngine(Echo, 8), ScriptedAgent(respond), [0, 1, 2])
    assert [e.transcript.response for e in episodes if e.transcript] == ["one two three"] * 3
    # Once for each slot, idle ones included, and never again while they idle.
    assert len(asked) == 8
    asked.clear()
    play(TextEngine(Echo, 1), ScriptedAgent(respond), [0, 0, 1])
    assert asked == [EXAMPLES[0].prompt, EXAMPLES[0].prompt, EXAMPLES[1].prompt]


def test_what_is_said_is_cut_to_the_budget() -> None:
    def respond(example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        return "word " * 50

    (episode,) = play(TextEngine(Echo), ScriptedAgent(respond), [0])
    assert episode.transcript is not None
    assert episode.transcript.response_tokens == 6 and not episode.transcript.stopped


def test_an_agent_may_say_nothing() -> None:
    (episode,) = play(TextEngine(Echo), ScriptedAgent(lambda *_: ""), [0])
    assert episode.transcript is not None
    assert episode.transcript.response == "" and episode.transcript.stopped


def test_the_seed_of_a_scripted_agent_decides() -> None:
    def respond(example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        return f"{rng.integers(10**6)}"

    engine = TextEngine(Echo, 2, max_new_tokens=10)
    runs = [play(engine, ScriptedAgent(respond, seed), [0, 1, 2]) for seed in (0, 0, 1)]
    assert same_episodes(runs[0], runs[1]) and not same_episodes(runs[0], runs[2])


@pytest.mark.parametrize("env_id", BUILTIN_TASKS)
def test_best_responses_reach_the_best_return_through_the_tokens(env_id: str) -> None:
    """Scripted play loses nothing to tokenisation, budgets or the conversation's growth."""
    task = load_task(env_id)
    engine = TextEngine(env_id, 16, split="test")
    agent = ScriptedAgent(lambda example, turns, rng: task.best_response(example, turns))
    episodes = play(engine, agent, range(80))
    assert task.best_return is not None
    mean = float(np.mean([episode.reward for episode in episodes]))
    assert mean == pytest.approx(task.best_return, abs=0.05)
    assert all(episode.transcript and episode.transcript.stopped for episode in episodes) or (
        engine.max_new_tokens == 1
    )
