"""A critic with a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from transformers import AutoModelForCausalLM

from agents import PPO, warm_start
from tests.agents.agents import (
    NUM_ENVS,
    PLAIN_STEPS,
    STILL,
    Calls,
    collect,
    make_agent,
    same,
    shake,
    train,
    weights,
)
from tests.agents.helpers import CONFIGS, FEW, gpt2, llama, policy_for, roll_out, vec_env
from tests.agents.oracle import Critic, Diary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ordinary folder with another model."""
    path = tmp_path / "critic"
    policy_for(vec_env(), llama()).save_pretrained(path)
    return path


@pytest.mark.parametrize("spec", ["copy", "config", "path"])
def test_critic_starts_at_zero_from_its_own_model(spec: str, folder: Path) -> None:
    value_model = {"copy": "copy", "config": llama(hidden_size=48), "path": folder}[spec]
    env = vec_env()
    policy = policy_for(env, gpt2(), value_model=value_model, allowed_tokens=FEW)
    assert not roll_out(policy, env, 5).values.any()
    own = policy.value_backbone
    assert policy.value_head.in_features == (48 if spec == "config" else 32) == own.hidden_size
    assert same(weights(policy.backbone), weights(own)) == (spec == "copy")
    ours, theirs = ({id(p) for p in m.parameters()} for m in (policy.backbone, own))
    assert not ours & theirs
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert ours | theirs <= trained and len(trained) == len(ours | theirs) + 2
    if spec == "path":
        loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert same(weights(own.model), loaded)


@pytest.mark.parametrize("spec", [None, "copy", llama()])
def test_value_loss_pulls_at_the_actor_only_through_a_shared_trunk(spec: Any) -> None:
    updates = []
    for vf_coef in (0.0, 5.0):
        policy = {"value_model": spec, **PLAIN_STEPS}
        model = collect(make_agent(policy=policy, vf_coef=vf_coef, **STILL))
        updates.append(train(model))
    apart = {
        name: float((other - updates[0].gradients[0].get(name, th.zeros(()))).abs().max())
        for name, other in updates[1].gradients[0].items()
    }
    actor = [value for name, value in apart.items() if name.startswith("backbone.")]
    critic = [value for name, value in apart.items() if not name.startswith("backbone.")]
    assert max(critic) > 1e-2
    assert (max(actor) > 1e-2) if spec is None else (max(actor) == 0)
    if spec is not None:  # and the critic's model is trained by nothing else
        name = next(iter(n for n in apart if n.startswith("value_backbone.")))
        assert name not in updates[0].gradients[0] and updates[1].gradients[0][name].any()


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_values_are_those_of_the_critics_model_and_cached(config: str, kind: str) -> None:
    arrays = []
    for use_cache in (True, False):
        policy = {"value_model": CONFIGS[config](), "use_cache": use_cache, "temperature": 0.7}
        model = make_agent(kind, policy=policy, env={"max_episode_steps": 5})
        diary = Diary()
        calls = Calls(model.policy.value_backbone.model.get_input_embeddings())
        collect(model, diary)
        buffer = model.rollout_buffer
        # It is asked when the rollout is over: once for each sequence, and for what follows.
        ends = [*buffer.truncations, *np.flatnonzero(~buffer.last_dones)]
        rows = sum(shape[0] if len(shape) > 1 else 1 for shape in calls.shapes)
        assert len(calls.shapes) < 8 and rows <= len(buffer.sequences) + len(ends)
        arrays.append({n: getattr(buffer, n) for n in ("actions", "values", "advantages")})
    for name, cached in arrays[0].items():
        assert np.abs(cached.astype(float) - arrays[1][name]).max() < 1e-5, name
    own = model.policy.value_backbone.model
    truth = Critic(model.policy.backbone.model, FEW, 0.7, model.policy.value_head, own)
    with th.no_grad():
        values = [float(truth.value(token.context)) for token in diary.tokens]
        after = [float(truth.value(t.after)) for t in diary.tokens if t.after is not None]
    assert np.ptp(values) > 0.1 and after
    assert np.abs(buffer.values - np.array(values).reshape(-1, NUM_ENVS)).max() < 1e-5
    samples = buffer.samples(buffer.sequences)
    with th.no_grad():
        again = model.policy.evaluate_actions(samples.observations, samples.actions)[0]
    assert (again.flatten() - samples.old_values).abs().max() < 1e-5


def test_critics_memo_is_dropped_with_the_actors() -> None:
    model = collect(make_agent(policy={"value_model": "copy"}, learning_rate=0.05))
    train(model)
    collect(model)
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    with th.no_grad():
        again = model.policy.evaluate_actions(samples.observations, samples.actions)[0]
    assert (again.flatten() - samples.old_values).abs().max() < 1e-5


def test_training_mode_drops_the_critics_memo_even_if_nobody_could_tell() -> None:
    model = collect(make_agent(policy={"value_model": "copy"}))
    obs, _ = model.policy.obs_to_tensor(model._last_obs)
    with th.no_grad():
        stale = model.policy.predict_values(obs)
        for parameter in model.policy.value_backbone.parameters():
            parameter.data.mul_(1.5)  # which PyTorch keeps no count of
        model.policy.set_training_mode(True)
        model.policy.set_training_mode(False)
        answer = model.policy.predict_values(obs)[:, 0]
        fresh = model.policy.observation_values(model._last_obs)
    assert (fresh - stale[:, 0]).abs().max() > 1e-2 and (answer - fresh).abs().max() < 1e-4


@pytest.mark.parametrize("spec", ["copy", llama(), None])
def test_warm_start_copies_to_a_copy_only(spec: Any, tmp_path: Path) -> None:
    model = make_agent("several turns", policy={"value_model": spec})
    before = weights(model.policy)
    warm_start(model, passes=30, progress=False, cache=tmp_path)
    after = weights(model.policy)
    assert not same(before, after) and th.equal(
        before["value_head.weight"], after["value_head.weight"]
    )
    own = model.policy.value_backbone
    if spec == "copy":
        assert same(weights(model.policy.backbone), weights(own))
        assert not {p.data_ptr() for p in own.parameters()} & {
            p.data_ptr() for p in model.policy.backbone.parameters()
        }
    elif spec is not None:
        assert same({k[15:]: v for k, v in before.items() if k.startswith("value_b")}, weights(own))
    assert np.isfinite(train(collect(model)).log["train/loss"])


@pytest.mark.parametrize("spec", ["copy", "config", "path"])
def test_save_and_load(spec: str, folder: Path, tmp_path: Path) -> None:
    value_model = {"copy": "copy", "config": llama(hidden_size=48), "path": str(folder)}[spec]
    model = make_agent(policy={"value_model": value_model})
    shake(model.policy)
    model.save(tmp_path / "agent")
    for file in folder.iterdir():
        file.unlink()  # A saved agent needs nothing else.
    loaded = PPO.load(tmp_path / "agent", device="cpu", env=model.env)
    assert same(weights(model.policy), weights(loaded.policy))
    first, second = (roll_out(m.policy, vec_env(), 6) for m in (model, loaded))
    assert np.array_equal(first.values, second.values) and first.values.any()
    assert np.isfinite(train(collect(loaded)).log["train/loss"])
    model.policy.save(str(tmp_path / "policy.pt"))
    policy = type(model.policy).load(str(tmp_path / "policy.pt"))
    assert same(weights(model.policy), weights(policy))


@pytest.mark.parametrize("spec", ["copy", llama()])
def test_saved_folder_has_both_models(spec: Any, tmp_path: Path) -> None:
    model = make_agent(policy={"value_model": spec})
    shake(model.policy)
    policy = model.policy
    policy.save_pretrained(tmp_path / "model")
    own = tmp_path / "model" / "value_model"
    ids = th.tensor([[5, 6, 7, 8]])
    with th.no_grad():
        for path, backbone in ((own.parent, policy.backbone), (own, policy.value_backbone)):
            loaded = AutoModelForCausalLM.from_pretrained(path)
            assert type(loaded) is type(backbone.model)
            assert th.equal(loaded(ids).logits, backbone.model(ids).logits)
    again = make_agent(policy={"model": own.parent, "value_model": own}).policy
    again.load_value_head(own.parent)
    first, second = (roll_out(p, vec_env(), 6) for p in (policy, again))
    assert np.array_equal(first.values, second.values)
    assert np.array_equal(first.log_probs, second.log_probs)
    # Without a model of its own the critic leaves none behind.
    make_agent().policy.save_pretrained(own.parent)
    assert not own.exists()


def test_value_head_is_in_float32_whatever_the_critics_model() -> None:
    policy = {"value_model": llama(dtype="bfloat16"), "autocast": "bfloat16"}
    model = collect(make_agent(policy=policy))
    assert {p.dtype for p in model.policy.parameters()} == {th.float32}
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    values = model.policy.evaluate_actions(samples.observations, samples.actions)[0]
    assert values.dtype == th.float32


def test_critic_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="only 100"):
        make_agent(policy={"value_model": llama(vocab_size=100)})
    with pytest.raises(ValueError, match="No language model could be loaded"):
        make_agent(policy={"value_model": "no/such/model"})
