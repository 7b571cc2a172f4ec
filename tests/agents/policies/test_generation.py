"""Text in, text out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch as th

from agents import A2C, PPO
from agents.policies.generation import generate
from tests.agents.agents import make_agent
from tests.agents.helpers import FEW
from textenvs.envs.playing import play

PROMPTS = ["The food was", "I", "My pie at the old bistro last night was cold, and"]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_agent()


def test_episodes_are_what_is_generated(model: Any) -> None:
    engine = model.env.env.unwrapped.engine.with_slots(3)
    episodes = play(engine, lambda _, obs: model.predict(obs, deterministic=True)[0], range(3))
    texts = [engine.task.prompt(example) for example in engine.examples[:3]]
    expected = [episode.transcript.response for episode in episodes if episode.transcript]
    assert model.generate(texts, deterministic=True) == expected
    assert model.generate(texts, deterministic=True, batch_size=2) == expected
    assert model.generate(texts[1], deterministic=True) == expected[1]
    assert model.generate([]) == []


def test_sampling_is_the_policys(model: Any) -> None:
    codec = model.env.env.unwrapped.engine.codec
    with th.random.fork_rng():
        th.manual_seed(0)
        answers = model.generate(PROMPTS * 10)
        again = model.generate(PROMPTS * 10)
        th.manual_seed(0)
        assert model.generate(PROMPTS * 10) == answers != again
    assert len(set(answers)) > 5
    letters = set("".join(codec.decode_response([token]) for token in FEW[1:]))
    assert set("".join(answers)) <= letters | {" "}


@pytest.mark.parametrize("max_new_tokens", [1, 3, None])
def test_budget(model: Any, max_new_tokens: int | None) -> None:
    said: list[int] = []
    codec = model.env.env.unwrapped.engine.codec

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(codec, name)

        def decode_response(self, ids: Any) -> str:
            said.append(len(ids))
            return str(codec.decode_response(ids))

    generate(model.policy, Spy(), PROMPTS * 5, max_new_tokens)  # type: ignore[arg-type]
    assert max(said) == (max_new_tokens or 8)


def test_stop_strings_end_a_response_too() -> None:
    model = make_agent(env={"stop": "e"}, policy={"allowed_tokens": None})
    with th.random.fork_rng():
        th.manual_seed(0)
        answers = model.generate(PROMPTS * 10)
    assert len(set(answers)) > 5 and not any("e" in answer for answer in answers)


def test_prompts_are_text(model: Any) -> None:
    codec, said = model.env.env.unwrapped.engine.codec, "I<|eos|>"
    expected = model.generate([codec.as_text(said)], deterministic=True)
    assert model.generate([said], deterministic=True) == expected
    policy = model.policy
    with th.no_grad():
        ids = codec.encode_prompt(codec.as_text(said))
        assert FEW[0] not in ids
        hidden = policy.backbone.trunk(input_ids=th.tensor([ids]), use_cache=False)[0, -1:]
        first = max(FEW, key=lambda token: float(policy.backbone.logits(hidden)[0, token]))
    assert codec.decode_response([first]) == expected[0][: len(codec.decode_response([first]))]


def test_a_constraint_holds_behind_the_end_of_shorter_rows() -> None:
    model = make_agent(policy={"constraint": "tests.agents.test_constraints:NoRepeats"})
    model.generate(PROMPTS * 4)


def test_long_prompts_lose_their_beginning_and_it_is_said(model: Any) -> None:
    long = "The food was good. " * 200
    with pytest.warns(UserWarning, match=r"1 of 2 prompts .* their beginnings are cut off"):
        answers = model.generate([long, "I"], deterministic=True)
    codec = model.env.env.unwrapped.engine.codec
    room = model.policy.backbone.longest_prompt(8)
    ids = codec.encode_prompts([long])[0][-room:]
    policy = model.policy
    said: list[int] = []
    with th.no_grad():
        while len(said) < 8:
            hidden = policy.backbone.trunk(input_ids=th.tensor([[*ids, *said]]), use_cache=False)
            logits = policy.backbone.logits(hidden[0, -1:])[0]
            said.append(max(FEW, key=lambda token: float(logits[token])))
            if said[-1] == FEW[0]:
                break
    assert answers[0] == codec.decode_response(said)


def test_after_load_without_an_environment(model: Any, tmp_path: Path) -> None:
    expected = model.generate(PROMPTS, deterministic=True)
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", device="cpu")
    assert loaded.env is None and loaded.generate(PROMPTS, deterministic=True) == expected
    loaded.save(tmp_path / "again")
    again = PPO.load(tmp_path / "again", env=model.env, device="cpu")
    assert again.generate(PROMPTS, deterministic=True) == expected


def test_what_makes_no_sense(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a text, or .* but one is a int"):
        model.generate([1, 2])
    for wrong in (0, 10**6):
        with pytest.raises(ValueError, match=f"max_new_tokens must be .* it is {wrong}\\."):
            model.generate("I", max_new_tokens=wrong)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.generate("I", batch_size=0)
    with pytest.raises(TypeError, match="needs a TransformerPolicy"):
        A2C("MlpPolicy", "CartPole-v1", device="cpu").generate("I")
    blind = make_agent()
    blind.env, blind.policy.tokenizer = None, None
    with pytest.raises(ValueError, match="knows no tokenizer"):
        blind.generate("I")
