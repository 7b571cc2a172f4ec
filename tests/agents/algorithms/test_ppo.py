from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import (
    PPO,
    GymnasiumVecEnv,
    SequenceRolloutBuffer,
    TransformerPolicy,
    evaluate_split,
)
from agents.decoding import prepacked
from agents.decoding.weights_version import WeightsVersion
from agents.rollouts.sequences import split_evenly
from tests.agents.agents import Calls, EachStep
from tests.agents.helpers import CONFIGS, FEW, gpt2, llama, policy_for, roll_out, vec_env

NUM_ENVS, N_STEPS = 4, 24
ITERATION = NUM_ENVS * N_STEPS
# What a model from nothing says is seldom worth anything, but always has a length.
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "reward": ["task", "length_penalty"]}


def make_envs(env_id: str = "TextGen-v0", **kwargs: Any) -> Any:
    return gym.make_vec(env_id, num_envs=NUM_ENVS, **{**SETTINGS, **kwargs})


def agent(env: Any = None, model: Any = None, sampling: Any = None, **kwargs: Any) -> Any:
    # SB3's last update has the schedule's last learning rate, so with the default's it is 0.
    settings = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    settings |= {"learning_rate": 3e-3, "target_kl": 1e9}
    policy_kwargs = {
        "model": gpt2() if model is None else model,
        "allowed_tokens": FEW,
        **(sampling or {}),
    }
    return PPO(
        "TransformerPolicy",
        make_envs() if env is None else env,
        policy_kwargs=policy_kwargs,
        **{**settings, **kwargs},
    )


def weights(model: Any, name: str = "policy") -> dict[str, th.Tensor]:
    return {k: v.clone() for k, v in model.get_parameters()[name].items()}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    return set(first) == set(second) and all(th.equal(first[k], second[k]) for k in first)


def assert_close(first: Any, second: Any) -> None:
    """The same but for rounding, which depends on what has to be computed afresh."""
    assert np.array_equal(first.rollout_buffer.actions, second.rollout_buffer.actions)
    for one, other in zip(weights(first).values(), weights(second).values(), strict=True):
        assert th.allclose(one, other, atol=1e-3)


class AtRolloutEnd(BaseCallback):
    """Calls a function at the end of each rollout, with the agent."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self.model)


def ratio_error(model: Any) -> float:
    """The largest |ratio - 1| over the rollout, minibatch by minibatch as `train` makes them."""
    worst = 0.0
    buffer, policy = model.rollout_buffer, model.policy
    for sequences in split_evenly(buffer.sequences, 32):
        samples = buffer.samples(sequences)
        with th.no_grad():
            log_probs = policy.evaluate_actions(samples.observations, samples.actions)[1]
        worst = max(worst, float(((log_probs - samples.old_log_prob).exp() - 1).abs().max()))
    return worst


@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_first_ratio_is_one_in_every_iteration(config: str, env_id: str) -> None:
    errors: list[float] = []
    model = agent(
        make_envs(env_id),
        CONFIGS[config](),
        {"temperature": 0.8, "top_k": 6, "top_p": 0.95},
        learning_rate=1e-2,
        fit_critic=False,  # which reads the first rollout once more
    )
    read = Calls(model.policy.backbone.model.get_input_embeddings())

    def check(model: Any) -> None:
        # The cache was on: without it, each token costs its whole context.
        rows = [sequence.row for sequence in model.rollout_buffer.sequences]
        contexts = sum(int(row.action_positions.nonzero()[0].sum()) for row in rows)
        assert read.tokens(1) < contexts
        errors.append(ratio_error(model))
        read.take()

    before = weights(model)
    model.learn(2 * ITERATION, AtRolloutEnd(check))
    assert len(errors) == 2 and max(errors) < 1e-5
    assert not same(before, weights(model))


def test_stale_memo_would_show() -> None:
    # The counterpart of the test above: were the memo kept over an update, it would fail.
    model = agent(learning_rate=1e-2)
    errors: list[float] = []

    def check(model: Any) -> None:
        errors.append(ratio_error(model))

    backbone = model.policy.backbone
    original = backbone.next_hidden
    kept: list[Any] = []

    def careless(observation: Any, scope: Any) -> Any:
        caches = backbone.decoder.memories
        if kept:
            kept[0].weights = WeightsVersion(backbone.model)()
            caches["rollout"] = kept[0]
        answer = original(observation, scope)
        kept.append(caches["rollout"])
        return answer

    backbone.next_hidden = careless
    model.learn(2 * ITERATION, AtRolloutEnd(check))
    assert errors[0] < 1e-5 and errors[1] > 1e-3


@pytest.mark.parametrize("algorithm", ["PPO", "A2C"])
@pytest.mark.parametrize("env_id", ["TextGen-v0", "TextClassification-v0"])
def test_sb3s_own_algorithms_train_the_policy(algorithm: str, env_id: str) -> None:
    kwargs: dict[str, Any] = {"batch_size": 32} if algorithm == "PPO" else {}
    errors: list[float] = []
    allowed = FEW if env_id == "TextGen-v0" else None
    model = getattr(stable_baselines3, algorithm)(
        TransformerPolicy,
        VecMonitor(vec_env(env_id, NUM_ENVS)),
        n_steps=N_STEPS,
        ent_coef=0.01,
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_kwargs={"model": gpt2(), "allowed_tokens": allowed},
        seed=0,
        device="cpu",
        **kwargs,
    )
    before = weights(model)
    model.learn(2 * ITERATION, AtRolloutEnd(lambda m: errors.append(ratio_error(m))))
    after = weights(model)
    assert len(errors) == 2 and max(errors) < 1e-5
    assert not same(before, after) and all(value.isfinite().all() for value in after.values())
    assert len(model.ep_info_buffer) > 0


def test_mlp_policy_is_sb3s_bit_for_bit() -> None:
    settings: dict[str, Any] = {"n_steps": 256, "seed": 3, "device": "cpu"}
    ours = PPO("MlpPolicy", "CartPole-v1", **settings).learn(768)
    theirs = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", **settings).learn(768)
    assert same(weights(ours), weights(theirs))
    assert ours.policy.optimizer.state_dict().keys() == theirs.policy.optimizer.state_dict().keys()
    assert list(ours.ep_info_buffer or ())[-1]["r"] == list(theirs.ep_info_buffer or ())[-1]["r"]
    assert not ours.is_text


def test_arguments_and_defaults_are_sb3s() -> None:
    def parameters(cls: Any) -> list[str]:
        return list(inspect.signature(cls).parameters)

    theirs = parameters(stable_baselines3.PPO)
    assert [name for name in parameters(PPO) if name in theirs] == theirs
    ours: Any
    other: Any
    ours, other = PPO("MlpPolicy", "CartPole-v1"), stable_baselines3.PPO("MlpPolicy", "CartPole-v1")
    compared = set(vars(other)) - {
        *("env", "policy", "rollout_buffer", "action_space", "observation_space", "_logger"),
        *("lr_schedule", "clip_range", "policy_class"),
    }
    assert {k: vars(ours)[k] for k in compared} == {k: vars(other)[k] for k in compared}
    assert ours.policy_class is other.policy_class
    for progress in (1.0, 0.5):
        assert ours.lr_schedule(progress) == other.lr_schedule(progress)
        assert ours.clip_range(progress) == other.clip_range(progress)


def test_defaults_for_text() -> None:
    model = PPO("TransformerPolicy", make_envs(), policy_kwargs={"model": gpt2()}, device="cpu")
    assert (model.gamma, model.gae_lambda, model.vf_coef, model.ent_coef) == (1.0, 0.95, 0.5, 0.0)
    assert (model.n_steps, model.batch_size, model.n_epochs, model.target_kl) == (64, 1024, 4, 0.03)
    assert model.max_grad_norm == 1.0 and model.kl_coef == 0.0 and model.reference is None
    assert (model.whiten_floor, model.fit_critic, model.warmup_steps) == (0.1, True, 8)
    assert [model.lr_schedule(p) for p in (1.0, 0.5, 0.0)] == pytest.approx([2e-4, 1e-4, 0])
    assert isinstance(model.rollout_buffer, SequenceRolloutBuffer)
    assert isinstance(model.policy.optimizer, th.optim.Adam)
    assert model.policy.optimizer.defaults["eps"] == 1e-5
    given = agent(learning_rate=0.5, gamma=0.9, vf_coef=0.0)
    assert (given.lr_schedule(0.1), given.gamma, given.vf_coef) == (0.5, 0.9, 0.0)


ENVS: dict[str, Callable[[], Any]] = {
    "id": lambda: "TextGen-v0",
    "single": lambda: gym.make("TextGen-v0", **SETTINGS),
    "make_vec_env": lambda: make_vec_env("TextGen-v0", n_envs=3, env_kwargs=SETTINGS),
    "DummyVecEnv": lambda: DummyVecEnv([lambda: Monitor(gym.make("TextGen-v0", **SETTINGS))] * 2),
    "SubprocVecEnv": lambda: SubprocVecEnv(
        [lambda: Monitor(gym.make("TextGen-v0", **SETTINGS))] * 2, start_method="fork"
    ),
    "native": make_envs,
    "sync": lambda: make_envs(vectorization_mode="sync"),
    "async": lambda: make_envs(vectorization_mode="async"),
    "adapter": lambda: GymnasiumVecEnv(make_envs()),
    "VecNormalize": lambda: VecNormalize(VecMonitor(GymnasiumVecEnv(make_envs())), norm_obs=False),
}


@pytest.mark.parametrize("kind", list(ENVS))
def test_every_kind_of_environment(kind: str) -> None:
    model = agent(ENVS[kind](), n_steps=40)
    before = weights(model)
    model.learn(40)
    assert model.num_timesteps == 40 * model.n_envs
    assert kind == "id" or not same(before, weights(model))
    assert len(model.ep_info_buffer or ()) > 0
    assert isinstance(model.policy, TransformerPolicy) and model.policy.tokenizer is not None
    assert model.env is not None
    model.env.close()


class Bare(gym.Wrapper[Any, Any, Any, Any]):
    """A text environment without a tokenizer for anybody to see."""

    def get_wrapper_attr(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)

    def has_wrapper_attr(self, name: str) -> bool:
        return name != "tokenizer" and super().has_wrapper_attr(name)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_environment_without_tokenizer(kind: Any) -> None:
    kwargs = {"start_method": "fork"} if kind is SubprocVecEnv else {}
    env = kind([lambda: Bare(gym.make("TextGen-v0"))] * 2, **kwargs)
    model = agent(env, n_steps=4, batch_size=8).learn(8)
    assert isinstance(model.policy, TransformerPolicy) and model.policy.tokenizer is None
    env.close()


def test_predict() -> None:
    model = agent()
    assert model.env is not None
    obs: Any = model.env.reset()
    batch = model.predict(obs, deterministic=True)[0]
    assert batch.shape == (NUM_ENVS,)
    single = model.predict({k: v[1] for k, v in obs.items()}, deterministic=True)[0]
    assert single.shape == () and single == batch[1]
    drawn = np.stack([model.predict(obs)[0] for _ in range(40)])
    assert len(set(drawn.flat)) > 2 and set(drawn.flat) <= set(FEW)


def test_predict_in_between_does_not_disturb_a_rollout() -> None:
    def interrupt(local: Any, _: Any) -> bool:
        obs = local["self"].env.get_attr("engine")[0].observations
        changed = {**obs, "prompt": obs["prompt"][::-1].copy()}
        local["self"].predict(changed, deterministic=True)
        local["self"].predict({k: v[0] for k, v in obs.items()}, deterministic=True)
        return True

    assert_close(agent().learn(ITERATION), agent().learn(ITERATION, interrupt))


@pytest.mark.parametrize("kind", ["single", "native"])
def test_evaluate_policy(kind: str) -> None:
    native: Any = VecMonitor(vec_env(**SETTINGS))
    env: Any = native if kind == "native" else Monitor(gym.make("TextGen-v0", **SETTINGS))
    lengths: Any
    rewards, lengths = evaluate_policy(agent(), env, 6, return_episode_rewards=True)
    assert (
        len(lengths) == 6
        and np.isfinite(rewards).all()
        and all(1 <= length <= 8 for length in lengths)
    )


def test_evaluation_with_another_budget_is_an_error() -> None:
    # SB3 reshapes the longer response into several rows without a word.
    with pytest.raises(ValueError, match="other budgets than the policy's"):
        evaluate_policy(agent(), VecMonitor(vec_env(max_new_tokens=16)), 1)


def test_callbacks_and_progress_bar(tmp_path: Path) -> None:
    checkpoint = CheckpointCallback(10, str(tmp_path / "checkpoints"), "agent")
    seen: list[Any] = []
    evaluation = EvalCallback(
        VecMonitor(vec_env(num_envs=2, **SETTINGS)),
        eval_freq=N_STEPS // 2,
        n_eval_episodes=4,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path / "best"),
        verbose=0,
    )
    model = agent(kl_coef=0.1)
    model.learn(
        2 * ITERATION, [checkpoint, evaluation, AtRolloutEnd(seen.append)], progress_bar=True
    )
    assert seen == [model, model]
    saved = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {f"agent_{10 * i * NUM_ENVS}_steps.zip" for i in (1, 2, 3, 4)}
    loaded = PPO.load(tmp_path / "checkpoints" / "agent_120_steps", env=make_envs())
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert len(np.load(tmp_path / "evaluations.npz")["results"]) == 4
    PPO.load(tmp_path / "best" / "best_model")


def test_stop_on_reward_threshold() -> None:
    stop = StopTrainingOnRewardThreshold(-100.0, verbose=0)
    evaluation = EvalCallback(
        VecMonitor(vec_env(num_envs=2, **SETTINGS)), stop, eval_freq=10, verbose=0
    )
    model = agent().learn(4 * ITERATION, evaluation)
    assert model.num_timesteps == 10 * NUM_ENVS


def test_evaluation_callback_changes_nothing() -> None:
    evaluation = EvalCallback(VecMonitor(vec_env(num_envs=4, **SETTINGS)), eval_freq=5, verbose=0)
    plain, evaluated = agent().learn(2 * ITERATION), agent().learn(2 * ITERATION, evaluation)
    assert same(weights(plain), weights(evaluated))


class Evaluating(BaseCallback):
    """Evaluates at a point of each rollout."""

    def __init__(self, point: str, num_envs: int) -> None:
        super().__init__()
        self.point, self.num_envs = point, num_envs
        self.test = gym.make("TextGen-v0", split="test", **SETTINGS)

    def evaluate(self, point: str) -> None:
        if point == self.point:
            evaluate_split(self.model, self.test, self.num_envs, num_envs=self.num_envs)

    def _on_rollout_start(self) -> None:
        self.evaluate("start")

    def _on_step(self) -> bool:
        if self.n_calls % N_STEPS == 5:
            self.evaluate("step")
        return True


@pytest.mark.parametrize(
    ("point", "rows", "compiled"),
    [("start", NUM_ENVS - 1, False), ("step", NUM_ENVS, False), ("step", NUM_ENVS, True)],
)
def test_evaluating_changes_not_even_the_rounding(
    point: str, rows: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked, "PREPACK_FROM", 0)
    monkeypatch.setattr(th, "compile", lambda function, **_: function)
    models = []
    for callback in (None, Evaluating(point, rows)):
        model = agent(model=llama(), sampling={"compile": compiled}, learning_rate=1e-2)
        models.append(model.learn(2 * ITERATION, callback))
    assert same(*map(weights, models))


def test_same_seed_same_weights() -> None:
    first, second, other = (agent(seed=seed).learn(2 * ITERATION) for seed in (5, 5, 6))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_cache_or_not_gives_the_same_agent(config: str) -> None:
    with_cache, without = (
        agent(None, CONFIGS[config](), {"use_cache": use_cache}).learn(ITERATION)
        for use_cache in (True, False)
    )
    assert_close(with_cache, without)


def test_save_and_load(tmp_path: Path) -> None:
    model = agent(model=llama(), sampling={"temperature": 0.7}, kl_coef=0.2).learn(2 * ITERATION)
    assert not same(weights(model, "reference"), weights(agent(kl_coef=0.2).learn(1), "reference"))
    model.save(tmp_path / "agent")
    loaded: Any = PPO.load(tmp_path / "agent", device="cpu")
    for name in ("policy", "reference"):
        assert same(weights(model, name), weights(loaded, name))
    for name in ("kl_coef", "gamma", "n_steps", "num_timesteps", "kl_estimator"):
        assert getattr(loaded, name) == getattr(model, name)
    assert loaded.policy.sampling.temperature == 0.7
    assert model.env is not None
    obs: Any = model.env.reset()
    answers = [m.predict(obs, deterministic=True)[0] for m in (model, loaded)]
    assert np.array_equal(answers[0], answers[1])
    # The reference is still the one from before the first update.
    reference = weights(loaded, "reference")
    loaded.set_env(make_envs())
    assert loaded.policy.tokenizer is not None
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert loaded.num_timesteps == 3 * ITERATION
    assert same(reference, weights(loaded, "reference"))
    assert not same(weights(model), weights(loaded))


def test_load_with_changed_arguments(tmp_path: Path) -> None:
    agent().save(tmp_path / "agent")
    env: Any = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=8)
    loaded = PPO.load(tmp_path / "agent", env=env, n_steps=10, kl_coef=0.5, batch_size=10)
    loaded.learn(20)
    assert loaded.num_timesteps == 20 and loaded.reference is not None
    other: Any = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=9)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        PPO.load(tmp_path / "agent", env=other)


def test_load_after_the_first_models_folder_is_gone(tmp_path: Path) -> None:
    policy_for(vec_env(), llama()).save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "reference")
    model = agent(model=tmp_path / "model", kl_coef=0.1, ref_model=str(tmp_path / "reference"))
    model.learn(ITERATION)
    model.save(tmp_path / "agent")
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "reference")
    loaded = PPO.load(tmp_path / "agent", env=make_envs())
    for name in ("policy", "reference"):
        assert same(weights(model, name), weights(loaded, name))
    loaded.learn(ITERATION)


def test_parameters_are_exchanged(tmp_path: Path) -> None:
    trained, fresh = agent(kl_coef=0.1), agent(kl_coef=0.1, seed=1)
    before = trained.get_parameters()
    assert set(before) == {"policy", "policy.optimizer"}
    kept = weights(trained)
    trained.learn(ITERATION)
    trained.save(tmp_path / "agent")
    fresh.set_parameters(str(tmp_path / "agent"))
    for name in ("policy", "reference"):
        assert same(weights(fresh, name), weights(trained, name))
    # An agent that will never need a reference takes the rest.
    plain = agent(seed=2)
    plain.set_parameters(trained.get_parameters())
    assert plain.reference is None and same(weights(plain), weights(trained))
    # Parameters from before there was a reference leave it as it is.
    reference = weights(trained, "reference")
    trained.set_parameters({"policy": kept, "policy.optimizer": before["policy.optimizer"]})
    assert same(weights(trained), kept) and same(weights(trained, "reference"), reference)
    with pytest.raises(ValueError, match="do not match"):
        trained.set_parameters({"policy": kept})


def test_set_parameters_drops_the_memo() -> None:
    first, second = agent(seed=0), agent(seed=1)
    assert first.env is not None
    obs: Any = first.env.reset()
    first.predict(obs)
    first.set_parameters(second.get_parameters())
    for use_cache in (True, False):
        first.policy.use_cache = use_cache
        with th.no_grad():
            tensors = {k: th.as_tensor(v) for k, v in obs.items()}
            answer = first.policy.get_distribution(tensors).log_probs
        second.policy.use_cache = False
        with th.no_grad():
            expected = second.policy.get_distribution(tensors).log_probs
        allowed = th.tensor(FEW)
        assert th.allclose(answer[:, allowed], expected[:, allowed], atol=1e-5)


def test_logs(tmp_path: Path) -> None:
    agent(tensorboard_log=str(tmp_path), kl_coef=0.1).learn(2 * ITERATION, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate", "train/loss"}
    assert wanted | {"kl/per_token", "kl/per_episode", "kl/coef", "train/approx_kl"} <= tags
    assert [event.step for event in events.Scalars("kl/coef")] == [ITERATION, 2 * ITERATION]
    # The first rollout is the reference's own.
    assert abs(events.Scalars("kl/per_token")[0].value) < 1e-6
    assert abs(events.Scalars("kl/per_token")[1].value) > 1e-6


class Recorded(PPO):
    """Keeps what each update is about to learn from."""

    def train(self) -> None:
        buffer: Any = self.rollout_buffer
        names = ("rewards", "log_probs", "values", "advantages", "episode_starts", "actions")
        self.__dict__.setdefault("taken", []).append(
            {
                **{name: getattr(buffer, name).copy() for name in names},
                "samples": buffer.samples(buffer.sequences),
                "index": buffer.index(buffer.sequences),
                "last": (buffer.last_values, buffer.last_dones),
                "kl_coef": self.kl_coef,
            }
        )
        super().train()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "taken"]


def recorded(env: Any = None, **kwargs: Any) -> Any:
    return Recorded(
        "TransformerPolicy",
        make_envs() if env is None else env,
        n_steps=N_STEPS,
        batch_size=32,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"model": gpt2(), "allowed_tokens": FEW, "temperature": 0.7},
        **kwargs,
    )


def naive_ref_log_probs(reference: Any, taken: dict[str, Any]) -> Any:
    """One whole forward for each action, by the model's own class, in plain steps."""
    tokens, positions, _ = taken["samples"].observations.values()
    actions = taken["samples"].actions.tolist()
    result = np.zeros(taken["rewards"].shape)
    for (row, position), action, step, env in zip(
        positions.nonzero().tolist(), actions, *taken["index"], strict=True
    ):
        with th.no_grad():
            logits = reference.model(input_ids=tokens[row : row + 1, : position + 1]).logits[0, -1]
        log_probs = (logits[FEW].double() / 0.7).log_softmax(-1)
        result[step, env] = log_probs[FEW.index(action)]
    return result


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("env_id", ["TextGen-v0", "Dialogue-v0"])
def test_kl_is_taken_off_the_rewards(env_id: str, estimator: Any) -> None:
    raw: list[Any] = []
    model = recorded(
        make_envs(env_id), kl_coef=0.3, kl_estimator=estimator, learning_rate=1e-2, gamma=0.9
    )
    before = weights(model)
    model.learn(2 * ITERATION, EachStep(lambda local: raw.append(local["rewards"].copy())))
    reference = {f"backbone.{name}": value for name, value in weights(model, "reference").items()}
    assert same(reference, {k: v for k, v in before.items() if k.startswith("backbone")})
    taken = model.taken[1]
    log_ratio = naive_ref_log_probs(model.reference, taken) - taken["log_probs"]
    kl = -log_ratio if estimator == "k1" else np.exp(log_ratio) - 1 - log_ratio
    assert np.abs(kl).max() > 1e-2
    expected = np.array(raw[N_STEPS:]) - 0.3 * kl
    assert np.allclose(taken["rewards"], expected, rtol=1e-5, atol=1e-5)
    # And the advantages follow: GAE in plain float64.
    last_values, dones = taken["last"]
    running, following = np.zeros(NUM_ENVS), last_values.astype(float)
    ends = np.vstack([taken["episode_starts"][1:], dones])
    for step in reversed(range(N_STEPS)):
        alive = 1.0 - ends[step]
        delta = (
            raw[N_STEPS + step] - 0.3 * kl[step] + 0.9 * alive * following - taken["values"][step]
        )
        running = delta + 0.9 * 0.95 * alive * running
        following = taken["values"][step]
        assert np.abs(taken["advantages"][step] - running).max() < 1e-5


def test_adaptive_coefficient_follows_the_published_formula() -> None:
    model = recorded(kl_coef=0.2, kl_target=6.0, learning_rate=1e-2).learn(3 * ITERATION)
    expected = 0.2
    running = [0.0] * NUM_ENVS  # the episodes' KL so far, also over the border of two rollouts
    for taken in model.taken:
        kl = taken["log_probs"] - naive_ref_log_probs(model.reference, taken)
        ends = np.vstack([taken["episode_starts"][1:], taken["last"][1]])
        finished = []
        for step, env in np.ndindex(N_STEPS, NUM_ENVS):
            running[env] += kl[step, env]
            if ends[step, env]:
                finished.append(running[env])
                running[env] = 0.0
        error = float(np.clip(np.mean(finished) / 6.0 - 1, -0.2, 0.2))
        expected *= 1 + error * len(finished) / 10_000
        assert taken["kl_coef"] == pytest.approx(expected, rel=1e-6)
    assert model.kl_coef == pytest.approx(expected, rel=1e-6) and model.kl_coef != 0.2


def test_reference_model(tmp_path: Path) -> None:
    other = policy_for(vec_env(), llama())  # another architecture, too
    other.save_pretrained(tmp_path / "model")
    model = recorded(kl_coef=0.1, ref_model=str(tmp_path / "model"))
    model.learn(ITERATION)
    assert same(weights(model, "reference"), other.backbone.state_dict())
    assert not any(parameter.requires_grad for parameter in model.reference.parameters())
    kl = model.taken[0]["log_probs"] - naive_ref_log_probs(model.reference, model.taken[0])
    assert np.abs(kl).mean() > 0.01


def test_no_kl_no_reference() -> None:
    model = agent().learn(ITERATION)
    assert model.reference is None and set(model.get_parameters()) == {"policy", "policy.optimizer"}


def test_truncated_episodes_are_bootstrapped_and_terminated_ones_are_not() -> None:
    raw: list[Any] = []
    env = VecMonitor(vec_env(num_envs=NUM_ENVS, max_new_tokens=8, max_episode_steps=5))

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            infos, dones = self.locals["infos"], self.locals["dones"]
            cut = [bool(info.get("TimeLimit.truncated")) for info in infos]
            raw.append((self.locals["rewards"].copy(), dones.copy(), np.array(cut)))
            return True

    model = recorded(env, gamma=0.5)
    with th.no_grad():
        model.policy.value_head.bias += 4.0
    model.learn(ITERATION, Keep())
    rewards, dones, cut = (np.stack(column) for column in zip(*raw, strict=True))
    assert cut.any() and (dones & ~cut).any()
    expected = rewards + 0.5 * 4.0 * cut
    assert np.abs(model.taken[0]["rewards"] - expected).max() < 1e-6


def test_update_runs_one_forward_for_each_sequence() -> None:
    model = agent(n_epochs=1)
    seen = []
    trunk = model.policy.backbone.trunk

    def counting(**inputs: Any) -> Any:
        if th.is_grad_enabled():
            seen.append(tuple(inputs["input_ids"].shape))
        return trunk(**inputs)

    model.policy.backbone.trunk = counting
    model.learn(ITERATION)
    # Each token once, but for the last one of a sequence, which nothing follows.
    lengths = [sequence.length - 1 for sequence in model.rollout_buffer.sequences]
    assert sum(rows * width for rows, width in seen) == sum(lengths)
    assert len(seen) == round(ITERATION / 32)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.1}])
def test_large_steps_leave_everything_finite(sampling: dict[str, Any], ent_coef: float) -> None:
    # What was sampled may leave the nucleus after an update; its log-probability stays finite.
    model = agent(sampling=sampling, learning_rate=0.1, ent_coef=ent_coef, kl_coef=0.1)
    model.learn(3 * ITERATION)
    assert all(value.isfinite().all() for value in weights(model).values())
    assert np.isfinite(model.rollout_buffer.advantages).all()


def test_save_pretrained_of_an_agent_brings_the_tokenizer(tmp_path: Path) -> None:
    model = agent().learn(ITERATION)
    model.policy.save_pretrained(tmp_path / "model")
    fresh = agent(model=tmp_path / "model")
    first, second = (roll_out(m.policy, vec_env(max_new_tokens=8), 8) for m in (model, fresh))
    assert np.array_equal(first.actions, second.actions)
    assert np.array_equal(first.log_probs, second.log_probs)
    tokenizer = tmp_path / "model" / "tokenizer.json"
    envs = make_envs(tokenizer=str(tokenizer.parent))
    assert envs.single_action_space.n == make_envs().single_action_space.n


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kl_coef": -0.1}, "kl_coef must be at least 0"),
        ({"kl_coef": 0.1, "kl_estimator": "k2"}, "kl_estimator must be"),
        ({"kl_target": 6.0}, "both must be positive"),
        ({"kl_coef": 0.1, "kl_target": -6.0}, "both must be positive"),
        ({"use_sde": True}, "gSDE|use_sde"),
    ],
)
def test_arguments_that_make_no_sense(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(**kwargs)


def test_kl_needs_a_transformer() -> None:
    for kwargs in ({"kl_coef": 0.1}, {"ref_model": "gpt2"}):
        with pytest.raises(ValueError, match="need the policy 'TransformerPolicy'"):
            PPO("MlpPolicy", "CartPole-v1", **kwargs)
    with pytest.raises(TypeError, match="needs a TransformerPolicy"):
        PPO("MlpPolicy", "CartPole-v1").set_reference()
    with pytest.raises(ValueError, match="Policy GptPolicy unknown"):
        PPO("GptPolicy", "CartPole-v1")


def test_predictions_before_a_rollout_change_nothing() -> None:
    """Not even the rounding: what they have remembered and laid out is no rollout's."""
    observations = make_envs().reset(seed=1)[0]
    models = []
    for questions in (0, 8):
        model = agent().learn(ITERATION)
        for _ in range(questions):
            model.predict(observations, deterministic=True)
        assert model.policy.backbone.decoder.prepacked == (questions > 0)
        models.append(model.learn(ITERATION, reset_num_timesteps=False))
    assert same(*map(weights, models))


def test_interrupted_last_step_leaves_nothing_to_the_next_question() -> None:
    model = agent()
    observations = make_envs().reset(seed=1)[0]
    expected = model.policy.predict_values(model.policy.obs_to_tensor(observations)[0])
    add = model.rollout_buffer.add

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if model.rollout_buffer.pos == N_STEPS - 1:
            raise KeyboardInterrupt
        add(*args, **kwargs)

    model.rollout_buffer.add = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.learn(ITERATION)
    actual = model.policy.predict_values(model.policy.obs_to_tensor(observations)[0])
    assert th.equal(actual, expected)
