"""Agents on encoder-decoders: what holds for causal models holds for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    T5Config,
)

from agents import A2C, GRPO, NLPO, PPO, ExpertIteration, evaluate_model, evaluate_split, warm_start
from agents.models.seq2seq import Seq2SeqBackbone
from tests.agents.agents import same, weights
from tests.agents.helpers import compiled_by
from tests.agents.policies.test_card import run_code
from tests.agents.seq2seq import BART, T5, forcing
from tests.agents.training.test_imitation import WORDS, Spell
from tests.textenvs.marian import marian_tokenizer
from textenvs.text.codec import TextCodec

CODEC = TextCodec(convention="encoder")
EOS, PAD = CODEC.eos_token_id, CODEC.pad_token_id
ROLES: dict[str, Any] = {
    **{"vocab_size": CODEC.vocabulary_size, "eos_token_id": EOS, "pad_token_id": PAD},
    **{"decoder_start_token_id": PAD, "max_position_embeddings": 512},
}
MODELS: dict[str, Any] = {
    "T5": lambda: T5Config(**{**T5, **ROLES}),
    "Marian": lambda: MarianConfig(**{**BART, **ROLES}),
    "BART": lambda: BartConfig(**{**BART, **ROLES, "decoder_start_token_id": EOS}),
    "mBART": lambda: forcing(MBartConfig(**{**BART, **ROLES}), 7),
}


def agent(model: Any = "T5", env_id: str = "TextGen-v0", cls: Any = PPO, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"tokenizer": CODEC, "max_new_tokens": 6, **kwargs.pop("env", {})}
    if cls in (GRPO, ExpertIteration):
        options["group_size"] = 2
    env: Any = gym.make_vec(env_id, num_envs=4, **options)
    steps: dict[str, Any] = {"n_steps": 16} if cls in (PPO, A2C, NLPO) else {}
    own = MODELS[model]() if model in MODELS else model
    policy = {"model": own, **kwargs.pop("policy", {})}
    return cls(
        "TransformerPolicy", env, policy_kwargs=policy, seed=0, device="cpu", **steps, **kwargs
    )


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0", "TextClassification-v0"])
@pytest.mark.parametrize("model", MODELS)
def test_ratios_begin_at_one(model: str, env_id: str) -> None:
    trained = agent(model, env_id, kl_coef=0.1)
    before = weights(trained.policy)
    trained.learn(64)
    logged = trained.logger.name_to_value
    assert logged["train/first_ratio_error"] < 1e-5
    assert abs(logged["kl/per_token"]) < 1e-5
    assert not same(before, weights(trained.policy))
    said = trained.rollout_buffer.actions
    assert PAD == EOS or not (said == PAD).any()


@pytest.mark.parametrize("model", ["T5", "Marian"])
def test_cached_rollouts_are_uncached_ones(model: str) -> None:
    buffers = []
    for cache in (True, False):
        trained = agent(model, "Dialogue-v0", policy={"use_cache": cache})
        trained.learn(64)
        buffers.append(trained.rollout_buffer)
    ours, plain = buffers
    assert np.array_equal(ours.actions, plain.actions)
    assert np.abs(ours.log_probs - plain.log_probs).max() < 1e-5
    assert np.array_equal(ours.rewards, plain.rewards)


@pytest.mark.parametrize("cls", [A2C, GRPO, NLPO, ExpertIteration])
def test_other_algorithms(cls: Any) -> None:
    trained = agent(cls=cls)
    before = weights(trained.policy)
    trained.learn(64)
    assert not same(before, weights(trained.policy))


class Without:
    """A response may not have the token that its prompt decides on."""

    def start(self, prompt: Any) -> int:
        return 300 + int(prompt.sum()) % 50

    def advance(self, state: int, token: int) -> int:
        return state

    def allowed(self, state: int) -> list[int]:
        return [token for token in range(299, 360) if token != state]


def test_constraints_see_the_prompt() -> None:
    trained = agent(policy={"constraint": Without()})
    trained.learn(64)
    assert trained.logger.name_to_value["train/first_ratio_error"] < 1e-5


def test_generate() -> None:
    """Prompts of several lengths, in batches, and more tokens than the budget of training."""
    trained = agent()
    prompts = ["hi", "a much longer prompt than the first one"]
    said = [trained.generate(prompt, max_new_tokens=9, deterministic=True) for prompt in prompts]
    assert trained.generate(prompts, max_new_tokens=9, deterministic=True, batch_size=1) == said


def test_compiled_rollouts_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without machine code; slots end, leave the batch, and are predicted for in between."""
    compiled_by("eager", monkeypatch)
    actions = []
    for compile in (False, True):
        compiled = agent("BART", cls=GRPO, policy={"compile": compile})
        assert compiled.policy.backbone.compiled == compile
        compiled.learn(1)
        actions.append(compiled.rollout_buffer.actions)
    assert np.array_equal(*actions)
    observations = {name: values[:3] for name, values in compiled.env.reset().items()}
    for _ in range(2):
        said = [compiled.policy.predict(observations, deterministic=True)[0] for _ in range(2)]
        assert np.array_equal(*said)
        compiled.learn(16, reset_num_timesteps=False)
        assert compiled.logger.name_to_value["train/first_ratio_error"] < 1e-5


@pytest.mark.parametrize("name", ["T5", "mBART"])
@pytest.mark.parametrize("value_model", [None, "copy"])
def test_a_saved_agent_goes_on_exactly(value_model: str | None, name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-3, "kl_coef": 0.1}
    whole = agent(name, policy={"value_model": value_model}, **options)
    whole.learn(64)
    whole.save(tmp_path / "agent.zip")
    whole.learn(64, reset_num_timesteps=False)
    again = PPO.load(tmp_path / "agent.zip", env=agent().env, device="cpu")
    assert isinstance(again.policy.backbone, Seq2SeqBackbone)
    again.learn(64, reset_num_timesteps=False)
    assert same(weights(whole.policy), weights(again.policy))


def test_a_folder_is_a_model_and_says_how_prompts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = agent()
    folder = tmp_path / "model"
    trained.policy.save_pretrained(folder)
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert plain.generation_config.decoder_start_token_id == PAD
    env: Any = gym.make_vec("TextGen-v0", num_envs=2, tokenizer=str(folder), max_new_tokens=6)
    assert TextCodec(str(folder)).convention == "encoder"
    again = PPO("TransformerPolicy", env, policy_kwargs={"model": str(folder)}, device="cpu")
    obs, _ = env.reset(seed=0)
    backbone: Any = again.policy.backbone
    length = int(obs["prompt_length"][0, 0])
    prompt = th.as_tensor(obs["prompt"][:1, :length])
    with th.no_grad():
        expected = plain(input_ids=prompt, decoder_input_ids=th.tensor([[PAD]])).logits[0, -1]
        hidden = backbone.last_hidden(obs)
        assert th.allclose(backbone.logits(hidden)[0], expected, atol=1e-5)
    with th.random.fork_rng(), monkeypatch.context() as elsewhere:
        names = run_code(folder, elsewhere)
    assert names["output"][0, 0] == PAD and 1 < names["output"].shape[1] <= 7
    found = evaluate_model(str(folder), "TextGen-v0", max_examples=4, max_new_tokens=6)
    assert len(found.rewards) == 4


def test_imitation_learns_the_demonstrations() -> None:
    trained = agent("BART", env={"task": Spell})
    test = gym.make("TextGen-v0", task=Spell, tokenizer=CODEC, max_new_tokens=6)

    def words_alone() -> float:
        """The share of responses that are something that is demonstrated."""
        return float(
            np.mean(
                [r["turns"][-1]["text"] in WORDS for r in evaluate_split(trained, test).records()]
            )
        )

    assert words_alone() == 0
    warm_start(trained, passes=80, learning_rate=1e-2, progress=False, cache=False)
    assert words_alone() > 0.6


def test_critic_and_reference_are_of_the_actors_kind() -> None:
    with pytest.raises(ValueError, match=r"all of them encoder-decoders: 'tiny' is of the other"):
        agent(policy={"value_model": "tiny"})
    with pytest.raises(ValueError, match=r"all of them encoder-decoders: 'tiny' is of the other"):
        agent(kl_coef=0.1, ref_model="tiny").learn(64)


@pytest.mark.parametrize(("joint", "target"), [(True, 180), (False, 180), (False, 140)])
def test_marian_with_its_own_tokenizer(joint: bool, target: int, tmp_path: Path) -> None:
    """A folder with pieces of their own for each language, and ids of their own if need be."""
    pytest.importorskip("sentencepiece")
    (tmp_path / "trained").mkdir()
    tokenizer = marian_tokenizer(tmp_path / "trained", joint, target)
    codec = TextCodec(tokenizer, "encoder")
    config = MarianConfig(**{**BART, **ROLES, "vocab_size": len(tokenizer.get_vocab())})
    config.eos_token_id, config.pad_token_id = codec.eos_token_id, codec.pad_token_id
    config.decoder_start_token_id = codec.pad_token_id
    said_ids = codec.target_ids or range(codec.vocabulary_size)
    config.decoder_vocab_size = max(said_ids) + 1
    config.share_encoder_decoder_embeddings = joint
    folder = tmp_path / "model"
    MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    few: dict[str, Any] = {"split": "train[:2%]", "max_prompt_tokens": 60}
    trained = agent(str(folder), "Translation-v0", env={"tokenizer": str(folder), **few})
    backbone = trained.policy.backbone
    fixed = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert fixed == {
        f"model.model.{half}.embed_positions.weight" for half in ("encoder", "decoder")
    }
    assert backbone.capabilities.caches is None and backbone.num_logits == len(said_ids)
    warm_start(trained, passes=1, progress=False, cache=False)
    trained.learn(64)
    assert trained.logger.name_to_value["train/first_ratio_error"] < 1e-5
    trained.save(tmp_path / "agent.zip")
    trained.policy.save_pretrained(tmp_path / "again", tokenizer=tokenizer)
    loaded = PPO.load(tmp_path / "agent.zip", device="cpu")
    plain: Any = MarianMTModel.from_pretrained(tmp_path / "again")
    read = tokenizer(["the cat"], return_tensors="pt")
    with th.no_grad():
        ids = plain.generate(**read, do_sample=False, top_k=None, max_new_tokens=6)[0, 1:]
    said = [model.generate("the cat", deterministic=True) for model in (trained, loaded)]
    assert said == [codec.decode_response(ids.tolist())] * 2


LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_is_trained_and_nothing_else(model: str) -> None:
    trained = agent(model, kl_coef=0.1, policy={"peft_config": LORA})
    backbone = trained.policy.backbone
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    trained.learn(64)
    logged = trained.logger.name_to_value
    assert logged["train/first_ratio_error"] < 1e-5
    assert abs(logged["kl/per_token"]) < 1e-5  # to the model with the adapter that it began with
    moved = {n for n, p in backbone.named_parameters() if not th.equal(p, before[n])}
    halves = {name.split("lora_")[0].split("layers.")[0].split("block.")[0] for name in moved}
    assert moved and all("lora_" in name for name in moved)
    assert any("encoder" in half for half in halves) and any("decoder" in half for half in halves)


def test_an_adapter_goes_on_exactly_and_is_a_folder_of_its_own(tmp_path: Path) -> None:
    base = tmp_path / "base"
    agent().policy.save_pretrained(base)
    options: dict[str, Any] = {"kl_coef": 0.1, "learning_rate": 1e-3}
    whole = agent(str(base), policy={"peft_config": LORA}, env={"tokenizer": CODEC}, **options)
    whole.learn(64)
    whole.save(tmp_path / "agent.zip")
    whole.learn(64, reset_num_timesteps=False)
    again = PPO.load(tmp_path / "agent.zip", env=agent().env, device="cpu")
    again.learn(64, reset_num_timesteps=False)
    assert same(weights(whole.policy), weights(again.policy))
    whole.policy.save_pretrained(tmp_path / "adapter")
    whole.policy.save_pretrained(tmp_path / "merged", merge=True)
    env: Any = gym.make_vec("TextGen-v0", num_envs=3, tokenizer=CODEC, max_new_tokens=6)
    obs, _ = env.reset(seed=0)
    for folder in ("adapter", "merged"):
        other = agent(str(tmp_path / folder)).policy.backbone
        assert (other.adapter is None) == (folder == "merged")
        with th.no_grad():
            expected = whole.policy.backbone.last_hidden(obs)
            assert th.allclose(other.last_hidden(obs), expected, atol=1e-5)


def test_prompts_are_made_for_the_model() -> None:
    with pytest.raises(ValueError, match=r"is an encoder-decoder, .*TextCodec\(tokenizer, 'encod"):
        agent(env={"tokenizer": None})
    with pytest.raises(ValueError, match=r"is a causal model, .*TextCodec\(tokenizer, 'causal'"):
        agent("tiny")
