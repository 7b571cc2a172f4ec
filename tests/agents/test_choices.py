"""Where a task has choices, a policy says whole ones, in rollout, update, reference, prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3

from agents import PPO, GymnasiumVecEnv, SequenceRolloutBuffer, TransformerPolicy, evaluate_split
from agents.rollouts.vec_env import engine_of
from tests.agents.agents import collect, train
from tests.agents.helpers import EOS, gpt2, policy_for, roll_out
from textenvs import Example, Task, Transcript

LABELS = (
    "activate my card",
    "activate my card again",
    "card arrival",
    "lost or stolen card",
    "top up failed",
)
EXAMPLES = tuple(
    Example(f"What about {label}?{end}", (label,))
    for label in LABELS
    for end in ("", "\n", " ", "\nIntent:")
)


class Intents(Task):
    """Labels of several words, up to three times, after prompts with all kinds of ends."""

    choices: Sequence[str] = LABELS
    score_every_turn = True

    def __init__(self, max_turns: int = 3) -> None:
        self.max_turns = max_turns

    def examples(self, split: str) -> Sequence[Example]:
        return EXAMPLES if split == "train" else EXAMPLES[:1]

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str | None:
        return None if transcript.response in transcript.references else "No. Again:"

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response in t.references) for t in transcripts]


class OnlyCards:
    """Ends a response where it would not begin with a or c, for what the space allows of it."""

    def __init__(self, firsts: Sequence[int]) -> None:
        self.firsts = list(firsts)

    def start(self, prompt: Any) -> bool:
        return True

    def advance(self, state: bool, token: int) -> bool:
        return False

    def allowed(self, state: bool) -> list[int] | None:
        return self.firsts if state else None


def make_env(max_turns: int = 3, **kwargs: Any) -> Any:
    task = Intents(max_turns)
    return gym.make_vec("TextGen-v0", num_envs=4, task=task, **kwargs)


def make_agent(env: Any = None, cls: Any = PPO, policy: Any = None, **kwargs: Any) -> Any:
    settings = {"n_steps": 23, "batch_size": 24, "n_epochs": 2, "seed": 0, "device": "cpu"}
    return cls(
        "TransformerPolicy" if cls is PPO else TransformerPolicy,
        env if env is not None else make_env(),
        policy_kwargs={"model": gpt2(n_layer=1), "head_chunk": 7, **(policy or {})},
        **{**settings, **kwargs},
    )


def said(env: Any, actions: Any) -> list[str]:
    """The responses in the tokens of one slot after the other."""
    engine = engine_of(env)
    responses = []
    for column in np.asarray(actions).T:
        response: list[int] = []
        for token in column.tolist():
            response.append(token)
            if token == EOS or len(response) == engine.max_new_tokens:
                responses.append(engine.codec.decode_response(response))
                response = []
    return responses


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"temperature": 3.0, "top_k": 3}])
def test_a_policy_says_whole_choices_only(options: dict[str, Any]) -> None:
    env: Any = GymnasiumVecEnv(make_env())
    rollout = roll_out(policy_for(env, gpt2(n_layer=1), **options), env, 60)
    responses = said(env, rollout.actions)
    assert len(responses) > 20 and set(responses) == set(LABELS)
    # The union of the tokens would not do.
    union = list(env.action_space.allowed_tokens)
    free = roll_out(policy_for(env, gpt2(n_layer=1), allowed_tokens=union), env, 60)
    assert not set(said(env, free.actions)) <= set(LABELS)


@pytest.mark.parametrize("max_turns", [1, 3])
def test_updates_and_reference_mask_as_the_rollout_did(max_turns: int) -> None:
    model = make_agent(make_env(max_turns), kl_coef=0.1, ent_coef=0.01, learning_rate=1e-3)
    for rollout in range(2):
        collect(model, fresh=rollout == 0)
        if rollout == 0:
            actions = model.rollout_buffer.actions.squeeze()
            assert set(said(model.env, actions)) <= set(LABELS)
            assert abs(model.logger.name_to_value["kl/per_token"]) < 1e-6
        assert train(model).log["train/first_ratio_error"] < 1e-5


@pytest.mark.parametrize("deterministic", [True, False])
def test_predictions_and_loaded_agents_say_whole_choices(
    deterministic: bool, tmp_path: Any
) -> None:
    env = make_env()
    model = make_agent(env)
    model.save(tmp_path / "agent")
    model.policy.save(str(tmp_path / "policy"))
    loaded = PPO.load(tmp_path / "agent", env=make_env(), device="cpu")
    alone = TransformerPolicy.load(str(tmp_path / "policy"))
    texts = []
    for predictor in (model, loaded, alone):
        evaluation = evaluate_split(predictor, env, deterministic=deterministic)
        texts.append(
            [turn["text"] for record in evaluation.records() for turn in record["turns"]
             if turn["role"] == "agent"]
        )  # fmt: skip
    assert set(texts[0]) <= set(LABELS) and texts[0] == texts[1] == texts[2]


def test_another_constraint_holds_beside_the_choices() -> None:
    env: Any = GymnasiumVecEnv(make_env())
    firsts = [choice[0] for choice in env.action_space.choices[:3]]
    policy = policy_for(env, gpt2(n_layer=1), constraint=OnlyCards(firsts))
    assert set(said(env, roll_out(policy, env, 40).actions)) == set(LABELS[:3])


def test_sb3s_own_ppo_says_whole_choices() -> None:
    env = GymnasiumVecEnv(make_env())
    model = make_agent(
        env, stable_baselines3.PPO, rollout_buffer_class=SequenceRolloutBuffer, n_steps=20
    )
    model.learn(80)
    assert set(said(model.env, model.rollout_buffer.actions.squeeze())) <= set(LABELS)


def test_choices_of_one_token_need_no_constraint() -> None:
    env = GymnasiumVecEnv(gym.make_vec("TextClassification-v0", num_envs=2))
    assert policy_for(env, gpt2(n_layer=1)).masks.constraint is None
    longer = GymnasiumVecEnv(gym.make_vec("TextClassification-v0", num_envs=2, max_new_tokens=3))
    policy = policy_for(longer, gpt2(n_layer=1))
    responses = said(longer, roll_out(policy, longer, 10).actions)
    assert len(responses) == 10 and set(responses) <= {"negative", "positive"}
