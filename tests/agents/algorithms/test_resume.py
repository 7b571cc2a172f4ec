"""An interrupted run, gone on with in a new process, is the uninterrupted one bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
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
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor, VecNormalize
from transformers import AutoModelForCausalLM

import textenvs  # noqa: F401 (registers the ids)
from agents import PPO, CheckpointCallback, GymnasiumVecEnv
from agents.rng import get_rng_state
from tests.agents.helpers import llama

ROOT = Path(__file__).parents[3]
SLOTS, STEPS = 4, 8
ROLLOUT = SLOTS * STEPS
SHORT: dict[str, Any] = {"max_new_tokens": 6}
KL: dict[str, Any] = {"kl_coef": 0.1, "kl_target": 2.0}


def native(env_id: str = "TextGen-v0", **kwargs: Any) -> Any:
    return gym.make_vec(env_id, num_envs=SLOTS, **{**SHORT, **kwargs})


def normalized() -> Any:
    return VecNormalize(VecMonitor(GymnasiumVecEnv(native())), norm_obs=False, gamma=1.0)


def singles(**kwargs: Any) -> Any:
    return make_vec_env("TextGen-v0", n_envs=SLOTS, env_kwargs=SHORT, **kwargs)


def workers() -> Any:
    return singles(vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})


# What to train on, and how.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "TextGen-v0": (native, KL),
    "Dialogue-v0": (lambda: native("Dialogue-v0"), KL),
    "VecNormalize": (normalized, {}),
    "DummyVecEnv": (singles, {"kl_coef": 0.1}),
    "SubprocVecEnv": (workers, {}),
}
PLACES = ("rollout", "update", "checkpoint")
KILLED = [*(("TextGen-v0", place) for place in PLACES), ("Dialogue-v0", "rollout")]
TOTAL = 4 * ROLLOUT


def agent(case: str, **kwargs: Any) -> PPO:
    make, settings = CASES[case]
    return PPO(
        "TransformerPolicy",
        make(),
        policy_kwargs={"model": llama()},
        **{"learning_rate": 1e-3, "n_epochs": 2, "target_kl": 1e9, **settings, **kwargs},
        n_steps=STEPS,
        batch_size=16,
        seed=3,
        device="cpu",
    )


def decaying(env_id: str) -> PPO:
    return agent(
        env_id, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), clip_range=LinearSchedule(0.3, 0.1, 1)
    )


def content(model: PPO) -> dict[str, Any]:
    """Everything that may not differ, a rollout and an update later included."""
    found: dict[str, Any] = {}
    for moment in ("now", "then"):
        digest = hashlib.sha256()
        for part in (model.policy.state_dict(), optimizer_state(model)):
            for value in part.values():
                digest.update(value.numpy().tobytes())
        found[moment] = {
            "weights and optimizer": digest.hexdigest(),
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "kl_coef": model.kl_coef,
            "returns": [float(info["r"]) for info in model.ep_info_buffer or ()],
            "rates": [group["lr"] for group in model.policy.optimizer.param_groups],
        }
        if moment == "now":
            model.learn(ROLLOUT, reset_num_timesteps=False)
            found["tokens"] = model.rollout_buffer.actions.tolist()
            found["rewards"] = model.rollout_buffer.rewards.tolist()
    assert model.env is not None
    model.env.close()
    return found


def optimizer_state(model: PPO) -> dict[str, th.Tensor]:
    state = model.policy.optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, own in state.items() for name, value in own.items()}


def restore(folder: str) -> None:
    """Go on with everything in a folder, in this new process, and say what came of it."""
    th.set_num_threads(1)
    found = {}
    for case, (make, _) in CASES.items():
        model = PPO.load(Path(folder) / case, env=make(), device="cpu")
        model.learn(2 * ROLLOUT, reset_num_timesteps=False)
        found[case] = content(model)
    for env_id, place in KILLED:
        path = Path(folder) / f"{env_id} {place}.zip"
        model = PPO.load(path, env=native(env_id), device="cpu")
        start = model.num_timesteps
        model.learn(TOTAL - start, reset_num_timesteps=False)
        found[path.stem] = {"start": start, **content(model)}
    sys.stdout.write("\n" + json.dumps(found))


class Kill(BaseCallback):
    """Ends the process somewhere in the third iteration, or in the second checkpoint."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.updates = 0

    def _on_training_start(self) -> None:
        if self.place == "update":
            self.model.policy.optimizer.register_step_post_hook(self.count)
        elif self.place == "checkpoint":
            save, self.saved = th.save, 0

            def half(item: Any, file: Any) -> None:
                self.saved += 1
                if self.saved == 6:  # four parts a checkpoint
                    file.write(b"half")
                    kill()
                save(item, file)

            th.save = half  # type: ignore[assignment]

    def count(self, *_: Any) -> None:
        self.updates += 1
        if self.updates == 10:  # four in each update
            kill()

    def _on_step(self) -> bool:
        if self.place == "rollout" and self.n_calls == 2 * STEPS + 5:
            kill()
        return True


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(env_id: str, place: str, folder: Path) -> None:
    saving = CheckpointCallback(STEPS, str(folder), f"{env_id} {place}", replace=True)
    decaying(env_id).learn(TOTAL, callback=[saving, Kill(place)])


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of all the interrupted runs."""
    folder = tmp_path_factory.mktemp("interrupted")
    for case in CASES:
        model = agent(case)
        model.learn(2 * ROLLOUT)
        model.save(folder / case)
        assert model.env is not None
        model.env.close()
    for env_id, place in KILLED:
        process = get_context("fork").Process(
            target=train_until_killed, args=(env_id, place, folder)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    # Killed while it wrote the second one.
    assert len(list(folder.glob(".*.tmp.zip"))) == 1
    code = f"from tests.agents.algorithms.test_resume import restore; restore({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "goes on with new episodes" not in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_constant_schedules(case: str, gone_on: dict[str, Any]) -> None:
    model = agent(case)
    model.learn(4 * ROLLOUT)
    assert gone_on[case] == content(model)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    found = {}
    for env_id in {env_id for env_id, _ in KILLED}:
        model = decaying(env_id)
        model.learn(TOTAL)
        found[env_id] = content(model)
    return found


@pytest.mark.parametrize(("env_id", "place"), KILLED)
def test_killed_with_decaying_schedules(
    env_id: str, place: str, gone_on: dict[str, Any], uninterrupted: dict[str, Any]
) -> None:
    found = dict(gone_on[f"{env_id} {place}"])
    assert found.pop("start") == (1 if place == "checkpoint" else 2) * ROLLOUT
    assert found == uninterrupted[env_id]


def test_saving_disturbs_nothing(tmp_path: Path) -> None:
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            before = get_rng_state()
            model.save(tmp_path / "in a rollout")
            after = get_rng_state()
            np.testing.assert_equal(before, after)
            return True

    model = agent("TextGen-v0")
    model.learn(2 * ROLLOUT, callback=Save())
    assert model.resume_point is None
    saved = content(model)
    model = agent("TextGen-v0")
    model.learn(2 * ROLLOUT)
    assert content(model) == saved


def test_saved_in_a_rollout(tmp_path: Path) -> None:
    model = agent("TextGen-v0")
    saving = callbacks.CheckpointCallback(STEPS + 3, str(tmp_path))
    model.learn(2 * ROLLOUT, callback=saving)
    (path,) = tmp_path.iterdir()
    loaded = PPO.load(path, env=native(), device="cpu")
    assert loaded.resume_point is None and loaded.num_timesteps == (STEPS + 3) * SLOTS
    loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert loaded.rollout_buffer.episode_starts[0].all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PPO, Path]:
    """An agent whose episodes are under way, and its file."""
    path = tmp_path_factory.mktemp("saved") / "agent.zip"
    model = agent("TextGen-v0")
    model.learn(ROLLOUT)
    model.save(path)
    assert model._last_episode_starts is not None and not model._last_episode_starts.all()
    return model, path


def starts(model: PPO) -> Any:
    return model.rollout_buffer.episode_starts[0].tolist()


def test_other_ways_to_load(saved: tuple[PPO, Path], tmp_path: Path) -> None:
    model, path = saved
    expected = np.asarray(model._last_episode_starts).tolist()
    later = PPO.load(path, device="cpu")
    later.set_env(native())
    kept = PPO.load(path, env=native(), device="cpu", force_reset=False)
    PPO.load(path, env=native(), device="cpu").save(tmp_path / "copy")
    copied = PPO.load(tmp_path / "copy", env=native(), device="cpu")
    PPO.load(path, device="cpu").save(tmp_path / "without")
    without = PPO.load(tmp_path / "without", env=native(), device="cpu")
    tokens = []
    for other in (later, kept, copied, without):
        other.learn(ROLLOUT, reset_num_timesteps=False)
        assert starts(other) == expected
        tokens.append(other.rollout_buffer.actions.tolist())
    assert all(row == tokens[0] for row in tokens)
    afresh = PPO.load(path, env=native(), device="cpu")
    afresh.learn(ROLLOUT)
    assert afresh.num_timesteps == ROLLOUT and all(starts(afresh))


def test_other_environments(saved: tuple[PPO, Path]) -> None:
    _, path = saved
    message = "goes on with new episodes.*expected examples="
    with pytest.warns(UserWarning, match=message):
        other = PPO.load(path, env=native(split="train[:50%]", max_prompt_tokens=prompt_tokens()))
        other.learn(ROLLOUT, reset_num_timesteps=False)
    assert all(starts(other)) and other.num_timesteps == 2 * ROLLOUT
    env: Any = gym.make_vec("TextGen-v0", num_envs=2, **SHORT)
    with pytest.warns(UserWarning, match="expected num_envs=2, got num_envs=4"):
        PPO.load(path, env=env, device="cpu").learn(ROLLOUT, reset_num_timesteps=False)


def prompt_tokens() -> int:
    return int(native().single_observation_space["prompt"].shape[0])


def test_closed_environments_do_not_hinder_saving(tmp_path: Path) -> None:
    model = agent("SubprocVecEnv")
    model.learn(ROLLOUT)
    assert model.env is not None
    model.env.close()
    model.save(tmp_path / "agent")
    assert PPO.load(tmp_path / "agent", device="cpu").num_timesteps == ROLLOUT


def test_other_policies_are_saved_as_sb3_does(tmp_path: Path) -> None:
    files = []
    for algorithm in (PPO, stable_baselines3.PPO):
        model = algorithm("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, seed=0)
        model.learn(64)
        model.save(tmp_path / algorithm.__module__)
        loaded = algorithm.load(tmp_path / algorithm.__module__, env=model.get_env())
        loaded.learn(64, reset_num_timesteps=False)
        files.append(loaded.policy.state_dict())
        assert vars(loaded).get("resume_point") is None
    assert all(th.equal(files[0][name], files[1][name]) for name in files[1])


def test_the_log_goes_on(saved: tuple[PPO, Path]) -> None:
    model, path = saved
    loaded = PPO.load(path, env=native(), device="cpu")
    loaded.learn(0, reset_num_timesteps=False)
    assert "train/loss" in loaded.logger.name_to_value
    assert loaded.logger.name_to_value == model.logger.name_to_value


def test_action_spaces_own_generator(tmp_path: Path) -> None:
    model = agent("TextGen-v0")
    model.learn(ROLLOUT)
    model.action_space.sample()
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", env=native(), device="cpu")
    loaded.learn(0, reset_num_timesteps=False)
    assert [loaded.action_space.sample() for _ in range(5)] == [
        model.action_space.sample() for _ in range(5)
    ]


@pytest.mark.parametrize("replace", [False, True])
def test_checkpoints(replace: bool, tmp_path: Path) -> None:
    model = agent("VecNormalize")
    kwargs: Any = {"save_vecnormalize": True, "replace": replace}
    saving = CheckpointCallback(STEPS + 1, str(tmp_path / "deep"), "run", **kwargs)
    model.learn(5 * ROLLOUT, callback=saving)
    names = {path.name for path in (tmp_path / "deep").iterdir()}
    if replace:
        assert names == {"run.zip", "run_vecnormalize.pkl"}
    else:
        # The first rollout that starts STEPS + 1 steps or more after the last, and the end.
        steps = [2 * ROLLOUT, 4 * ROLLOUT, 5 * ROLLOUT]
        agents = {f"run_{n}_steps.zip" for n in steps}
        assert names == agents | {f"run_vecnormalize_{n}_steps.pkl" for n in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(0, callback=saving, reset_num_timesteps=False)  # nothing new to save


def test_checkpoints_of_another_algorithm(tmp_path: Path) -> None:
    model = stable_baselines3.DQN("MlpPolicy", "CartPole-v1", buffer_size=100, learning_starts=10)
    model.learn(64, callback=CheckpointCallback(20, str(tmp_path), save_replay_buffer=True))
    assert len(list(tmp_path.glob("*.zip"))) == len(list(tmp_path.glob("*buffer*.pkl"))) == 4
    with pytest.raises(ValueError, match="save_freq must be at least 1"):
        CheckpointCallback(0, str(tmp_path))


def test_a_seed_set_after_loading_counts(tmp_path: Path) -> None:
    agent("TextGen-v0").learn(ROLLOUT).save(tmp_path / "agent")
    tokens = []
    for seed in (1, 2, 1):
        loaded = PPO.load(tmp_path / "agent", env=native(), device="cpu")
        loaded.set_random_seed(seed)
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
        tokens.append(loaded.rollout_buffer.actions.copy())
    assert np.array_equal(tokens[0], tokens[2]) and not np.array_equal(tokens[0], tokens[1])


class Stop(BaseCallback):
    """Ends a rollout in the middle, politely or not."""

    def __init__(self, at: int, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.at, self.error = at, error

    def _on_step(self) -> bool:
        if self.n_calls == self.at and self.error:
            raise self.error
        return self.n_calls != self.at


def stopped(model: PPO) -> None:
    model.learn(4 * ROLLOUT, Stop(5))


def interrupted(model: PPO) -> None:
    with pytest.raises(KeyboardInterrupt):
        model.learn(4 * ROLLOUT, Stop(5, KeyboardInterrupt))


def stepped_by_others(model: PPO) -> None:
    model.learn(ROLLOUT)
    assert model.env is not None
    model.env.step(np.full(SLOTS, 305))


@pytest.mark.parametrize("disturb", [stopped, interrupted, stepped_by_others])
def test_rollouts_start_where_the_environments_are(disturb: Callable[[PPO], None]) -> None:
    model = agent("TextGen-v0")
    disturb(model)
    model.learn(ROLLOUT, reset_num_timesteps=False)
    # Had the policy been shown other tokens than the environments hold, the ratio would tell.
    assert model.logger.name_to_value["train/first_ratio_error"] < 1e-5


class SaveAtRolloutEnd(BaseCallback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.model.save(self.path)


def test_what_an_update_is_still_to_learn_from_is_not_gone_on_from(tmp_path: Path) -> None:
    agent("TextGen-v0").learn(ROLLOUT, SaveAtRolloutEnd(tmp_path / "agent"))
    assert PPO.load(tmp_path / "agent", env=native(), device="cpu").resume_point is None


def test_another_seed_ends_the_run(tmp_path: Path) -> None:
    agent("TextGen-v0").learn(ROLLOUT).save(tmp_path / "agent")
    assert PPO.load(tmp_path / "agent", device="cpu").resume_point is not None
    assert PPO.load(tmp_path / "agent", device="cpu", seed=7).resume_point is None


def test_learning_without_an_environment_loses_nothing(tmp_path: Path) -> None:
    agent("TextGen-v0").learn(ROLLOUT).save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", device="cpu")
    with pytest.raises(ValueError, match="call set_env first"):
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert loaded.resume_point is not None


def test_loading_with_another_reference(tmp_path: Path) -> None:
    agent("TextGen-v0").learn(ROLLOUT).save(tmp_path / "agent")
    model = agent("VecNormalize")
    model.policy.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    other = str(tmp_path / "model")
    loaded = PPO.load(tmp_path / "agent", device="cpu", ref_model=other)
    assert loaded.reference is not None
    expected = model.policy.backbone.state_dict()  # type: ignore[union-attr]
    for name, value in loaded.reference.state_dict().items():
        assert th.equal(value, expected[name])
    assert PPO.load(tmp_path / "agent", device="cpu", kl_coef=0.0, kl_target=None).reference is None
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1"):
        PPO.load(tmp_path / "agent", device="cpu", micro_batch_size=0)


def test_what_was_pretrained_is_so_after_loading(tmp_path: Path) -> None:
    model = agent("VecNormalize")
    model.policy.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    for given, pretrained in ((str(tmp_path / "model"), True), (llama(), False)):
        PPO("TransformerPolicy", native(), policy_kwargs={"model": given}).save(tmp_path / "agent")
        assert PPO.load(tmp_path / "agent").pretrained is pretrained


def test_a_model_from_a_folder_is_resumed_exactly(tmp_path: Path) -> None:
    """What a file holds may lie elsewhere in memory, by which products of one row are rounded."""
    config = llama(hidden_size=192, intermediate_size=700)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")

    def one() -> Any:
        return gym.make_vec("TextGen-v0", num_envs=1, **SHORT)

    def fresh() -> PPO:
        settings: dict[str, Any] = {"n_steps": STEPS, "batch_size": STEPS, "n_epochs": 1}
        policy = {"model": str(tmp_path / "model")}
        return PPO("TransformerPolicy", one(), policy_kwargs=policy, seed=0, **settings)

    whole = fresh().learn(2 * STEPS)
    fresh().learn(STEPS).save(tmp_path / "half")
    resumed = PPO.load(tmp_path / "half", env=one())
    resumed.learn(STEPS, reset_num_timesteps=False)
    for name, tensor in whole.policy.state_dict().items():
        assert th.equal(tensor, resumed.policy.state_dict()[name]), name
