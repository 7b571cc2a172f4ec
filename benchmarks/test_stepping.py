"""One step of many environments, and of long responses."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest

import textenvs
from benchmarks.measuring import Comparison, Side
from benchmarks.workload import Shape, Words, word_tokenizer
from textenvs.envs.env import TextEnv
from textenvs.envs.vector_env import TextVectorEnv

PEER = "Gymnasium's `SyncVectorEnv` over the same single env"
# The mean length of a turn in tokens.
TURN = 48
STEPS = 96


def actions(env: Any, steps: int, ends: bool) -> npt.NDArray[np.int64]:
    """Return random tokens, (steps, num_envs), with an EOS now and then or with none."""
    space = env.single_action_space
    rng = np.random.default_rng(0)
    tokens = rng.integers(space.n, size=(steps, env.num_envs))
    tokens[tokens == space.eos_token_id] = (space.eos_token_id + 1) % space.n
    if ends:
        tokens[rng.random(tokens.shape) < 1 / TURN] = space.eos_token_id
    return tokens


def stepping(env: Any, steps: int, ends: bool = True) -> Side:
    """Return a side that steps an environment, past ends of turns or not; the unit is a token."""
    env.reset(seed=0)
    chosen = actions(env, steps, ends)

    def run() -> None:
        for row in chosen:
            env.step(row)

    return Side(run, chosen.size, lambda: None if ends else env.reset(seed=0))


@pytest.mark.benchmark(group="env stepping")
@pytest.mark.parametrize(
    ("env_id", "ends"), [("TextGen-v0", False), *((env_id, True) for env_id in textenvs.task_ids())]
)
def test_against_sync(compare: Comparison, env_id: str, ends: bool, small: bool) -> None:
    """Within turns a step only appends a token; at their ends text is decoded and scored."""
    slots, steps = (4, 8) if small else (256, STEPS)
    budget: dict[str, Any] = {} if ends else {"max_new_tokens": steps + 1}
    sides = {
        mode: stepping(gym.make_vec(env_id, slots, vectorization_mode=mode, **budget), steps, ends)
        for mode in ("vector_entry_point", "sync")
    }
    rates = compare.run(sides, 5)
    kind = f"turns of about {TURN} tokens and their rewards" if ends else "no turn ends"
    compare.row(
        rates,
        "vector_entry_point",
        "sync",
        f"env stepping, {slots} slots, {env_id}, {kind}",
        PEER,
        target=None if ends else 100,  # the rewards' libraries take the same time on both sides
    )


@pytest.mark.benchmark(group="env stepping")
def test_cheap_reward_against_sync(compare: Comparison, shape: Shape, small: bool) -> None:
    """All that belongs to the end of a turn, and a reward that takes next to nothing."""
    slots, steps = (4, 8) if small else (256, STEPS)
    task, tokenizer = Words(shape), word_tokenizer(shape.vocabulary)
    sides = {
        "vector": stepping(TextVectorEnv(task, slots, tokenizer), steps),
        "sync": stepping(
            gym.vector.SyncVectorEnv([lambda: TextEnv(task, tokenizer) for _ in range(slots)]),
            steps,
        ),
    }
    what = f"env stepping, {slots} slots, turns of about {TURN // 2} tokens, a cheap reward"
    compare.row(compare.run(sides, 5), "vector", "sync", what, PEER, target=10)


@pytest.mark.benchmark(group="env stepping")
@pytest.mark.parametrize("slots", [1, 256])
def test_long_response(compare: Comparison, slots: int, small: bool) -> None:
    long, short, steps = (40, 10, 5) if small else (1000, 10, 50)
    env: Any = gym.make_vec("TextGen-v0", slots, max_new_tokens=long + steps + 1)
    tokens = actions(env, 1, ends=False)[0]
    env.reset(seed=0)
    states = {}
    for length in range(long + 1):
        if length in (short, long):
            states[length] = env.unwrapped.get_state()
        env.step(tokens)

    def side(length: int) -> Side:
        def run() -> None:
            for _ in range(steps):
                env.step(tokens)

        return Side(run, steps * slots, lambda: env.unwrapped.set_state(states[length]))

    rates = compare.run({"short": side(short), "long": side(long)})
    cost = {name: [1e6 * slots / rate for rate in values] for name, values in rates.items()}
    compare.row(
        cost,
        "long",
        "short",
        f"cost of an env step at response length {long:,}, {slots} slots",
        f"the same at length {short}",
        target=1.2,
        bound="most",
        unit="us",
    )
