"""What an algorithm refuses, says, and stops at, before anything is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th

from agents import A2C, PPO, Reinforce
from tests.agents.agents import ITERATION, PLAIN_STEPS, collect, make_agent, same, train, weights
from tests.agents.helpers import gpt2, policy_for, vec_env


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_range": -0.2}, "clip_range must be more than 0, but it is -0.2"),
        ({"clip_range": lambda progress: -progress}, "clip_range must be more than 0"),
        ({"clip_range_vf": 0.0}, "clip_range_vf must be more than 0"),
        ({"gamma": 2.0}, "gamma must be at least 0 and at most 1, but it is 2.0"),
        ({"gae_lambda": -0.1}, "gae_lambda must be at least 0 and at most 1"),
        ({"gae_lambda_vf": 1.1}, "gae_lambda_vf must be at least 0 and at most 1"),
        ({"gae_length_alpha": 0.0}, "gae_length_alpha must be more than 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be more than 0"),
        ({"target_kl": 0.0}, "target_kl must be more than 0"),
        ({"learning_rate": -1e-4}, "learning_rate must be at least 0, but it is -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, but it is nan"),
        ({"vf_learning_rate": -1e-4}, "vf_learning_rate must be at least 0"),
        ({"vf_coef": -1.0}, "vf_coef must be at least 0"),
        ({"whiten_floor": -1.0}, "whiten_floor must be at least 0"),
        ({"critic_warmup": -1}, "critic_warmup must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"critic_warmup": 1, "vf_coef": 0.0}, "vf_coef must not be 0"),
        (
            {"batch_size": ITERATION + 1},
            f"at most a rollout's {ITERATION} tokens",
        ),
    ],
)
def test_bounds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(**arguments)


def test_a_batch_size_that_was_not_given_fits_any_rollout() -> None:
    model = make_agent(batch_size=None)
    assert model.batch_size == 1024 > ITERATION


def test_learn_goes_forward() -> None:
    with pytest.raises(ValueError, match="total_timesteps must be at least 0, but it is -5"):
        make_agent().learn(-5)


@pytest.mark.parametrize("argument", ["critic_warmup", "vf_learning_rate", "gae_lambda_vf"])
def test_what_is_a_critics_is_refused_without_one(argument: str) -> None:
    given: dict[str, Any] = {argument: 1}
    with pytest.raises(ValueError, match=f"Reinforce has no critic: leave {argument} out"):
        make_agent(cls=Reinforce, **given)


@pytest.mark.parametrize("argument", ["fit_critic", "whiten_floor", "warmup_steps"])
def test_sb3s_policies_take_none_of_ours(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} need the policy 'TransformerPolicy'"):
        PPO("MlpPolicy", "CartPole-v1", **{argument: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_made(where: str) -> None:
    model = collect(make_agent(policy=PLAIN_STEPS))
    if where == "loss":
        model.rollout_buffer.returns[:] = float("inf")
    else:
        model.policy.value_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(model.policy)
    with pytest.raises(ValueError, match=r"diverged.*this step was not made. Lower learning_rate"):
        train(model)
    assert same(before, weights(model.policy))


def test_the_rate_is_that_of_the_kind_of_model(tmp_path: Any) -> None:
    policy_for(vec_env(), gpt2()).save_pretrained(tmp_path / "model")
    kinds = {
        "new": {"model": gpt2()},
        "pretrained": {"model": str(tmp_path / "model")},
        "adapter": {"model": str(tmp_path / "model"), "peft_config": {"r": 2}},
    }
    env = vec_env()
    for cls in (PPO, A2C):
        rates: dict[str, float] = {}
        for kind, kwargs in kinds.items():
            model = cls("TransformerPolicy", env, policy_kwargs=kwargs, device="cpu")
            rates[kind] = model.lr_schedule(1.0)
            assert model.lr_schedule(0.5) == pytest.approx(rates[kind] / 2)
        assert rates["pretrained"] < rates["new"]
        expected = {"new": cls.text_defaults["learning_rate"](1.0)}
        expected.update({str(kind): rate for kind, rate in cls.learning_rates.items()})
        assert rates == {kind: expected.get(kind, expected["new"]) for kind in kinds}
        wide = cls("TransformerPolicy", env, policy_kwargs={"model": gpt2(n_embd=512, n_layer=1)})
        assert wide.lr_schedule(1.0) == pytest.approx(rates["new"] / 4)
        own = cls("TransformerPolicy", env, learning_rate=0.5, policy_kwargs=kinds["pretrained"])
        assert own.lr_schedule(0.1) == 0.5


def test_the_rate_of_an_adapter_is_less_where_a_step_of_its_does_more(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    env, folders = vec_env(), [str(tmp_path / name) for name in ("model", "adapter")]
    policy_for(env, gpt2()).save_pretrained(folders[0])

    def rate(**kwargs: Any) -> float:
        model: Any = PPO("TransformerPolicy", env, policy_kwargs=kwargs, device="cpu")
        if kwargs["model"] == folders[0]:
            model.policy.save_pretrained(folders[1])
        return float(model.lr_schedule(1.0))

    usual = PPO.learning_rates["adapter"]
    for config, share in (
        ({"r": 2}, 1),
        ({"r": 2, "lora_alpha": 32}, 4),
        (peft.LoraConfig(r=4, use_rslora=True), 2),
        (peft.LoraConfig(r=4, lora_alpha=16), 2),
    ):
        made = rate(model=folders[0], peft_config=config)
        again = rate(model=folders[1])
        assert made == again == pytest.approx(usual / share)
    with pytest.raises(TypeError, match=r"peft_config must be a peft\.LoraConfig"):
        rate(model=folders[0], peft_config="r=4")


def test_rates_rise_over_the_first_steps(tmp_path: Any) -> None:
    """Those of the critic, too, over as many steps as are said, whichever update makes them."""

    def rates(model: Any) -> list[list[float]]:
        seen: list[list[float]] = []
        groups, step = model.policy.optimizer.param_groups, model.policy.optimizer.step

        def note() -> None:
            seen.append([group["lr"] for group in groups])
            step()

        model.policy.optimizer.step = note
        model.learn(ITERATION, reset_num_timesteps=False)
        return seen

    own: dict[str, Any] = {"learning_rate": 1e-3, "vf_learning_rate": 1e-2, "n_epochs": 1}
    model = make_agent(warmup_steps=4, batch_size=ITERATION // 3, **own)
    first = rates(model)
    model.save(tmp_path / "model.zip")
    second = rates(PPO.load(tmp_path / "model.zip", env=model.env))
    steps = len(first + second)
    assert 1 < len(first) < 4 < steps == model.optimizer_steps + len(second)
    shares = [min(1.0, step / 4) for step in range(1, steps + 1)]
    expected = [[share * 1e-3, share * 1e-2] for share in shares]
    assert [sorted(set(row)) for row in first + second] == [pytest.approx(e) for e in expected]
    assert make_agent(warmup_steps=None).warmup_steps == 8
    assert make_agent(cls=A2C, warmup_steps=None).warmup_steps == 0


def test_learn_in_a_loop_says_that_the_rate_starts_lower_each_time() -> None:
    model = PPO("TransformerPolicy", vec_env(), policy_kwargs={"model": gpt2(n_layer=1)}, n_steps=8)
    model.learn(32)
    with pytest.warns(UserWarning, match=r"starts at 0.0001 instead of 0.0002.*constant"):
        model.learn(32, reset_num_timesteps=False)


@pytest.mark.filterwarnings("error")
def test_a_constant_rate_goes_on_without_a_word() -> None:
    model = make_agent()
    model.learn(ITERATION)
    model.learn(ITERATION, reset_num_timesteps=False)
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
