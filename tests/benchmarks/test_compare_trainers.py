"""The benchmark against SB3's PPO and TRL's, on a budget that teaches nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from agents.rollouts.vec_env import engine_of
from benchmarks import trainers
from benchmarks.compare_trainers import finished, run, write
from benchmarks.trainers import ENV_ID, Settings, TaskReward
from tests.agents.agents import same, weights
from textenvs.envs.playing import ScriptedAgent, play

SMALL = Settings(
    tokens=512,
    warm_start=0,
    num_envs=4,
    n_steps=64,
    epochs=2,
    minibatches=2,
    eval_examples=4,
    eval_samples=2,
)


@pytest.mark.parametrize("trainer", ["ours", "whole", "sb3", "trl"])
def test_run(trainer: str, tmp_path: Path) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    result = run(trainer, 0, SMALL)
    assert result["tokens"] == pytest.approx(SMALL.tokens, rel=0.5)
    assert result["after"]["mean_reward"] != result["before"]["mean_reward"]
    path = tmp_path / "results.json"
    write(path, [result], SMALL)
    assert finished(path, SMALL) == [json.loads(json.dumps(result))]
    assert f"| {trainer} | 0 |" in path.with_suffix(".md").read_text()
    with pytest.raises(ValueError, match="other settings"):
        finished(path, Settings())


def test_ours_with_unfinished_episodes_is_sb3s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing differs but roundings: the KL penalty, the schedule, the critic are alike."""
    ppo, learn = trainers.PPO, trainers.learn

    def with_unfinished(*args: Any, **kwargs: Any) -> Any:
        return ppo(*args, **{**kwargs, "whole_episodes": False})

    def learn_and_keep(model: Any, *args: Any) -> Any:
        seen.append(weights(model.policy))
        result = learn(model, *args)
        seen.append(weights(model.policy))
        return result

    seen: list[dict[str, th.Tensor]] = []
    monkeypatch.setattr(trainers, "PPO", with_unfinished)
    monkeypatch.setattr(trainers, "learn", learn_and_keep)
    results = [run(trainer, 0, SMALL) for trainer in ("ours", "sb3")]
    start, ours, same_start, theirs = seen
    assert same(start, same_start)
    moved = max(float((value - start[name]).abs().max()) for name, value in ours.items())
    apart = max(float((value - theirs[name]).abs().max()) for name, value in ours.items())
    assert moved > 1e-3 and apart < 0.02 * moved
    assert results[0]["after"]["mean_reward"] == results[1]["after"]["mean_reward"]


def test_no_trl(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)
    with pytest.raises(ImportError, match=r"textenvs\[bench\]"):
        trainers.import_trl()


def test_reward_model_is_the_environment() -> None:
    """TRL's rewards are those that an episode of the same tokens gets from the environment."""
    engine = engine_of(gym.make(ENV_ID))

    def respond(example: Any, turns: Any, rng: np.random.Generator) -> str:
        # A third each: right; in other words, perhaps of another length; over the budget.
        words = str(example.references[0]).split()
        kind = rng.integers(3)
        return " ".join(words if kind == 0 else words[::-1] * (1 if kind == 1 else 20))

    episodes = list(play(engine.with_slots(8), ScriptedAgent(respond), range(24)))
    rows = [np.concatenate(episode.turns[0]) for episode in episodes]
    prompts = [len(episode.turns[0][0]) for episode in episodes]
    # As TRL pads: prompts on the left, responses on the right, and both with 0 in the end.
    width = max(prompts) + engine.max_new_tokens
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(tokens, dtype=np.bool_)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        start = max(prompts) - prompt
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    model = TaskReward(engine)
    backbone: Any = getattr(model, model.base_model_prefix)
    output = backbone(input_ids=th.as_tensor(tokens), attention_mask=th.as_tensor(mask))
    scores = model.score(output.hidden_states[-1])
    assert scores.shape == (*tokens.shape, 1)
    rewards = [episode.reward for episode in episodes]
    assert min(rewards) < 0.5 < max(rewards) == 1.0
    np.testing.assert_allclose(scores[:, -1, 0], rewards, rtol=1e-6)
    assert model.tokens == sum(map(len, rows)) - sum(prompts)
    stopped = [e.transcript.stopped for e in episodes if e.transcript is not None]
    assert any(stopped) and not all(stopped)
