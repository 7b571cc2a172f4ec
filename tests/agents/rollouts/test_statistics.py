from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger

from agents.rollouts.statistics import (
    TurnMetrics,
    add_turn,
    episode_sums,
    peak_memory,
    record_turns,
)
from tests.agents.agents import ITERATION, NUM_ENVS, collect, make_agent, shake, train
from tests.agents.oracle import Diary
from tests.textenvs.toys import finished
from textenvs.task import Transcript


def test_turns_of_the_rollout_are_what_is_logged() -> None:
    transcripts: list[Transcript] = []
    terms: list[dict[str, float]] = []

    def keep(rollout: dict[str, Any]) -> None:
        for info in rollout["infos"]:
            if "transcript" in info:
                transcripts.append(info["transcript"])
                terms.append(info["reward_terms"])

    model = make_agent("several turns", stats_window_size=7)
    collect(model, keep)
    model.dump_logs(1)
    assert len(transcripts) > 10 and {t.stopped for t in transcripts} == {True, False}
    assert not all(t.final for t in transcripts)
    record_turns(model.turn_metrics, model.logger)
    log = model.logger.name_to_value
    last = transcripts[-7:]
    lengths = np.mean([t.response_tokens for t in last])
    assert log["rollout/response_length"] == pytest.approx(lengths)
    assert log["rollout/eos_rate"] == pytest.approx(np.mean([t.stopped for t in last]))
    for name in ("task", "length_penalty"):
        assert log[f"reward/{name}"] == pytest.approx(np.mean([t[name] for t in terms[-7:]]))


def test_turns_and_terms_one_by_one() -> None:
    logger = Logger(None, [])
    metrics: TurnMetrics = {}
    record_turns(metrics, logger)
    assert not logger.name_to_value  # nothing to say yet
    add_turn(metrics, {"transcript": "another environment's", "reward_terms": {"other": 5.0}}, 2)
    for tokens, terms in ((9, {"a": 9.0}), (2, {"a": 1.0, "b": 4.0}), (4, {"a": 2.0})):
        info = {"transcript": finished("so", tokens=tokens), "reward_terms": terms}
        if tokens == 4:  # What is observed need not be there for each turn.
            info["observed"] = {"well_formed": 1.0}
        add_turn(metrics, info, 2)
        add_turn(metrics, {}, 2)
    record_turns(metrics, logger)
    assert dict(logger.name_to_value) == {
        "rollout/response_length": 3.0,
        "rollout/eos_rate": 1.0,
        "reward/a": 1.5,
        "reward/b": 4.0,
        "rollout/well_formed": 1.0,
    }


def test_observed_terms_are_logged_and_not_learned_from() -> None:
    observed: list[dict[str, float]] = []

    def keep(rollout: dict[str, Any]) -> None:
        observed.extend(info["observed"] for info in rollout["infos"] if "observed" in info)

    models = []
    for observe in (None, ["repetition_penalty", "chrf"]):
        models.append(make_agent(env={"observe": observe}))
        collect(models[-1], keep)
    plain, watched = (model.rollout_buffer for model in models)
    assert np.array_equal(plain.actions, watched.actions)
    assert np.array_equal(plain.rewards, watched.rewards)
    record_turns(models[1].turn_metrics, models[1].logger)
    log = models[1].logger.name_to_value
    last = [own for own in observed if "chrf" in own]
    assert len(last) > 5
    for name in ("repetition_penalty", "chrf", "well_formed"):
        assert log[f"rollout/{name}"] == pytest.approx(np.mean([own[name] for own in last]))
    assert "reward/chrf" not in log and "rollout/well_formed" in models[0].turn_metrics


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_episodes_over_the_borders_of_rollouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sums = np.zeros(3)
    ends = np.ones(3, dtype=bool)
    running, found, expected = [0.0] * 3, [], []
    for _ in range(4):
        values = rng.normal(size=(5, 3))
        starts, all_ends = np.zeros((2, 5, 3), dtype=bool)
        for step in range(5):
            starts[step] = ends
            all_ends[step] = ends = rng.random(3) < 0.25
            for slot in range(3):
                running[slot] += values[step, slot]
                if ends[slot]:
                    expected.append(running[slot])
                    running[slot] = 0.0
        found += episode_sums(sums, values, starts, all_ends)
    assert len(expected) > 8 and found == pytest.approx(expected)


def test_an_episode_that_was_never_finished_is_forgotten() -> None:
    sums, never, start = np.zeros(1), np.array([[False]]), np.array([[True]])
    assert episode_sums(sums, np.array([[5.0]]), start, never) == []
    # A new `learn` resets the environment.
    assert episode_sums(sums, np.array([[2.0]]), start, ~never) == [2.0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_kl_figures(estimator: Any, kl_in: Any) -> None:
    model = make_agent(kl_coef=0.1, kl_estimator=estimator, kl_in=kl_in)
    model.set_reference()
    shake(model.policy)
    expected: list[float] = []
    running = [0.0] * NUM_ENVS
    for fresh in (True, False):
        diary = Diary()
        collect(model, diary, fresh)
        assert all(token.starts for token in diary.tokens[:NUM_ENVS]) == fresh
        buffer, log = model.rollout_buffer, model.logger.name_to_value
        log_ratio = (buffer.ref_log_probs - buffer.log_probs).astype(float)
        kl = -log_ratio if estimator == "k1" else np.exp(log_ratio) - 1 - log_ratio
        finished_now = []
        for token in diary.tokens:
            running[token.slot] = (0.0 if token.starts else running[token.slot]) + kl[
                token.step, token.slot
            ]
            if token.ends:
                finished_now.append(running[token.slot])
        assert log["kl/per_token"] == pytest.approx(kl.mean(), 1e-4)
        assert log["kl/per_episode"] == pytest.approx(np.mean(finished_now), 1e-4)
        assert log["kl/coef"] == 0.1
        expected += finished_now
    assert len(expected) > NUM_ENVS


def test_rollout_without_an_end_has_no_kl_by_episode() -> None:
    model = collect(
        make_agent(env={"max_new_tokens": 60}, policy={"allowed_tokens": [5, 6]}, kl_coef=0.1)
    )
    assert "kl/per_episode" not in model.logger.name_to_value
    assert "kl/per_token" in model.logger.name_to_value


def test_first_ratio_is_logged_before_any_step() -> None:
    model = collect(make_agent(learning_rate=0.05, n_epochs=3))
    assert 0 <= train(model).log["train/first_ratio_error"] < 1e-5
    collect(model)
    shake(model.policy)
    samples = model.rollout_buffer.samples(model.rollout_buffer.sequences)
    with th.no_grad():
        log_probs = model.policy.evaluate_actions(samples.observations, samples.actions)[1]
    worst = float(((log_probs - samples.old_log_prob).exp() - 1).abs().max())
    model.batch_size = ITERATION
    for size in (None, 5):
        model.micro_batch_size = size
        model.learning_rate = model.lr_schedule = lambda _: 0.0
        assert train(model).log["train/first_ratio_error"] == pytest.approx(worst, 1e-3)


def test_speed_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_agent()
    now = iter([100.0, 102.0, 200.0, 200.5])
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    for module in ("base", "recording"):
        monkeypatch.setattr(f"agents.algorithms.{module}.time", clock)
    log = train(collect(model)).log
    # Less what callbacks took before.
    assert log["time/rollout_tokens_per_second"] == pytest.approx(ITERATION / 2, rel=0.1)
    assert log["time/update_tokens_per_second"] == ITERATION / 0.5
    assert 50 < log["time/peak_memory_mib"] < 100_000
    before = peak_memory(th.device("cpu"))
    assert before is not None
    block = np.ones(2**26 // 8)
    after = peak_memory(th.device("cpu"))
    assert block.all() and after is not None and after >= before


def test_everything_is_logged_under_its_name() -> None:
    model = make_agent(kl_coef=0.1, clip_range_vf=0.2).learn(2 * ITERATION, log_interval=1000)
    record_turns(model.turn_metrics, model.logger)
    assert {
        *("rollout/well_formed",),
        *("rollout/response_length", "rollout/eos_rate", "reward/task", "reward/length_penalty"),
        *("kl/per_token", "kl/per_episode", "kl/coef"),
        *(
            "train/first_ratio_error",
            "train/first_ratio_off",
            "train/grad_norm",
            "train/approx_kl",
            "train/clip_fraction",
        ),
        *("train/entropy_loss", "train/policy_gradient_loss", "train/value_loss", "train/loss"),
        *("train/explained_variance", "train/n_updates", "train/clip_range"),
        *("train/clip_range_vf", "train/learning_rate"),
        *("time/rollout_tokens_per_second", "time/update_tokens_per_second"),
        "time/peak_memory_mib",
    } == set(model.logger.name_to_value)
