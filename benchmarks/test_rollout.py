"""Rollouts: against SB3's PPO with the same transformer, and against `model.generate`."""

from __future__ import annotations

import pytest
import torch as th

from agents.rollouts.vec_env import engine_of
from benchmarks.measuring import Comparison, Row
from benchmarks.peers import generation, matrix_products, sb3_agent
from benchmarks.workload import EVERY_OPTION, Service, Shape, agent, rollout
from textenvs import CallableReward


@pytest.mark.benchmark(group="rollout")
def test_equal_lengths(compare: Comparison, shape: Shape) -> None:
    ours = agent(shape)
    fast = agent(shape, policy_kwargs=EVERY_OPTION)
    equal = (shape.response, shape.response)
    rates = compare.run(
        {
            "plain": rollout(ours),
            "fast": rollout(fast),
            # Its cost does not depend on how long the response is.
            "sb3": rollout(sb3_agent(shape, max(2, shape.response // 6))),
            "generate": generation(
                ours.policy.backbone.model,  # type: ignore[union-attr]
                engine_of(ours.env),
                shape.slots,
                equal,
            ),
            "products": matrix_products(ours),
        }
    )
    what = f"rollout, {shape.slots} slots, {shape.prompt} + {shape.response} tokens"
    options = ", ".join(f"{name}={value}" for name, value in EVERY_OPTION.items())
    sb3 = "SB3's PPO with the same transformer as features extractor"
    generate = "`model.generate`: same model, batch and sampling, fp32"
    compare.row(rates, "plain", "sb3", what, sb3, target=10)
    compare.row(rates, "plain", "generate", f"{what}, equal lengths, fp32", generate, target=1.3)
    compare.row(
        rates,
        "fast",
        "generate",
        f"{what}, with {options}",
        generate,
        target=2.5 if "autocast" in EVERY_OPTION else 2.0,
    )
    floor = "nothing but the matrix products of its decode steps, in plain fp32"
    compare.row(rates, "plain", "products", what, floor)
    compare.row(rates, "fast", "products", f"{what}, with {options}", floor)


@pytest.mark.benchmark(group="rollout")
def test_spread_lengths(compare: Comparison, shape: Shape) -> None:
    low, high = shape.lengths
    ours = agent(shape, lengths=shape.lengths, n_steps=high + high // 2)
    fast = agent(shape, lengths=shape.lengths, n_steps=high + high // 2, policy_kwargs=EVERY_OPTION)
    peer = generation(
        ours.policy.backbone.model,  # type: ignore[union-attr]
        engine_of(ours.env),
        shape.slots,
        shape.lengths,
        batches=3,
    )
    rates = compare.run({"plain": rollout(ours), "fast": rollout(fast), "generate": peer}, 5)
    what = f"rollout, lengths spread {low} to {high}"
    against = f"`model.generate` on requests of the same lengths, {shape.slots} at a time"
    compare.row(rates, "plain", "generate", f"{what}, fp32", against, target=2.0)
    compare.row(rates, "fast", "generate", f"{what}, with every option", against, target=2.8)


@pytest.mark.benchmark(group="rollout")
@pytest.mark.parametrize("spread", [False, True])
def test_encoder_decoder(compare: Comparison, shape: Shape, spread: bool) -> None:
    low, high = shape.lengths if spread else (shape.response, shape.response)
    steps = high + high // 2 if spread else shape.response
    ours, fast = (
        agent(
            shape,
            config=shape.t5_config(),
            lengths=(low, high),
            n_steps=steps,
            policy_kwargs=options,
        )
        for options in ({}, EVERY_OPTION)
    )
    peer = generation(
        ours.policy.backbone.model,  # type: ignore[union-attr]
        engine_of(ours.env),
        shape.slots,
        (low, high),
        batches=3 if spread else 1,
    )
    rates = compare.run({"plain": rollout(ours), "fast": rollout(fast), "generate": peer}, 5)
    what = f"rollout with a T5, {shape.slots} slots, {shape.prompt} + "
    what += f"{low} to {high} tokens" if spread else f"{high} tokens, equal lengths"
    against = "`model.generate` of the same model"
    compare.row(rates, "plain", "generate", f"{what}, fp32", against, target=1.3)
    compare.row(rates, "fast", "generate", f"{what}, with every option", against, target=1.3)


@pytest.mark.benchmark(group="rollout")
def test_slow_rewards(compare: Comparison, shape: Shape) -> None:
    low, high = shape.lengths
    sides = {
        name: rollout(
            agent(
                shape,
                lengths=shape.lengths,
                reward=CallableReward(Service(), slow=name == "slow"),
                n_steps=high + high // 2,
            )
        )
        for name in ("slow", "waiting")
    }
    rates = compare.run(sides, 5)
    what = f"rollout, lengths spread {low} to {high}, a slow reward of 10 ms a call and a response"
    compare.row(rates, "slow", "waiting", what, "the same, waiting for it at each end")


@pytest.mark.benchmark(group="rollout")
def test_gpu(rows: list[Row]) -> None:
    row = Row(
        "rollout on a GPU, GPT-2-small shape, batch 256, bf16",
        "`model.generate`",
        skipped="there is no GPU; `python -m benchmarks.gpu` measures it where there is one",
        target=5,
    )
    if not th.cuda.is_available():
        rows.append(row)
        pytest.skip(row.skipped)
    from benchmarks.gpu import Options, measure_rollout

    measured = measure_rollout("gpt2-small", 256, Options())
    rows.append(
        Row(
            row.what,
            row.against,
            tuple(measured["ratios"]),
            target=5,
            ours=measured["tokens_per_second"],
            theirs=measured["generate_tokens_per_second"],
        )
    )
