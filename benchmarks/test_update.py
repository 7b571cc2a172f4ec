"""Updates: against SB3's PPO with the same transformer, and against a floor; their memory."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from agents.rollouts.buffer import SequenceRolloutBuffer
from benchmarks.measuring import Comparison, Row
from benchmarks.peers import bare_training, sb3_agent
from benchmarks.update_memory import VOCABULARY, measure
from benchmarks.workload import EVERY_OPTION, Shape, agent, rollout, update

FLOOR = "bare forward + backward + optimizer step on the same tokens, packed"


@pytest.mark.benchmark(group="update")
def test_equal_lengths(compare: Comparison, shape: Shape) -> None:
    ours = agent(shape)
    sides = {
        "plain": update(ours),
        "fast": update(agent(shape, policy_kwargs=EVERY_OPTION)),
        # A sample costs the same whatever the length of its response.
        "sb3": update(sb3_agent(shape, max(2, shape.response // 12))),
        "floor": bare_training(ours),
    }
    rates = compare.run(sides)
    tokens = shape.slots * shape.response
    what = f"update, {tokens} tokens in one minibatch"
    sb3 = "SB3's PPO with the same transformer as features extractor"
    compare.row(rates, "plain", "sb3", what, sb3, target=40)
    compare.row(rates, "plain", "floor", what, FLOOR, target=1.0)
    compare.row(rates, "fast", "floor", f"{what}, with every option", f"{FLOOR}, fp32")


@pytest.mark.benchmark(group="update")
def test_spread_lengths(compare: Comparison, shape: Shape) -> None:
    low, high = shape.lengths
    batch = shape.slots * shape.response
    ours = agent(shape, lengths=shape.lengths, n_steps=high, batch_size=batch)
    rates = compare.run({"plain": update(ours), "floor": bare_training(ours)}, 5)
    what = f"update, lengths spread {low} to {high}, minibatches of {batch} tokens"
    compare.row(rates, "plain", "floor", what, FLOOR, target=0.9)


def test_buffer(rows: list[Row], shape: Shape) -> None:
    model = agent(shape)
    rollout(model).run()
    buffer = model.rollout_buffer
    assert isinstance(buffer, SequenceRolloutBuffer)
    prompts = sum(s.context.nbytes for q in buffer.sequences for s in q.segments)
    stored = buffer.nbytes() - prompts
    tokens = model.n_steps * model.n_envs
    what = "rollout buffer, besides each prompt once"
    rows.append(Row(what, "", (stored / tokens,), 64, "most", "bytes a token"))


def test_peak_memory(rows: list[Row], small: bool) -> None:
    sizes = (64, 128) if small else (512, 2048)
    peaks = []
    for tokens in sizes:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # each in a fresh process
            peaks.append(pool.submit(measure, tokens, True).result())
    few, many = peaks
    logits = (sizes[1] - sizes[0]) * VOCABULARY * 4 / 2**20
    rows.append(
        Row(
            f"growth of an update's peak memory from {sizes[0]} to {sizes[1]} tokens, "
            f"vocabulary {VOCABULARY:,}",
            "one fp32 array of tokens x vocabulary",
            ((many - few) / logits,),
            0.5,
            "most",
            "MiB",
            many - few,
            logits,
        )
    )
