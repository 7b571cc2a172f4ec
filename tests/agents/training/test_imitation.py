from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th

from agents import PPO, evaluate_split, warm_start
from agents.models.layout import IGNORED, CausalLayout, sequences_of
from agents.models.loading import tiny_config
from agents.rollouts.buffer import Diverged
from agents.rollouts.vec_env import engine_of
from agents.training import imitation
from agents.training.imitation import default_cache, default_passes, demonstrations
from tests.agents.helpers import gpt2, llama
from textenvs import CallableReward
from textenvs.task import Example, Task, Transcript, Turn
from textenvs.text.loading import embedded_tokenizer

WORDS = ("red", "green", "blue", "black", "white")


class Spell(Task):
    """Say a colour; the references know which."""

    max_new_tokens = 6

    def examples(self, split: str) -> list[Example]:
        return [Example(f"Colour {i}:", (WORDS[i % 5],)) for i in range(20)]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        return [float(t.response in t.references) for t in transcripts]


class Chat(Spell):
    """Three turns, and what is demonstrated depends on what was said."""

    max_turns = 3

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str:
        return f"after {transcript.response}?"

    def demonstrate(self, example: Example, turns: Sequence[Turn], rng: np.random.Generator) -> str:
        return f"{example.references[0]} {len(turns)}"


class Silent(Spell):
    """No references."""

    def examples(self, split: str) -> list[Example]:
        return [Example("Colour:")]


def test_the_first_update_does_a_good_policy_no_harm() -> None:
    """With the defaults; those that came before moved this one by 0.146 nats a token."""
    env = gym.make_vec("TextGen-v0", num_envs=16, task=Spell)
    held_out = gym.make("TextGen-v0", task=Spell)
    policy = {"model": tiny_config(len(embedded_tokenizer()), 64)}
    options: dict[str, Any] = {"seed": 0, "n_steps": 16, "device": "cpu"}
    model = PPO("TransformerPolicy", env, policy_kwargs=policy, **options)
    warm_start(model, passes=24, progress=False, cache=False)
    before = evaluate_split(model, held_out).mean
    assert before > 0.7
    model.learn(256)
    assert 0 < model.logger.name_to_value["train/approx_kl"] < 0.05
    assert evaluate_split(model, held_out).mean >= before - 0.05


@pytest.mark.parametrize("cache", [True, False])
def test_a_warm_start_that_diverges_is_told_and_not_kept(cache: bool, tmp_path: Path) -> None:
    for _ in range(2):  # the second one does not find what the first one has left
        with pytest.raises(Diverged, match=r"The warm start has diverged: .* Lower its learning"):
            where = tmp_path if cache else False
            warm_start(agent(), 1, learning_rate=1e38, progress=False, cache=where)
    assert not list(tmp_path.iterdir())


def agent(task: Any = Spell, config: Any = None, seed: int = 0, **kwargs: Any) -> Any:
    env: Any = gym.make_vec("TextGen-v0", num_envs=4, **{"task": task, **kwargs})
    return PPO(
        "TransformerPolicy",
        env,
        n_steps=8,
        batch_size=16,
        seed=seed,
        device="cpu",
        policy_kwargs={"model": llama() if config is None else config},
    )


def test_passes_follow_from_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_passes(agent()) == imitation.MOST_PASSES  # there is little to read
    for task in (Spell, Chat):
        model = agent(task)
        tokens = demonstrations(engine_of(model.env), 1).num_tokens
        for passes in (1, 3):
            monkeypatch.setattr(imitation, "WARM_START_TOKENS", passes * tokens)
            assert default_passes(model) == passes
        monkeypatch.setattr(imitation, "WARM_START_TOKENS", 1)
        assert default_passes(model) == 1


def state(model: Any) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    return all(th.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_precision_is_the_policys_whatever_the_surroundings_say(
    autocast: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = []
    for outside in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", outside)
        model = agent()
        model.policy.backbone.autocast = None if autocast is None else th.bfloat16
        seen: set[th.dtype] = set()
        layer = model.policy.backbone.model.get_submodule("model.layers.0.mlp.down_proj")
        layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.add(output.dtype))
        warm_start(model, progress=False, cache=tmp_path / outside)
        assert seen == {th.float32 if autocast is None else th.bfloat16}
        results.append(state(model))
    assert same(*results)
    # It is part of the key: the other precision computes anew.
    model = agent()
    model.policy.backbone.autocast = th.bfloat16 if autocast is None else None
    warm_start(model, progress=False, cache=tmp_path / "no")
    assert len(list((tmp_path / "no").iterdir())) == 2


def test_cache_gives_the_very_weights(tmp_path: Path) -> None:
    models = [agent() for _ in range(3)]
    caches: list[bool | Path] = [tmp_path, tmp_path, False]
    for model, cache in zip(models, caches, strict=True):
        before = state(model)
        warm_start(model, passes=2, progress=False, cache=cache)
        assert not same(before, state(model))
        assert len(list(tmp_path.iterdir())) == 1
    assert same(state(models[0]), state(models[1]))
    assert same(state(models[0]), state(models[2]))
    configs = [model.policy.backbone.config.to_dict() for model in models]
    assert configs[0] == configs[1] == configs[2] == agent().policy.backbone.config.to_dict()


def test_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_start(agent(), passes=1, progress=False, cache=tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("fitted again")

    monkeypatch.setattr("agents.training.fitting.fit", fail)
    warm_start(agent(), passes=1, progress=False, cache=tmp_path)
    changes: list[dict[str, Any]] = [
        {"passes": 2},
        {"learning_rate": 1e-4},
        {"batch_size": 8},
        {"seed": 1},
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="fitted again"):
            warm_start(agent(), **{"passes": 1, "progress": False, "cache": tmp_path, **change})
    # The same weights in another model: what is between them differs.
    others = [agent(seed=1), agent(Chat), agent(config=llama(hidden_act="gelu"))]
    for other in others:
        with pytest.raises(RuntimeError, match="fitted again"):
            warm_start(other, passes=1, progress=False, cache=tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "textenvs" / "warm_start"
    warm_start(agent(), passes=1, progress=False)
    assert len(list(default_cache().iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "textenvs" / "warm_start"


@pytest.mark.parametrize("progress", [True, False])
def test_generators_are_untouched(progress: bool, tmp_path: Path) -> None:
    model = agent()
    model.env.reset()
    engine = model.env.get_attr("engine")[0]
    before = {key: value.copy() for key, value in engine.observations.items()}
    states = th.get_rng_state(), repr(np.random.get_state()), random.getstate()
    for _ in range(2):  # fitted, then taken from the cache
        warm_start(model, passes=1, progress=progress, cache=tmp_path)
        assert th.equal(th.get_rng_state(), states[0])
        assert repr(np.random.get_state()) == states[1]
        assert random.getstate() == states[2]
    assert all(np.array_equal(engine.observations[key], before[key]) for key in before)
    assert engine.terms and not model.policy.training
    assert not any(module.training for module in model.policy.backbone.modules())
    assert not list(Path.cwd().glob("trainer_output"))


def test_demonstrations_of_a_single_turn() -> None:
    engine = agent().env.get_attr("engine")[0]
    tokenizer = embedded_tokenizer()
    data = demonstrations(engine, passes=2)
    assert len(data) == 40
    for i in range(40):
        item = data[i]
        prompt = tokenizer.encode(f"Colour {i % 20}:")
        answer = [*tokenizer.encode(f" {WORDS[i % 20 % 5]}"), tokenizer.eos_token_id]
        assert item["input_ids"].tolist() == prompt + answer
        assert item["labels"].tolist() == [IGNORED] * len(prompt) + answer


def test_demonstrations_of_a_dialogue() -> None:
    engine = agent(Chat).env.get_attr("engine")[0]
    tokenizer = embedded_tokenizer()
    item = demonstrations(engine, passes=1)[3]
    tokens, labels = item["input_ids"], item["labels"]
    turns = [f"black {n}" for n in (1, 3, 5)]
    learned = tokens[labels != IGNORED]
    assert th.equal(learned, labels[labels != IGNORED])
    ends = [[*tokenizer.encode(f" {turn}"), tokenizer.eos_token_id] for turn in turns]
    assert learned.tolist() == [token for turn in ends for token in turn]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    users = ["\nUser: after black 1?\nAgent:", "\nUser: after black 3?\nAgent:"]
    assert text == f"User: Colour 3:\nAgent: {turns[0]}{users[0]} {turns[1]}{users[1]} {turns[2]}"


def test_turns_become_sequences() -> None:
    """A prompt holds the conversation, of which only what is new is read; a cut one is another."""
    turns = [([5, 6], [7, 8]), ([5, 6, 7, 8, 9], [10]), ([9, 10, 11], [12]), ([9, 10, 11], [13])]
    episode = [(np.array(prompt), np.array(response)) for prompt, response in turns]
    layout = CausalLayout()
    items = [layout.features(sequence) for sequence in sequences_of(layout, episode)]
    none = IGNORED
    assert [[array.tolist() for array in item.values()] for item in items] == [
        [[5, 6, 7, 8, 9, 10], [none, none, 7, 8, none, 10]],
        [[9, 10, 11, 12], [none, none, none, 12]],
        [[9, 10, 11, 13], [none, none, none, 13]],
    ]


def test_only_models_of_transformers_are_fitted() -> None:
    model = agent()
    model.policy.backbone = th.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="but the policy's is a Linear"):
        warm_start(model, passes=1, progress=False, cache=False)


class Broken(Spell):
    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        raise KeyError("no model")


def test_a_reward_that_fails_does_so_before_the_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("agents.training.fitting"), "fit", pytest.fail)
    with pytest.raises(ValueError, match=r"(?s)'task' failed with KeyError: .*raise KeyError\("):
        warm_start(agent(Broken), passes=1, progress=False, cache=False)
    observed = agent(Spell, observe=CallableReward(lambda ts: [np.nan] * len(ts), name="odd"))
    with pytest.raises(ValueError, match="'odd' returned nan"):
        warm_start(observed, passes=1, progress=False, cache=False)


def test_demonstrations_are_not_scored() -> None:
    engine = agent(Broken).env.get_attr("engine")[0]
    engine.observed = [CallableReward(Broken().score)]
    assert len(demonstrations(engine, 1)) == 20


def test_imitation_is_learned() -> None:
    model = agent(config=gpt2())
    held_out = gym.make("TextGen-v0", task=Spell)
    before = evaluate_split(model, held_out)
    settings: dict[str, Any] = {"progress": False, "cache": False, "learning_rate": 5e-3}
    warm_start(model, passes=60, batch_size=8, **settings)
    after = evaluate_split(model, held_out)
    assert before.mean < 0.1 and after.mean > 0.7


def test_cache_is_dropped() -> None:
    model = agent()
    obs: Any = model.env.reset()
    tensors = {key: th.as_tensor(value) for key, value in obs.items()}
    with th.no_grad():
        stale = model.policy.get_distribution(tensors).log_probs
        with th.enable_grad():
            warm_start(model, passes=2, progress=False, cache=False)
        answer = model.policy.get_distribution(tensors).log_probs
        model.policy.use_cache = False
        fresh = model.policy.get_distribution(tensors).log_probs
    assert (stale - fresh).abs().max() > 1e-2 and (answer - fresh).abs().max() < 1e-5


def test_reference_of_the_kl_is_the_warm_started_model() -> None:
    model = agent()
    model.kl_coef = 0.1
    warm_start(model, passes=1, progress=False, cache=False)
    started = state(model)
    model.learn(32)
    reference = model.get_parameters()["reference"]
    assert all(th.equal(value, started[f"backbone.{name}"]) for name, value in reference.items())


def test_no_passes_do_nothing(tmp_path: Path) -> None:
    model = agent(Silent)
    before = state(model)
    warm_start(model, passes=0, cache=tmp_path)
    assert same(before, state(model)) and not list(tmp_path.iterdir())


def test_errors() -> None:
    with pytest.raises(ValueError, match="no references to demonstrate"):
        warm_start(agent(Silent), passes=1, progress=False, cache=False)
    with pytest.raises(ValueError, match="passes must be at least 0"):
        warm_start(agent(), passes=-1)
    with pytest.raises(TypeError, match="needs a TransformerPolicy"):
        warm_start(stable_baselines3.PPO("MlpPolicy", "CartPole-v1", device="cpu"))


def test_the_cache_tells_adapters_apart(tmp_path: Path) -> None:
    results = []
    for alpha, cache in ((1, tmp_path), (64, tmp_path), (64, False)):
        model: Any = PPO(
            "TransformerPolicy",
            gym.make_vec("TextGen-v0", num_envs=4, task=Spell),
            seed=0,
            device="cpu",
            policy_kwargs={"model": llama(), "peft_config": {"r": 2, "lora_alpha": alpha}},
        )
        warm_start(model, passes=2, progress=False, cache=cache)
        results.append(state(model))
    assert not same(results[0], results[1]) and same(results[1], results[2])


def test_learning_rate_suits_what_the_model_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    arguments = import_module("agents.training.fitting").TrainingArguments

    def noted(**kwargs: Any) -> Any:
        rates.append(kwargs["learning_rate"])
        return arguments(**kwargs)

    monkeypatch.setattr("agents.training.fitting.TrainingArguments", noted)
    model = agent()
    warm_start(model, passes=1, progress=False, cache=False)
    model.policy.save_pretrained(tmp_path / "model")
    pretrained = agent(config=str(tmp_path / "model"))
    pretrained.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", env=pretrained.env, device="cpu")
    for model in (pretrained, loaded):
        warm_start(model, passes=1, progress=False, cache=False)
    assert rates == [2e-3, 5e-5, 5e-5]
    assert default_passes(pretrained) == default_passes(loaded) == 1
