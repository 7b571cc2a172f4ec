from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from agents import PPO, SequenceRolloutBuffer, TransformerPolicy
from agents.models.layout import SequenceBatch
from tests.agents.helpers import (
    CONFIGS,
    EOS,
    FEW,
    VOCAB,
    Rollout,
    gpt2,
    llama,
    policy_for,
    roll_out,
    vec_env,
)
from textenvs.envs.engine import TextEngine
from textenvs.envs.playing import play
from textenvs.text.loading import EMBEDDED_TOKENIZER

CPU = th.device("cpu")


def tokens_at(observations: dict[str, Any], row: int) -> list[int]:
    """The tokens that an observation holds: prompt and response."""
    pieces = [
        observations[key][row, : int(observations[f"{key}_length"][row, 0])]
        for key in ("prompt", "response")
    ]
    return [int(token) for piece in pieces for token in piece]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_cached_rollout_is_the_uncached_one(config: str, env_id: str, deterministic: bool) -> None:
    env = vec_env(env_id, num_envs=5, max_new_tokens=16)
    rollouts = []
    for use_cache in (True, False):
        policy = policy_for(
            env, CONFIGS[config](), allowed_tokens=FEW, use_cache=use_cache, temperature=0.8
        )
        rollouts.append(roll_out(policy, env, 70, deterministic))
        assert ("rollout" in policy.backbone.decoder.memories) == use_cache
    cached, uncached = rollouts
    assert np.array_equal(cached.actions, uncached.actions)
    assert np.abs(cached.log_probs - uncached.log_probs).max() < 1e-5
    assert np.abs(cached.values - uncached.values).max() < 1e-5
    if not deterministic:  # the episodes are ragged
        lengths = np.stack([obs["response_length"][:, 0] for obs in cached.observations])
        assert (np.ptp(lengths, axis=1) > 3).mean() > 0.5
        assert cached.dones.sum() > 2


@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_cached_greedy_play_of_ragged_episodes(config: str) -> None:
    # The policy says what it would do; random tokens decide how it goes on.
    env = vec_env("Dialogue-v0", num_envs=4)
    policies = [policy_for(env, CONFIGS[config](), use_cache=cache) for cache in (True, False)]
    rng = np.random.default_rng(0)
    env.seed(0)
    obs = env.reset()
    answers = []
    for _ in range(60):
        said = [policy.predict(obs, deterministic=True)[0] for policy in policies]
        assert np.array_equal(*said)
        answers.extend(said[0])
        obs, _, _, _ = env.step(np.where(rng.random(4) < 0.2, 0, rng.integers(1, 400, 4)))
    assert len(set(answers)) > 10


def fill(policy: Any, env: Any, rollout: Rollout) -> SequenceRolloutBuffer:
    """A buffer with what was played."""
    steps, envs = rollout.actions.shape
    buffer = SequenceRolloutBuffer(
        steps, env.observation_space, env.action_space, device="cpu", n_envs=envs
    )
    starts = np.vstack([np.ones((1, envs), dtype=bool), rollout.dones[:-1]])
    for i, obs in enumerate(rollout.observations):
        value, log_prob = th.tensor(rollout.values[i]), th.tensor(rollout.log_probs[i])
        buffer.add(obs, rollout.actions[i], np.zeros(envs), starts[i], value, log_prob)
    buffer.compute_returns_and_advantage(th.zeros(envs), rollout.dones[-1])
    return buffer


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_one_forward_per_sequence_is_one_forward_per_token(config: str, env_id: str) -> None:
    env = vec_env(env_id, num_envs=4, max_new_tokens=12)
    settings = {"allowed_tokens": FEW, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    policy = policy_for(env, CONFIGS[config](), **settings)
    th.nn.init.normal_(policy.value_head.weight, generator=th.Generator().manual_seed(0))
    rollout = roll_out(policy, env, 50)
    buffer = fill(policy, env, rollout)
    seen = 0
    for samples in buffer.get(60):
        with th.no_grad():
            values, log_probs, entropies = policy.evaluate_actions(
                samples.observations, samples.actions
            )
        assert (log_probs - samples.old_log_prob).abs().max() <= 1e-5
        th.testing.assert_close(values.flatten(), samples.old_values, rtol=1e-5, atol=1e-5)
        seen += len(log_probs)
    assert seen == rollout.actions.size
    # The other form: observations of the environment.
    for step in (0, 7, 49):
        obs = obs_as_tensor(rollout.observations[step], CPU)
        actions = th.tensor(rollout.actions[step])
        with th.no_grad():
            values, log_probs, entropies = policy.evaluate_actions(obs, actions)
        assert (log_probs.numpy() - rollout.log_probs[step]).max() <= 1e-5
        assert th.allclose(entropies, policy.get_distribution(obs).entropy(), atol=1e-5)


@pytest.mark.parametrize("sampling", [{"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("head_chunk", [2, 1000])
def test_entropy_without_gradient_is_evaluated_alike(
    sampling: dict[str, Any], head_chunk: int
) -> None:
    env = vec_env(num_envs=6)
    policy = policy_for(env, allowed_tokens=FEW, head_chunk=head_chunk, **sampling)
    tokens = th.arange(300, 306)[:, None]
    last = th.ones(6, 1, dtype=th.bool)
    batch = SequenceBatch(tokens, last, last)
    actions = th.tensor(FEW[:6])  # some are outside of top-k and top-p
    ways = [policy.score(batch, actions, entropy_gradient=gradient) for gradient in (True, False)]
    assert [scores.entropies.requires_grad for scores in ways] == [True, False]
    for one, other in zip(*ways, strict=True):
        assert one.isfinite().all()
        th.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("own_critic", [True, False])
def test_samples_of_a_buffer_are_observations_too(own_critic: bool, use_cache: bool) -> None:
    env = vec_env("Dialogue-v0", num_envs=4, max_new_tokens=8)
    value_model = gpt2(n_layer=1) if own_critic else None
    settings = {"temperature": 0.7, "allowed_tokens": FEW, "use_cache": use_cache}
    policy = policy_for(env, value_model=value_model, **settings)
    th.nn.init.normal_(policy.value_head.weight, generator=th.Generator().manual_seed(0))
    buffer = fill(policy, env, roll_out(policy, env, 40))
    with th.no_grad():  # Whatever a rollout has prepared is of other weights now.
        for parameter in policy.backbone.parameters():
            parameter.mul_(1.1)
    for samples in buffer.get(60):
        obs: Any = samples.observations
        expected = policy.evaluate_actions(obs, samples.actions)
        values, distribution = policy.predict_values(obs), policy.get_distribution(obs)
        th.testing.assert_close(values, expected[0])
        th.testing.assert_close(distribution.log_prob(samples.actions), expected[1])
        policy.optimizer.zero_grad()
        (values.sum() + distribution.log_prob(samples.actions).sum()).backward()
        assert policy.value_head.weight.grad.abs().max() > 0
        models = [policy.backbone, policy.critic_backbone]
        assert all(max(p.grad.abs().max() for p in model.parameters()) > 0 for model in models)
        with th.no_grad():
            again = policy.predict_values(obs), policy.get_distribution(obs)
        assert not again[0].requires_grad
        th.testing.assert_close(again[0], values.detach())
        th.testing.assert_close(again[1].log_probs, distribution.log_probs.detach())


def test_log_probs_are_those_of_the_processed_distribution() -> None:
    env = vec_env(num_envs=3)
    allowed = list(range(0, 200))
    settings = {"temperature": 0.6, "top_k": 50, "top_p": 0.8, "allowed_tokens": allowed}
    policy = policy_for(env, **settings)
    rollout = roll_out(policy, env, 20)
    for step, obs in enumerate(rollout.observations):
        for row in range(3):
            with th.no_grad():
                ids = th.tensor([tokens_at(obs, row)])
                logits = policy.backbone.model(input_ids=ids).logits[0, -1, :VOCAB].double() / 0.6
            order = [i for i in logits.argsort(descending=True).tolist() if i < 200][:50]
            probs = logits[order].softmax(-1)
            size = int((probs.cumsum(-1) < 0.8).sum()) + 1
            nucleus = order[:size]
            action = int(rollout.actions[step, row])
            assert action in nucleus
            expected = logits[nucleus].log_softmax(-1)[nucleus.index(action)]
            assert rollout.log_probs[step, row] == pytest.approx(expected.item(), abs=1e-5)


def test_allowed_tokens_of_the_task_are_the_only_ones() -> None:
    env = vec_env("TextClassification-v0", num_envs=16)
    policy = policy_for(env)
    rollout = roll_out(policy, env, 10)
    assert set(rollout.actions.flat) == set(env.action_space.allowed_tokens)
    probs = np.exp(rollout.log_probs)
    assert probs.max() < 1 and (probs > 1e-3).all()
    # A policy's own argument goes first.
    policy = policy_for(env, allowed_tokens=[5, 9])
    assert set(roll_out(policy, env, 10).actions.flat) == {5, 9}


@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_padded_vocabulary_is_never_sampled(config: str) -> None:
    env = vec_env(num_envs=4)
    policy = policy_for(env, CONFIGS[config](vocab_size=VOCAB + 51, tie_word_embeddings=False))
    head = policy.backbone.model.get_output_embeddings()
    with th.no_grad():
        head.weight[VOCAB:] *= 100  # what was padded is what the model likes best
    for deterministic in (True, False):
        rollout = roll_out(policy, env, 30, deterministic)
        assert rollout.actions.max() < VOCAB
    obs = obs_as_tensor(rollout.observations[-1], CPU)
    log_probs = policy.get_distribution(obs).log_probs.detach()
    assert log_probs.shape == (4, VOCAB)
    assert log_probs.exp().sum(-1) == pytest.approx([1] * 4, abs=1e-4)


def test_pad_token_that_is_eos() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED_TOKENIZER), eos_token="<|eos|>")
    assert tokenizer.pad_token is None
    for env_id in ("TextGen-v0", "Dialogue-v0"):
        env = vec_env(env_id, num_envs=4, max_new_tokens=10, tokenizer=tokenizer)
        assert env.action_space.pad_token_id == env.action_space.eos_token_id
        rollouts = [
            roll_out(policy_for(env, allowed_tokens=FEW, use_cache=cache), env, 40)
            for cache in (True, False)
        ]
        assert np.array_equal(rollouts[0].actions, rollouts[1].actions)
        policy = policy_for(env, allowed_tokens=FEW)
        (samples,) = fill(policy, env, rollouts[0]).get()
        with th.no_grad():
            log_probs = policy.evaluate_actions(samples.observations, samples.actions)[1]
        assert (log_probs - samples.old_log_prob).abs().max() <= 1e-5
        assert (samples.actions == env.action_space.eos_token_id).sum() > 5


def test_pad_token_that_is_said() -> None:
    env = vec_env(num_envs=4, max_new_tokens=10)
    pad = env.action_space.pad_token_id
    policy = policy_for(env, allowed_tokens=[EOS, pad, 301])
    rollout = roll_out(policy, env, 40)
    (samples,) = fill(policy, env, rollout).get()
    with th.no_grad():
        log_probs = policy.evaluate_actions(samples.observations, samples.actions)[1]
    assert (log_probs - samples.old_log_prob).abs().max() <= 1e-5
    assert pad != EOS and (samples.actions == pad).sum() > 5


def test_dropout_is_off_in_both_modes() -> None:
    env = vec_env(num_envs=3)
    policy = policy_for(env, gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))
    rollout = roll_out(policy, env, 12)
    (samples,) = fill(policy, env, rollout).get()
    for mode in (True, False):
        policy.set_training_mode(mode)
        assert policy.training == mode
        log_probs = policy.evaluate_actions(samples.observations, samples.actions)[1]
        assert ((log_probs - samples.old_log_prob).exp() - 1).abs().max() < 1e-5
    # With dropout on it would not be.
    policy.train()
    log_probs = policy.evaluate_actions(samples.observations, samples.actions)[1]
    assert ((log_probs - samples.old_log_prob).exp() - 1).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_value_head_is_zero_and_everything_float32(dtype: str | None) -> None:
    env = vec_env(num_envs=3)
    policy = policy_for(env, llama(dtype=dtype))
    rollout = roll_out(policy, env, 3)
    assert not rollout.values.any()
    assert {parameter.dtype for parameter in policy.parameters()} == {th.float32}
    obs = obs_as_tensor(rollout.observations[0], CPU)
    _, values, log_probs = policy(obs)
    assert values.shape == (3, 1) and values.dtype == log_probs.dtype == th.float32
    values.sum().backward()
    assert policy.value_head.weight.grad.abs().max() > 0
    assert policy.predict_values(obs).shape == (3, 1)


def test_predict_single_and_batched() -> None:
    env = vec_env(num_envs=3)
    policy = policy_for(env)
    obs = env.reset()
    actions, state = policy.predict(obs, deterministic=True)
    assert state is None and actions.shape == (3,) and np.issubdtype(actions.dtype, np.integer)
    for i in range(3):
        single, _ = policy.predict({k: v[i] for k, v in obs.items()}, deterministic=True)
        assert single.shape == () and int(single) == actions[i]
    with th.random.fork_rng():
        drawn = {int(policy.predict(obs)[0][0]) for _ in range(20)}
    assert len(drawn) > 5


@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_saved_folder_is_an_ordinary_one(config: str, tmp_path: Path) -> None:
    env = vec_env(num_envs=2)
    policy = policy_for(env, CONFIGS[config](), temperature=0.5)
    tokenizer = env.env.unwrapped.tokenizer
    policy.save_pretrained(tmp_path / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = loaded("The food was good.", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer.encode("The food was good.")
    assert loaded.eos_token_id == EOS and len(loaded) == VOCAB
    with th.no_grad():
        assert th.equal(model(ids).logits, policy.backbone.model(ids).logits)
    again = policy_for(env, tmp_path / "model", temperature=0.5)
    assert again.pretrained and not policy.pretrained
    assert th.equal(roll_log_probs(again, env), roll_log_probs(policy, env))


EOS_ID = 0


def roll_log_probs(policy: Any, env: Any) -> th.Tensor:
    return th.tensor(roll_out(policy, env, 3, deterministic=True).log_probs)


def test_value_head_round_trip(tmp_path: Path) -> None:
    env = vec_env(num_envs=2)
    policy, other = policy_for(env), policy_for(env)
    th.nn.init.normal_(policy.value_head.weight)
    th.nn.init.normal_(policy.value_head.bias)
    policy.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    other.load_value_head(tmp_path / "model")
    assert th.equal(policy.value_head.weight, other.value_head.weight)
    assert th.equal(policy.value_head.bias, other.value_head.bias)


def test_saving_again_replaces_and_never_deletes_what_is_not_ours(tmp_path: Path) -> None:
    env = vec_env(num_envs=2)
    policy = policy_for(env)
    policy.save_pretrained(tmp_path / "model")
    with th.no_grad():
        policy.value_head.bias += 1
    policy.save_pretrained(tmp_path / "model")
    other = policy_for(env)
    other.load_value_head(tmp_path / "model")
    assert other.value_head.bias.item() == 1
    notes = tmp_path / "project" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("precious")
    with pytest.raises(ValueError, match="project"):
        policy.save_pretrained(tmp_path / "project")
    assert notes.read_text() == "precious"
    (tmp_path / "empty").mkdir()
    policy.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_policy_saves_and_loads_by_itself(tmp_path: Path) -> None:
    env = vec_env(num_envs=2)
    policy = policy_for(env, llama(), temperature=0.5, top_k=9, allowed_tokens=FEW)
    policy.save(str(tmp_path / "policy.pt"))
    loaded = TransformerPolicy.load(str(tmp_path / "policy.pt"))
    first, second = (roll_out(p, env, 20) for p in (policy, loaded))
    assert np.array_equal(first.actions, second.actions)
    assert np.array_equal(first.log_probs, second.log_probs)


def test_episodes_equal_generation_by_transformers() -> None:
    env = vec_env(num_envs=3)
    policy = policy_for(env, llama())
    engine: TextEngine = env.env.unwrapped.engine

    def greedy(engine: TextEngine, observations: Any) -> Any:
        return policy.predict(observations, deterministic=True)[0]

    for episode in play(engine.with_slots(3), greedy, range(6)):
        ((prompt, response),) = episode.turns
        generated = policy.backbone.model.generate(
            th.tensor(prompt)[None, :],
            attention_mask=th.ones(1, len(prompt), dtype=th.long),
            max_new_tokens=engine.max_new_tokens,
            do_sample=False,
            eos_token_id=engine.eos_token_id,
            pad_token_id=engine.pad_token_id,
        )
        assert generated[0, len(prompt) :].tolist() == response.tolist()


def test_budgets_beyond_the_positions() -> None:
    env = vec_env(max_prompt_tokens=30, max_new_tokens=20)
    policy_for(env, gpt2(n_positions=50))
    for config in (gpt2(n_positions=49), llama(max_position_embeddings=49)):
        with pytest.raises(ValueError, match=r"50 tokens, .* only 49 positions"):
            policy_for(env, config)


def test_module_as_model() -> None:
    model = AutoModelForCausalLM.from_config(gpt2())
    with pytest.raises(TypeError, match="save_pretrained and pass the folder"):
        policy_for(vec_env(), model)


def test_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No language model could be loaded from"):
        policy_for(vec_env(), str(tmp_path / "nothing"))


@pytest.mark.parametrize("allowed", [[], [VOCAB], [-1]])
def test_allowed_tokens_that_are_none(allowed: list[int]) -> None:
    with pytest.raises(ValueError, match="allowed_tokens"):
        policy_for(vec_env(), allowed_tokens=allowed)


def test_spaces_that_are_not_of_text() -> None:
    text = vec_env()
    with pytest.raises(ValueError, match="reads a Dict observation"):
        PPO(TransformerPolicy, gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="needs a TokenSpace"):
        TransformerPolicy(text.observation_space, spaces.Box(0, 1), lambda _: 1e-3, model=gpt2())
    with pytest.raises(ValueError, match="use_sde"):
        policy_for(text, use_sde=True)
