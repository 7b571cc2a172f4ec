"""Slow rewards are scored while a rollout goes on, and the run is the one that waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3.common import callbacks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor, VecNormalize

from agents import PPO, GymnasiumVecEnv, SequenceRolloutBuffer, evaluate_split
from agents.algorithms.resume import is_in_step
from tests.agents.agents import (
    ITERATION,
    N_STEPS,
    NUM_ENVS,
    collect,
    make_agent,
    same,
    weights,
)
from tests.agents.helpers import FEW, gpt2
from tests.textenvs.toys import Chat
from textenvs import CallableReward, Example, Task, Transcript
from textenvs.envs.vector_env import TextVectorEnv
from textenvs.wrappers.vector import AddReward

# A failure must not hang.
BARRIER_TIMEOUT = 60.0


class Judge:
    """A score with many digits; keeps which batches it saw, and in which threads."""

    __name__ = "judge"

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.before = before
        self.sizes: list[int] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, transcripts: Sequence[Transcript]) -> list[float]:
        self.sizes.append(len(transcripts))
        self.threads.add(threading.current_thread())
        self.before()
        return [score(transcript) for transcript in transcripts]

    @property
    def waited_for(self) -> bool:
        """Whether every call was made by the step itself."""
        return self.threads == {threading.main_thread()}


def score(transcript: Transcript) -> float:
    return 0.1 + len(transcript.response) / 7 + transcript.response_tokens / 3


def module_judge(transcripts: Sequence[Transcript]) -> list[float]:
    return [score(transcript) for transcript in transcripts]


def term(judge: Any, slow: bool = True, every_turn: bool = True) -> CallableReward:
    return CallableReward(judge, "judge", 0.3, every_turn, slow)


def agent(
    kind: str = "one turn",
    judge: Any = None,
    slow: bool = True,
    env: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """An agent with a fast, a slow and another fast term, so that sums are rounded in between."""
    reward = [("task", 0.7), term(judge or Judge(), slow), "length_penalty"]
    return make_agent(kind, env={"reward": reward, **(env or {})}, **kwargs)


def content(model: Any) -> dict[str, Any]:
    """Everything that may not differ."""
    buffer, log = model.rollout_buffer, model.logger.name_to_value
    state = model.env.venv.env.get_state()
    return {
        "actions": buffer.actions.tolist(),
        "rewards": buffer.rewards.tolist(),
        "advantages": buffer.advantages.tolist(),
        "returns": buffer.returns.tolist(),
        "episodes": [(type(i["r"]), float(i["r"]), i["l"]) for i in model.ep_info_buffer],
        "running": model.env.episode_returns.tolist(),
        "successes": list(model.ep_success_buffer),
        "log": {k: v for k, v in log.items() if not k.startswith("time/")},
        "turns": {k: list(v) for k, v in model.turn_metrics.items()},
        "order": list(model.turn_metrics),
        "infos": {slot: list(i["reward_terms"].items()) for slot, i in state["infos"].items()},
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "short rollouts": {"n_steps": 5},
    "several turns": {"kind": "several turns"},
    "several turns, short rollouts": {"kind": "several turns", "n_steps": 5},
    "only the last turn": {"kind": "several turns", "every_turn": False},
    "truncated": {"kind": "several turns", "env": {"max_episode_steps": 11}},
    "truncated, short rollouts": {
        "kind": "several turns",
        "n_steps": 5,
        "env": {"max_episode_steps": 11},
    },
    "same step": {"env": {"autoreset_mode": "SameStep"}},
    "disabled": {"kind": "several turns", "env": {"autoreset_mode": "Disabled"}},
    "live arrays": {"env": {"copy": False}},
    "shaped": {"kl_coef": 0.1, "kl_target": 2.0, "whiten_rewards": True, "whole_episodes": True},
    "few figures": {"kind": "several turns", "stats_window_size": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_one_that_waits(case: str) -> None:
    settings = {"kind": "one turn", **CASES[case]}
    every_turn = settings.pop("every_turn", True)
    runs = []
    for slow in (False, True):
        judge = Judge()
        reward = [("task", 0.7), term(judge, slow, every_turn=every_turn), "length_penalty"]
        env = {"reward": reward, **settings.get("env", {})}
        model = make_agent(**{**settings, "env": env})
        model.learn(2 * ITERATION)
        assert judge.waited_for is not slow
        runs.append((weights(model.policy), content(model)))
        assert len(model.ep_info_buffer) > 2
    (expected, known), (found, late) = runs
    assert late == known and same(found, expected)


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_only_slow_terms(kind: str) -> None:
    runs = []
    for slow in (False, True):
        env = {"reward": term(Judge(), slow), "autoreset_mode": "SameStep"}
        runs.append(content(make_agent(kind, env=env).learn(2 * ITERATION)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_slow_observed_terms_do_not_stall_either(kind: str) -> None:
    runs = []
    for slow in (False, True):
        judge = Judge()
        env = {"observe": ["repetition_penalty", term(judge, slow)]}
        runs.append(content(make_agent(kind, env=env).learn(2 * ITERATION)))
        assert judge.waited_for is not slow
        assert runs[-1]["turns"]["rollout/judge"]
    assert runs[0] == runs[1]


class Long(Task):
    """More than a few characters are a success, which the score tells."""

    max_new_tokens = 8
    success_score = 5.0

    def examples(self, split: str) -> Sequence[Example]:
        return [Example("The food"), Example("Why")]

    def score(self, transcripts: Sequence[Transcript]) -> list[float]:
        assert (threading.current_thread() is threading.main_thread()) is not self.slow_score
        return [float(len(t.response)) for t in transcripts]


class SlowLong(Long):
    slow_score = True


def test_a_success_that_a_slow_score_tells_does_not_stall() -> None:
    runs = []
    for task in (Long, SlowLong):
        model = make_agent(env={"task": task, "reward": None}).learn(2 * ITERATION)
        runs.append(content(model))
        assert set(model.ep_success_buffer) == {True, False}
    assert runs[0] == runs[1]


class Watch(BaseCallback):
    """Keeps what callbacks are shown."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []
        self.at_once: list[list[str]] = []
        self.rollouts: list[Any] = []

    def _on_step(self) -> bool:
        ended = [info for info in self.locals["infos"] if "transcript" in info]
        self.infos.extend(ended)
        self.at_once.extend(list(info["reward_terms"]) for info in ended)
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        buffer = model.rollout_buffer
        episodes = [float(info["r"]) for info in model.ep_info_buffer]
        self.rollouts.append([buffer.rewards.tolist(), buffer.advantages.tolist(), episodes])


def test_what_callbacks_see() -> None:
    late, known = Watch(), Watch()
    agent("several turns").learn(2 * ITERATION, late)
    agent("several turns", slow=False).learn(2 * ITERATION, known)
    assert {tuple(names) for names in late.at_once} == {("task", "length_penalty")}
    assert late.rollouts == known.rollouts
    assert len(late.infos) == len(known.infos) > 10
    for ours, theirs in zip(late.infos, known.infos, strict=True):
        assert list(ours["reward_terms"].items()) == list(theirs["reward_terms"].items())
        assert ("episode" in ours) == ("episode" in theirs)
        if "episode" in ours:
            assert ours["episode"]["r"] == theirs["episode"]["r"]


def test_batches_are_large_and_the_same_each_time() -> None:
    # In the second one, scoring takes longer.
    quick, long, waiting = Judge(), Judge(lambda: time.sleep(0.02)), Judge()
    for judge in (quick, long, waiting):
        collect(agent(judge=judge, slow=judge is not waiting))
    assert quick.sizes == long.sizes
    assert set(quick.sizes[:-1]) == {NUM_ENVS} and quick.sizes[-1] <= NUM_ENVS
    assert sum(quick.sizes) == sum(waiting.sizes) and np.mean(waiting.sizes) < 2


def test_the_rollout_goes_on_meanwhile() -> None:
    """The first batch is not scored before the last step has been made."""
    over, seen = threading.Event(), []
    judge = Judge(lambda: seen.append(over.wait(BARRIER_TIMEOUT)))
    steps: list[Any] = []

    def count(_: Any) -> None:
        steps.append(bool(judge.sizes))
        if len(steps) == N_STEPS:
            over.set()

    collect(agent(judge=judge), count)
    assert len(seen) > 1 and all(seen)
    assert any(steps[:-1])  # It had begun by then.


def test_what_a_subclass_pays_besides_stays() -> None:
    class Paying(TextVectorEnv):
        def step(self, actions: Any) -> Any:
            observation, rewards, *rest = super().step(actions)
            return observation, rewards + 0.25, *rest

    runs = []
    for slow in (False, True):
        env = Paying(Chat(), NUM_ENVS, max_new_tokens=8, reward=["task", term(Judge(), slow)])
        policy: Any = {"model": gpt2(), "allowed_tokens": FEW}
        model = PPO("TransformerPolicy", env, n_steps=N_STEPS, policy_kwargs=policy, seed=0)
        runs.append(collect(model))
    known, late = runs
    np.testing.assert_allclose(late.rollout_buffer.rewards, known.rollout_buffer.rewards, rtol=1e-6)
    paid, expected = ([float(info["r"]) for info in run.ep_info_buffer or ()] for run in runs)
    np.testing.assert_allclose(paid, expected, rtol=1e-6)


def monitored(env: Any, **kwargs: Any) -> Any:
    return VecMonitor(GymnasiumVecEnv(env), **kwargs)


def native(reward: Any, **kwargs: Any) -> Any:
    return gym.make_vec(
        "TextGen-v0", num_envs=NUM_ENVS, max_new_tokens=8, reward=["task", *reward], **kwargs
    )


def singles(reward: Any, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 8, "reward": ["task", *reward]}
    return make_vec_env("TextGen-v0", NUM_ENVS, env_kwargs=settings, **kwargs)


def workers(reward: Any) -> Any:
    return singles(reward, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})


# Where somebody has read the rewards by the time that the scores would come.
WAITING: dict[str, Callable[[Any], Any]] = {
    "a Gymnasium wrapper": lambda r: gym.wrappers.vector.TransformReward(
        native(r), lambda rewards: rewards * 2
    ),
    "AddReward": lambda r: AddReward(native([]), r),
    "VecNormalize": lambda r: VecNormalize(monitored(native(r)), norm_obs=False, gamma=1.0),
    "two monitors": lambda r: VecMonitor(monitored(native(r))),
    "sync": lambda r: native(r, vectorization_mode="sync"),
    "DummyVecEnv": singles,
    "SubprocVecEnv": workers,
}


@pytest.mark.parametrize("case", WAITING)
def test_elsewhere_rewards_come_with_the_step(case: str) -> None:
    runs = []
    for slow in (False, True):
        shown = Watch()
        model: Any = PPO(
            "TransformerPolicy",
            WAITING[case]([term(module_judge, slow)]),
            n_steps=N_STEPS,
            batch_size=32,
            policy_kwargs={"model": gpt2(), "allowed_tokens": FEW},
            seed=0,
            device="cpu",
        )
        model.learn(2 * ITERATION, shown)
        model.env.close()
        assert shown.at_once and {tuple(names) for names in shown.at_once} == {("task", "judge")}
        runs.append((shown.rollouts, weights(model.policy)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])


def test_a_monitors_file_has_whole_returns(tmp_path: Path) -> None:
    judge = Judge()
    env = monitored(native([term(judge)]), filename=str(tmp_path / "log"))
    policy: Any = {"model": gpt2(), "allowed_tokens": FEW}
    model = PPO("TransformerPolicy", env, n_steps=N_STEPS, policy_kwargs=policy, seed=0)
    collect(model)
    lines = (tmp_path / "log.monitor.csv").read_text().splitlines()[2:]
    assert judge.waited_for and model.ep_info_buffer
    assert [float(line.split(",")[0]) for line in lines] == pytest.approx(
        [float(info["r"]) for info in model.ep_info_buffer]
    )


def test_other_agents_wait() -> None:
    judge = Judge()
    settings: Any = {"policy_kwargs": {"model": gpt2(), "allowed_tokens": FEW}, "n_steps": N_STEPS}
    single = gym.make("TextGen-v0", max_new_tokens=8, reward=term(judge))
    PPO("TransformerPolicy", single, batch_size=8, **settings).learn(N_STEPS)
    assert judge.waited_for
    model = stable_baselines3.PPO(
        agent().policy_class,
        monitored(native([term(judge)])),
        rollout_buffer_class=SequenceRolloutBuffer,
        batch_size=32,
        **settings,
    )
    model.learn(model.n_steps * NUM_ENVS)
    assert judge.waited_for


def assert_nothing_is_left(model: Any) -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]
    assert model.env.venv.env.engine.deferred_scorer is None


def assert_goes_on_rightly(model: Any) -> None:
    """The next rollouts have the rewards of their own turns, and the monitor their sums."""
    model.ep_info_buffer.clear()
    steps: list[Any] = []
    for fresh in (False, False, False):
        shown: list[Any] = []
        collect(model, lambda rollout: shown.append((rollout["infos"], rollout["dones"])), fresh)  # noqa: B023
        rewards = [[sum(i.get("reward_terms", {}).values()) for i in infos] for infos, _ in shown]
        np.testing.assert_allclose(model.rollout_buffer.rewards, rewards, rtol=1e-5)
        steps.extend(zip(rewards, [dones for _, dones in shown], strict=True))
    running, sums = np.zeros(NUM_ENVS), []
    for rewards, dones in steps:
        running += rewards
        sums.extend(running[dones].tolist())
        running[dones] = 0.0
    assert len(sums) > 5
    np.testing.assert_allclose([float(info["r"]) for info in model.ep_info_buffer], sums, rtol=1e-5)
    np.testing.assert_allclose(model.env.episode_returns, running, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
@pytest.mark.parametrize("at", [1, 5, N_STEPS])
@pytest.mark.parametrize("where", ["callback", "policy"])
def test_an_interrupt_leaves_nothing(kind: str, at: int, where: str) -> None:
    model = agent(kind)
    collect(model)
    calls = [0]

    def interrupt(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt

    act = model.policy.act

    def interrupted(observation: Any) -> Any:
        interrupt()
        return act(observation)

    if where == "policy":
        model.policy.act = interrupted
    with pytest.raises(KeyboardInterrupt):
        collect(model, interrupt if where == "callback" else None, fresh=False)
    model.policy.act = act
    assert_nothing_is_left(model)
    if at > 1:
        assert not is_in_step(model)
    elif where == "policy":
        assert is_in_step(model)  # Nothing had been done yet.
        return
    assert_goes_on_rightly(model)


def test_an_interrupt_does_not_wait_for_what_has_not_begun() -> None:
    begun, restore = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert restore.wait(BARRIER_TIMEOUT)

    judge = Judge(wait)
    model = agent(judge=judge)

    def interrupt(rollout: Any) -> None:
        if model.rollout_buffer.pos == N_STEPS - 1:
            assert begun.wait(BARRIER_TIMEOUT)
            threading.Timer(0.05, restore.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, interrupt)
    assert judge.sizes == [NUM_ENVS]  # Others were in line.
    assert_nothing_is_left(model)


@pytest.mark.parametrize("kind", ["one turn", "several turns"])
def test_a_callback_that_stops_midway(kind: str) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < N_STEPS + 17

    runs = []
    for slow in (False, True):
        model = agent(kind, slow=slow)
        model.learn(4 * ITERATION, Stop())
        assert_nothing_is_left(model)
        now = content(model)
        # The next episodes start anew, and with them the monitor's sums.
        now.pop("running")
        now.pop("infos")
        runs.append(now)
    assert runs[0] == runs[1]
    assert_goes_on_rightly(model)


def test_a_failing_term() -> None:
    def fail() -> None:
        if broken:
            raise KeyError("no model")

    broken = [True]
    errors = []
    for slow in (False, True):
        model = agent("several turns", Judge(fail), slow)
        with pytest.raises(ValueError, match="'judge' failed with KeyError: 'no model'") as error:
            model.learn(ITERATION)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert_nothing_is_left(model)
    assert not model.ep_info_buffer
    broken.clear()
    assert_goes_on_rightly(model)


def test_terms_run_under_no_special_mode() -> None:
    modes: list[tuple[bool, bool]] = []

    def look() -> None:
        modes.append((th.is_grad_enabled(), th.is_inference_mode_enabled()))

    for slow in (False, True):
        collect(agent(judge=Judge(look), slow=slow))
    assert set(modes) == {(True, False)}


def test_evaluating_within_a_rollout() -> None:
    runs = []
    for slow in (False, True):
        model = agent("several turns", slow=slow)
        seen: list[Any] = []

        def evaluate(_: Any, model: Any = model, seen: list[Any] = seen) -> None:
            if model.rollout_buffer.pos == 7:
                seen.append(evaluate_split(model, model.env, max_examples=3))

        collect(model, evaluate)
        runs.append((content(model), [episode.reward_terms for episode in seen[0].episodes]))
    assert runs[0] == runs[1]
    assert {tuple(terms) for terms in runs[0][1]} == {("task", "judge", "length_penalty")}


def test_saving_and_going_on(tmp_path: Path) -> None:
    """Between rollouts, exactly; in the middle of one, as always with new episodes."""
    runs: list[Any] = []
    for slow in (False, True):
        folder = tmp_path / str(slow)
        model = agent("several turns", slow=slow)
        model.learn(2 * ITERATION, callbacks.CheckpointCallback(N_STEPS + 9, str(folder)))
        model.save(tmp_path / "agent")
        model.learn(2 * ITERATION, reset_num_timesteps=False)
        again: Any = PPO.load(tmp_path / "agent", env=agent("several turns", slow=slow).env)
        again.learn(2 * ITERATION, reset_num_timesteps=False)
        runs.extend((content(one), weights(one.policy)) for one in (model, again))
        (midway,) = folder.iterdir()
        loaded = PPO.load(midway, env=again.env)
        assert loaded.resume_point is None
    for found, parameters in runs:
        assert found == runs[0][0] and same(parameters, runs[0][1])
