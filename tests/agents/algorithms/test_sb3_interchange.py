"""That agents.PPO can stand wherever stable-baselines3's PPO stands."""

from __future__ import annotations

import csv
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import PPO, GymnasiumVecEnv
from tests.agents.helpers import FEW, gpt2, vec_env

SB3 = stable_baselines3.PPO

# --- SB3's policies: the same to the last bit -----------------------------------------------------


class Parts(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole with its observation in two parts."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        part = spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = spaces.Dict({"cart": part, "pole": part})

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"cart": observation[:2], "pole": observation[2:]}


def cartpoles(num_envs: int = 8, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", num_envs, **kwargs)


class Picture(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole with its observation as the brightness of the quarters of an image."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observation(self, observation: Any) -> Any:
        quarters = np.clip(128 + 100 * observation, 0, 255).astype(np.uint8).reshape(2, 2, 1)
        return quarters.repeat(18, axis=0).repeat(18, axis=1)


# What each is for: the environment, the policy, the arguments, and the number of steps.
CASES: dict[str, tuple[Callable[[], VecEnv], str, dict[str, Any], int]] = {
    "clipped values": (cartpoles, "MlpPolicy", {"clip_range_vf": 0.2, "ent_coef": 0.01}, 1536),
    "target_kl": (cartpoles, "MlpPolicy", {"target_kl": 0.002, "learning_rate": 3e-3}, 1536),
    "schedules": (
        cartpoles,
        "MlpPolicy",
        {
            "learning_rate": LinearSchedule(1e-3, 1e-4, 0.8),
            "clip_range": lambda progress: 0.1 + 0.2 * progress,
            "clip_range_vf": lambda progress: 0.3 * progress + 0.01,
            "normalize_advantage": False,
            "batch_size": 96,  # the last minibatch is smaller
            "vf_coef": 0.7,
            "max_grad_norm": 0.3,
            "gamma": 0.9,
            "gae_lambda": 0.8,
        },
        1536,
    ),
    "network": (
        cartpoles,
        "MlpPolicy",
        {
            "policy_kwargs": {
                "net_arch": {"pi": [16], "vf": [32, 8]},
                "activation_fn": th.nn.ReLU,
                "ortho_init": False,
                "optimizer_class": th.optim.RMSprop,
            }
        },
        1024,
    ),
    "gSDE": (
        lambda: make_vec_env("Pendulum-v1", 4),
        "MlpPolicy",
        {"use_sde": True, "sde_sample_freq": 4, "ent_coef": 0.001},
        1024,
    ),
    "two inputs": (
        lambda: cartpoles(wrapper_class=Parts),
        "MultiInputPolicy",
        {"ent_coef": 0.01},
        1024,
    ),
    "images": (
        lambda: VecFrameStack(cartpoles(2, wrapper_class=Picture), 2),
        "CnnPolicy",
        {"n_epochs": 1},
        256,
    ),
    "VecNormalize": (lambda: VecNormalize(cartpoles(), gamma=0.9), "MlpPolicy", {}, 1536),
}


def control(cls: Any, case: str, **changes: Any) -> Any:
    make_env, policy, kwargs, _ = CASES[case]
    settings: dict[str, Any] = {"n_steps": 64, "n_epochs": 4, "seed": 3, "device": "cpu"}
    return cls(policy, make_env(), **{**settings, **kwargs, **changes})


def assert_same(first: Any, second: Any) -> None:
    """The same in everything that a dict, list, tensor, array or number holds."""
    if isinstance(first, (th.Tensor, np.ndarray)):
        assert first.dtype == second.dtype and np.array_equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def logged(folder: Path) -> list[dict[str, Any]]:
    """What each dump of the log held, but for what the clock says."""
    lines = (folder / "progress.json").read_text().splitlines()
    clocks = ("time/fps", "time/time_elapsed")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("case", list(CASES))
def test_sb3s_policies_learn_bit_for_bit_alike(case: str, tmp_path: Path) -> None:
    steps = CASES[case][-1]
    agents, random_states = [], []
    for name, cls in (("ours", PPO), ("theirs", SB3)):
        agent = control(cls, case)
        start = {k: v.clone() for k, v in agent.policy.state_dict().items()}
        agent.set_logger(configure(str(tmp_path / name), ["json"]))
        agent.learn(steps)
        random_states.append((th.get_rng_state(), np.random.get_state(legacy=False)["state"]))
        agents.append(agent)
        assert not all(th.equal(v, start[k]) for k, v in agent.policy.state_dict().items())
    ours, theirs = agents
    assert_same(ours.get_parameters(), theirs.get_parameters())
    assert_same(*random_states)
    assert type(ours.rollout_buffer) is type(theirs.rollout_buffer)
    # The same log, too: every loss, no key more and none fewer.
    logs = logged(tmp_path / "ours")
    assert len(logs) == steps // (64 * ours.n_envs)
    assert_same(logs, logged(tmp_path / "theirs"))
    if case == "target_kl":
        assert ours._n_updates == theirs._n_updates < 4 * len(logs)
    if case == "VecNormalize":
        for name in ("mean", "var", "count"):
            assert_same(*(getattr(agent.env.obs_rms, name) for agent in agents))
            assert_same(*(getattr(agent.env.ret_rms, name) for agent in agents))


def test_gymnasiums_vector_environment_is_sb3s_bit_for_bit() -> None:
    settings: dict[str, Any] = {"n_steps": 128, "n_epochs": 4, "seed": 3, "device": "cpu"}
    native: Any = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync")
    ours = PPO("MlpPolicy", native, **settings).learn(2048)
    theirs = SB3("MlpPolicy", cartpoles(4), **settings).learn(2048)
    assert_same(ours.get_parameters(), theirs.get_parameters())
    episodes = [[(e["r"], e["l"]) for e in agent.ep_info_buffer or ()] for agent in (ours, theirs)]
    assert len(episodes[0]) > 20 and episodes[0] == episodes[1]


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(("saving", "loading"), [(PPO, SB3), (SB3, PPO)])
@pytest.mark.parametrize("case", ["schedules", "gSDE", "VecNormalize"])
def test_saved_files_are_exchanged(case: str, saving: Any, loading: Any, tmp_path: Path) -> None:
    make_env = CASES[case][0]
    first = control(saving, case).learn(512)
    first.save(tmp_path / "agent")
    second = loading.load(tmp_path / "agent", env=make_env(), device="cpu")
    assert type(second) is loading
    assert_same(first.get_parameters(), second.get_parameters())
    obs = make_env().reset()
    assert_same(*(agent.predict(obs, deterministic=True)[0] for agent in (first, second)))
    # And both go on alike.
    first.set_env(make_env())
    for agent in (first, second):
        agent.set_random_seed(5)
        agent.env.seed(5)
        agent.learn(512, reset_num_timesteps=False)
    assert first.num_timesteps == second.num_timesteps == 1024
    assert_same(first.get_parameters(), second.get_parameters())


def test_signatures_begin_with_sb3s() -> None:
    names = ("learn", "predict", "load", "save", "set_env", "set_parameters")
    pairs = [(PPO, SB3), *((getattr(PPO, name), getattr(SB3, name)) for name in names)]
    for our, their in pairs:
        ours, theirs = inspect.signature(our).parameters, inspect.signature(their).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [p.kind for p in ours.values()][: len(theirs)] == [p.kind for p in theirs.values()]
        # What is ours has a default, so that nobody has to know of it.
        assert all(p.default is not p.empty for p in list(ours.values())[len(theirs) :])


def test_all_arguments_by_position() -> None:
    args: list[Any] = ["MlpPolicy", "CartPole-v1", 1e-3, 32, 16, 2, 0.9, 0.8, 0.3, 0.4, False]
    args += [0.1, 0.2, 0.3, False, 5, None, None, 0.5, 7, None, {"net_arch": [4]}, 0, 6, "cpu"]
    ours, theirs = PPO(*args), SB3(*args)
    names = (
        *("learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda"),
        *("normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "sde_sample_freq"),
        *("target_kl", "policy_kwargs", "seed"),
    )
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name)
    assert_same(ours.get_parameters(), theirs.get_parameters())
    args.append(False)  # _init_setup_model
    assert not hasattr(PPO(*args), "policy")


# --- TransformerPolicy: whatever SB3 offers -------------------------------------------------------

NUM_ENVS, N_STEPS = 4, 20
ITERATION = NUM_ENVS * N_STEPS
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "reward": ["task", "length_penalty"]}


def text_envs(num_envs: int = NUM_ENVS, **kwargs: Any) -> Any:
    return gym.make_vec("TextGen-v0", num_envs, **{**SETTINGS, **kwargs})


def text_env() -> Any:
    return gym.make("TextGen-v0", **SETTINGS)


def agent(env: Any = None, cls: Any = PPO, **kwargs: Any) -> Any:
    settings = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
    settings |= {"learning_rate": 3e-3, "target_kl": 1e9}
    return cls(
        "TransformerPolicy",
        text_envs() if env is None else env,
        policy_kwargs={"model": gpt2(), "allowed_tokens": FEW},
        **{**settings, **kwargs},
    )


def weights(model: Any) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def moved(model: Any, before: dict[str, th.Tensor]) -> bool:
    return not all(th.equal(value, before[name]) for name, value in weights(model).items())


KINDS: dict[str, Callable[[], Any]] = {
    "sync": lambda: text_envs(vectorization_mode="sync"),
    "VecMonitor": lambda: VecMonitor(vec_env(num_envs=NUM_ENVS, **SETTINGS)),
    "make_vec_env": lambda: make_vec_env("TextGen-v0", NUM_ENVS, env_kwargs=SETTINGS),
    "DummyVecEnv": lambda: DummyVecEnv([text_env] * NUM_ENVS),
    "SubprocVecEnv": lambda: make_vec_env(
        "TextGen-v0",
        NUM_ENVS,
        env_kwargs=SETTINGS,
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs={"start_method": "fork"},
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_environment_gives_the_same_agent(kind: str) -> None:
    first, second = agent().learn(2 * ITERATION), agent(KINDS[kind]()).learn(2 * ITERATION)
    assert_same(weights(first), weights(second))
    if kind != "DummyVecEnv":  # which nobody monitors
        returns = [[(e["r"], e["l"]) for e in m.ep_info_buffer] for m in (first, second)]
        assert len(returns[0]) > 5
        assert np.allclose(returns[0], returns[1], atol=1e-5)
    second.env.close()


def test_make_vec_env_with_its_own_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "monitor"
    env = make_vec_env(
        "TextGen-v0",
        2,
        seed=7,
        monitor_dir=str(folder),
        env_kwargs=SETTINGS,
        vec_env_cls=DummyVecEnv,
    )
    model = agent(env).learn(2 * N_STEPS)
    env.close()
    rows = [
        (float(row["r"]), int(row["l"]))
        for path in folder.iterdir()
        for row in csv.DictReader(path.read_text().splitlines()[1:])
    ]
    assert len(rows) > 2 and sorted(rows) == sorted((e["r"], e["l"]) for e in model.ep_info_buffer)


class Recorder(BaseCallback):
    """Writes down what it is called for, when, and what it can see."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int, int]] = []
        self.visible: dict[str, set[str]] = {}

    def note(self, event: str) -> None:
        self.events.append((event, self.n_calls, self.model.num_timesteps))
        self.visible[event] = set(self.locals)

    def _on_training_start(self) -> None:
        self.note("training start")

    def _on_rollout_start(self) -> None:
        self.note("rollout start")

    def _on_step(self) -> bool:
        self.note("step")
        return True

    def _on_rollout_end(self) -> None:
        self.note("rollout end")

    def _on_training_end(self) -> None:
        self.note("training end")


def test_callbacks_are_called_as_sb3_calls_them() -> None:
    theirs, ours = Recorder(), Recorder()
    settings: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "device": "cpu"}
    SB3("MlpPolicy", cartpoles(NUM_ENVS), **settings).learn(100, theirs)
    agent().learn(100, ours)  # rounded up to two whole rollouts
    assert ours.events == theirs.events and ours.num_timesteps == 2 * ITERATION
    for event, names in theirs.visible.items():
        # All but the counters of SB3's search for truncated episodes.
        assert names - {"idx", "done"} <= ours.visible[event]


def test_callback_list_of_sb3s_callbacks() -> None:
    every, plain = Recorder(), Recorder()
    stop = StopTrainingOnMaxEpisodes(max_episodes=3)
    dones: list[int] = []

    def count(local: dict[str, Any], _: dict[str, Any]) -> bool:
        dones.append(int(local["dones"].sum()))
        return True

    inner = CallbackList([EveryNTimesteps(5 * NUM_ENVS, every), plain])
    model = agent().learn(10 * ITERATION, CallbackList([inner, count_callback(count), stop]))
    # The limit is for each environment.
    assert sum(dones) >= 3 * NUM_ENVS > sum(dones[:-1])
    assert model.num_timesteps == len(dones) * NUM_ENVS < 10 * ITERATION
    assert len([e for e in plain.events if e[0] == "step"]) == len(dones)
    assert len([e for e in every.events if e[0] == "step"]) == len(dones) // 5


def count_callback(function: Callable[[Any, Any], bool]) -> BaseCallback:
    class Calls(BaseCallback):
        def _on_step(self) -> bool:
            return function(self.locals, self.globals)

    return Calls()


def test_function_callback_stops_training() -> None:
    model = agent()
    before = weights(model)
    calls: list[int] = []

    def callback(local: dict[str, Any], _: dict[str, Any]) -> bool:
        assert local["self"] is model
        calls.append(model.num_timesteps)
        return len(calls) < N_STEPS + 3

    model.learn(5 * ITERATION, callback)
    assert calls == [NUM_ENVS * (i + 1) for i in range(N_STEPS + 3)]
    assert model.num_timesteps == calls[-1]
    assert model._n_updates == 2 and moved(model, before)  # one rollout was whole


def test_evaluation_callback_reports_what_evaluation_finds(tmp_path: Path) -> None:
    def eval_env() -> Any:
        env = VecMonitor(vec_env(num_envs=2, **SETTINGS))
        env.seed(11)
        return env

    found: list[Any] = []

    class Own(BaseCallback):
        parent: EvalCallback

        def _on_step(self) -> bool:
            result: Any = evaluate_policy(self.model, eval_env(), 5, return_episode_rewards=True)
            found.append(result)
            return True

    own = Own()
    evaluation = EvalCallback(
        eval_env(),
        callback_after_eval=own,
        n_eval_episodes=5,
        eval_freq=N_STEPS,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model = agent()
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(ITERATION, evaluation)
    kept = np.load(tmp_path / "evaluations.npz")
    assert kept["timesteps"].tolist() == [ITERATION]
    assert kept["results"].tolist() == [found[0][0]] and kept["ep_lengths"].tolist() == [
        found[0][1]
    ]
    assert evaluation.best_mean_reward == pytest.approx(np.mean(found[0][0]))
    means = [line["eval/mean_reward"] for line in logged(tmp_path) if "eval/mean_reward" in line]
    assert means == pytest.approx([np.mean(found[0][0])])


@pytest.mark.parametrize("threshold", [-100.0, 100.0])
def test_stops_where_a_threshold_is_met_or_nothing_improves(threshold: float) -> None:
    evaluation = EvalCallback(
        VecMonitor(vec_env(num_envs=2, **SETTINGS)),
        callback_on_new_best=StopTrainingOnRewardThreshold(threshold),
        callback_after_eval=StopTrainingOnNoModelImprovement(1, min_evals=2),
        n_eval_episodes=2,
        eval_freq=5,
        verbose=0,
    )
    model = agent(learning_rate=0.0).learn(10 * ITERATION, evaluation)
    # A threshold that is met stops at once; otherwise the second evaluation without a better one.
    if threshold < 0:
        assert model.num_timesteps == 5 * NUM_ENVS
    else:
        assert 4 * 5 * NUM_ENVS <= model.num_timesteps < 10 * ITERATION


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_progress_bar_callback_counts_every_step() -> None:
    bar = ProgressBarCallback()
    agent().learn(ITERATION + 1, bar)
    assert bar.pbar.total == ITERATION + 1 and bar.pbar.n == 2 * ITERATION


def test_tensorboard_runs_and_counted_timesteps(tmp_path: Path) -> None:
    model = agent(tensorboard_log=str(tmp_path))
    model.learn(ITERATION, tb_log_name="words")
    model.learn(ITERATION, tb_log_name="words", reset_num_timesteps=False)
    assert model.num_timesteps == 2 * ITERATION
    model.learn(ITERATION, tb_log_name="words")
    assert model.num_timesteps == ITERATION
    model.learn(ITERATION)
    assert {path.name for path in tmp_path.iterdir()} == {"words_1", "words_2", "PPO_1"}
    steps = {}
    for run in ("words_1", "words_2"):
        events = EventAccumulator(str(tmp_path / run))
        events.Reload()
        steps[run] = [event.step for event in events.Scalars("rollout/ep_rew_mean")]
    assert steps == {"words_1": [ITERATION, 2 * ITERATION], "words_2": [ITERATION]}


def test_log_interval_and_what_is_logged(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 16, "device": "cpu"}
    theirs = SB3("MlpPolicy", cartpoles(NUM_ENVS), **settings, clip_range_vf=0.2)
    for name, model in (("theirs", theirs), ("ours", agent(clip_range_vf=0.2))):
        model.set_logger(configure(str(tmp_path / name), ["json"]))
        model.learn(4 * ITERATION, log_interval=2)
    ours = logged(tmp_path / "ours")
    assert [line["time/total_timesteps"] for line in ours] == [2 * ITERATION, 4 * ITERATION]
    assert [line["time/iterations"] for line in ours] == [2, 4]
    for mine, other in zip(ours, logged(tmp_path / "theirs"), strict=True):
        assert set(other) <= set(mine)
        assert all(np.isfinite(mine[key]) for key in other)


def test_statistics_are_of_the_last_episodes(tmp_path: Path) -> None:
    model = agent(stats_window_size=3)
    model.set_logger(configure(str(tmp_path), ["json"]))
    seen: list[tuple[float, int]] = []

    def callback(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.extend(
            (i["episode"]["r"], i["episode"]["l"]) for i in local["infos"] if "episode" in i
        )
        return True

    model.learn(ITERATION, callback)
    assert len(seen) > 3 and len(set(seen)) > 1
    (line,) = logged(tmp_path)
    rewards, lengths = zip(*seen[-3:], strict=True)
    assert line["rollout/ep_rew_mean"] == pytest.approx(np.mean(rewards))
    assert line["rollout/ep_len_mean"] == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose(verbose: int, capfd: pytest.CaptureFixture[str]) -> None:
    agent(verbose=verbose).learn(ITERATION)
    printed = capfd.readouterr().out
    if verbose == 0:
        assert printed == ""
    else:
        for text in ("Using cpu device", "ep_rew_mean", "total_timesteps", "fps", "success_rate"):
            assert text in printed


def test_predict_answers_as_sb3_does() -> None:
    model, other = agent(), SB3("MlpPolicy", cartpoles(NUM_ENVS), device="cpu")
    obs: Any = model.env.reset()
    theirs: Any = other.get_env().reset()  # type: ignore[union-attr]
    one = {key: value[2] for key, value in obs.items()}
    for mine, reference in ((obs, theirs), (one, theirs[2])):
        for deterministic in (True, False):
            (action, state), (expected, _) = (
                m.predict(o, None, np.ones(NUM_ENVS, bool), deterministic)
                for m, o in ((model, mine), (other, reference))
            )
            assert state is None and isinstance(action, np.ndarray)
            assert (action.shape, action.dtype) == (expected.shape, expected.dtype)
    tensors = {key: th.as_tensor(value) for key, value in obs.items()}
    model.policy.use_cache = False
    with th.no_grad():
        distribution = model.policy.get_distribution(tensors)
    greedy = model.predict(obs, deterministic=True)[0]
    assert greedy.tolist() == distribution.log_probs.argmax(-1).tolist()
    assert np.array_equal(greedy, model.policy.predict(obs, deterministic=True)[0])
    draws = []
    for seed in (3, 3, 4):
        model.set_random_seed(seed)
        draws.append([model.predict(obs)[0].tolist() for _ in range(5)])
    assert draws[0] == draws[1] != draws[2]
    # A single environment takes the action as it is, and a bad observation is refused.
    env = text_env()
    env.reset(seed=0)
    env.step(model.predict(one)[0])
    with pytest.raises(ValueError, match="observation shape"):
        model.predict({**one, "prompt": one["prompt"][:-1]})


def test_evaluate_policy_plays_the_greedy_policy() -> None:
    model = agent().learn(ITERATION)
    env = DummyVecEnv([lambda: Monitor(text_env())])
    env.seed(4)
    called: list[bool] = []
    lengths: Any
    rewards, lengths = evaluate_policy(
        model, env, 6, return_episode_rewards=True, callback=lambda *_: called.append(True)
    )
    single = text_env()
    expected: list[float] = []
    steps: list[int] = []
    obs, _ = single.reset(seed=4)
    while len(expected) < 6:
        total, count, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, _ = single.step(
                model.predict(obs, None, None, True)[0]
            )
            total, count, over = total + float(reward), count + 1, terminated or truncated
        expected.append(total)
        steps.append(count)
        obs, _ = single.reset()
    assert lengths == steps and rewards == pytest.approx(expected, abs=1e-5)
    assert len(called) == sum(steps)
    mean, deviation = evaluate_policy(
        model, VecMonitor(vec_env(**SETTINGS)), 8, deterministic=False
    )
    assert np.isfinite([mean, deviation]).all()
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate_policy(model, env, 2, reward_threshold=100.0)
    with pytest.warns(UserWarning, match="Monitor"):
        evaluate_policy(model, DummyVecEnv([text_env]), 1)


def test_environments_are_set_and_returned() -> None:
    model = agent()
    assert isinstance(model.get_env(), VecMonitor) and model.get_env() is model.env
    assert model.get_vec_normalize_env() is None
    model.learn(ITERATION)
    before = weights(model)
    wrapped = GymnasiumVecEnv(text_envs(reward="length_penalty"))
    for env in (text_envs(reward="length_penalty"), VecMonitor(wrapped)):
        model.set_env(env)
        assert model.get_env() is model.env and isinstance(model.get_env(), VecMonitor)
        returns: list[float] = []

        def callback(
            local: dict[str, Any], _: dict[str, Any], returns: list[float] = returns
        ) -> bool:
            returns.extend(i["episode"]["r"] for i in local["infos"] if "episode" in i)
            return True

        model.learn(ITERATION, callback, reset_num_timesteps=False)
        assert returns and all(value <= 0 for value in returns)  # the new reward's
    assert model.num_timesteps == 3 * ITERATION and moved(model, before)
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(text_envs(NUM_ENVS + 1))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(text_envs(max_new_tokens=9))
    empty = agent()
    empty.env = None
    empty.set_env(text_envs())
    empty.learn(ITERATION)


def test_parameters_come_back() -> None:
    model = agent().learn(ITERATION)
    kept = model.get_parameters()
    copied = {k: v.clone() for k, v in kept["policy"].items()}
    stepped = model.policy.optimizer.state_dict()["state"][0]["step"].item()
    assert stepped > 0
    stored = io.BytesIO()
    th.save(kept, stored)
    model.learn(ITERATION)
    assert moved(model, copied)
    stored.seek(0)
    model.set_parameters(th.load(stored, weights_only=False), exact_match=True, device="cpu")
    assert not moved(model, copied)
    assert model.policy.optimizer.state_dict()["state"][0]["step"].item() == stepped
    head = {"value_head.bias": th.full((1,), 2.5)}
    model.set_parameters({"policy": head}, exact_match=False)
    assert model.policy.value_head.bias.item() == 2.5
    with pytest.raises(RuntimeError, match="Missing key"):
        model.set_parameters({**kept, "policy": head})
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters({"critic": head}, exact_match=False)


def test_load_with_other_arguments(tmp_path: Path) -> None:
    model = agent().learn(ITERATION)
    model.save(tmp_path / "agent")
    loaded: Any = PPO.load(
        tmp_path / "agent",
        env=text_envs(2),
        learning_rate=1e-5,
        n_steps=12,
        n_epochs=3,
        clip_range=0.3,
        clip_range_vf=0.4,
        ent_coef=0.02,
    )
    assert (loaded.n_envs, loaded.n_steps, loaded.rollout_buffer.buffer_size) == (2, 12, 12)
    assert (loaded.clip_range(1.0), loaded.clip_range_vf(0.5), loaded.ent_coef) == (0.3, 0.4, 0.02)
    updates = loaded._n_updates
    loaded.learn(24)
    assert loaded.num_timesteps == 24 and loaded._n_updates == updates + 3
    assert {group["lr"] for group in loaded.policy.optimizer.param_groups} == {1e-5}
    # custom_objects stand for what the file has.
    objects = {"learning_rate": 5e-4, "lr_schedule": None, "clip_range": 0.1, "n_epochs": 1}
    loaded = PPO.load(tmp_path / "agent.zip", custom_objects=objects, device="cpu")
    assert (loaded.lr_schedule(0.3), loaded.clip_range(0.3), loaded.n_epochs) == (5e-4, 0.1, 1)
    assert loaded.get_env() is None and not moved(loaded, weights(model))
    with pytest.raises(ValueError, match="do not equal the stored policy kwargs"):
        PPO.load(tmp_path / "agent", policy_kwargs={"model": gpt2(), "temperature": 0.1})
    # What is left out of the file has its default for text.
    model.save(tmp_path / "less", exclude=["n_epochs"])
    assert PPO.load(tmp_path / "less").n_epochs == 4


def test_loaded_agent_learns_as_the_saved_one_would() -> None:
    model = agent().learn(ITERATION)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded: Any = PPO.load(file, env=text_envs(), device="cpu")
    model.set_env(text_envs())
    for each in (model, loaded):
        each.set_random_seed(9)
        each.env.seed(9)
        each.learn(2 * ITERATION)
    assert model.num_timesteps == loaded.num_timesteps == 2 * ITERATION
    assert model._n_updates == loaded._n_updates
    assert_same(weights(model), weights(loaded))
    assert_same(*(each.policy.optimizer.state_dict() for each in (model, loaded)))


def test_sb3s_ppo_loads_a_text_agent() -> None:
    model = agent().learn(ITERATION)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded: Any = SB3.load(file, env=VecMonitor(vec_env(num_envs=NUM_ENVS, **SETTINGS)))
    assert type(loaded) is SB3 and not moved(loaded, weights(model))
    obs: Any = model.env.reset()
    assert_same(*(m.predict(obs, deterministic=True)[0] for m in (model, loaded)))
    loaded.learn(ITERATION)
    assert moved(loaded, weights(model))


def test_normalized_rewards(tmp_path: Path) -> None:
    def envs(**kwargs: Any) -> VecNormalize:
        return VecNormalize(
            VecMonitor(vec_env(num_envs=NUM_ENVS, **SETTINGS)), norm_obs=False, gamma=1.0, **kwargs
        )

    env = envs()
    model = agent(env, gamma=1.0)
    assert model.get_vec_normalize_env() is env
    shown: list[Any] = []
    original: list[Any] = []

    def callback(local: dict[str, Any], _: dict[str, Any]) -> bool:
        shown.append(local["rewards"].copy())
        original.append(env.get_original_reward().copy())
        return True

    checkpoint = CheckpointCallback(N_STEPS, str(tmp_path), "agent", save_vecnormalize=True)
    evaluation = EvalCallback(
        eval_env := envs(training=False, norm_reward=False), eval_freq=N_STEPS, verbose=0
    )
    model.learn(ITERATION, [checkpoint, evaluation, count_callback(callback)])
    assert np.abs(np.stack(shown) - np.stack(original)).max() > 1e-3
    assert np.allclose(model.rollout_buffer.rewards, np.stack(shown), atol=1e-6)
    assert eval_env.ret_rms.var == env.ret_rms.var != 1.0
    saved = tmp_path / f"agent_vecnormalize_{ITERATION}_steps.pkl"
    again = VecNormalize.load(str(saved), envs().venv)
    assert again.ret_rms.var == env.ret_rms.var
    loaded = PPO.load(tmp_path / f"agent_{ITERATION}_steps", env=again)
    assert loaded.get_vec_normalize_env() is again
    loaded.learn(ITERATION)
    assert again.ret_rms.count > env.ret_rms.count


def test_tokens_are_no_numbers_to_normalize_or_stack() -> None:
    envs = VecMonitor(vec_env(num_envs=NUM_ENVS, **SETTINGS))
    for make in (lambda: agent(VecNormalize(envs)), lambda: agent().set_env(VecNormalize(envs))):
        with pytest.raises(ValueError, match="norm_obs=False"):
            make()
    with pytest.raises(ValueError, match="prompt_length"):
        agent(VecFrameStack(envs, 2))


def test_target_kl_ends_the_epochs_of_an_update() -> None:
    for target_kl, expected in ((float("inf"), 8), (1e9, 8), (1e-9, 2)):
        model = agent(target_kl=target_kl, n_epochs=4, learning_rate=1e-2).learn(2 * ITERATION)
        assert model._n_updates == expected
