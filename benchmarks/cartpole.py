"""Is agents.PPO still PPO on SB3's own ground? CartPole, as a table.

    python -m benchmarks.cartpole --seeds 3

With the settings that rl-baselines3-zoo publishes, the mean return should reach the most there is,
500. With the default settings, the parameters should be stable-baselines3's to the last bit; if
they are not, the exit status is 1.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.learnability import machine

ENV = "CartPole-v1"
NUM_ENVS = 8
EVALUATION_SEED = 10_000
# rl-baselines3-zoo, hyperparams/ppo.yml; "lin_x" there is a rate that falls from x to 0.
PUBLISHED: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "ent_coef": 0.0,
    "learning_rate": lambda remaining: remaining * 0.001,
    "clip_range": lambda remaining: remaining * 0.2,
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    seeds: int = 3
    """How many seeds, from 0 on."""
    steps: int = 100_000
    """How long each seed trains with the published settings."""
    episodes: int = 20
    """How many episodes evaluate it."""
    compared_steps: int = 20_000
    """How long both implementations train with the default settings."""
    out: Path = Path("benchmarks/results/cartpole.md")
    """Where the tables go."""


def returns(seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """Train with the published settings; return what greedy episodes bring."""
    import numpy as np
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    from agents import PPO

    started = time.perf_counter()
    agent = PPO("MlpPolicy", make_vec_env(ENV, NUM_ENVS), seed=seed, device="cpu", **PUBLISHED)
    agent.learn(steps)
    seconds = time.perf_counter() - started
    env = make_vec_env(ENV, 1, seed=EVALUATION_SEED + seed)
    rewards, _ = evaluate_policy(agent, env, episodes, return_episode_rewards=True)
    return {
        "seed": seed,
        "steps": agent.num_timesteps,
        "mean": float(np.mean(rewards)),
        "deviation": float(np.std(rewards)),
        "worst": float(np.min(rewards)),
        "seconds": seconds,
    }


def difference(seed: int, steps: int) -> dict[str, Any]:
    """Train both with the default settings; return how far their parameters are apart."""
    import stable_baselines3

    from agents import PPO

    agents = [
        cls("MlpPolicy", ENV, seed=seed, device="cpu").learn(steps)
        for cls in (PPO, stable_baselines3.PPO)
    ]
    ours, theirs = (agent.policy.state_dict() for agent in agents)
    return {
        "seed": seed,
        "steps": agents[0].num_timesteps,
        "count": sum(value.numel() for value in ours.values()),
        "difference": max(float((ours[k] - theirs[k]).abs().max()) for k in theirs),
    }


def tables(learned: list[dict[str, Any]], compared: list[dict[str, Any]]) -> str:
    """Return both tables in Markdown."""
    lines = [
        "The settings of rl-baselines3-zoo; the return of greedy episodes, at most 500:",
        "",
        "| seed | steps | mean return | worst | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['seed']} | {r['steps']:,} | {r['mean']:.1f} ± {r['deviation']:.1f} "
        f"| {r['worst']:.0f} | {r['seconds']:.0f} |"
        for r in learned
    ]
    lines += [
        "",
        "The default settings, against stable-baselines3 with the same seed:",
        "",
        "| seed | steps | parameters | largest difference |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['seed']} | {r['steps']:,} | {r['count']:,} | {r['difference']:g} |" for r in compared
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write the tables."""
    options = tyro.cli(Options)
    import stable_baselines3
    import torch

    torch.set_num_threads(1)
    learned = [returns(seed, options.steps, options.episodes) for seed in range(options.seeds)]
    compared = [difference(seed, options.compared_steps) for seed in range(options.seeds)]
    command = f"`python -m benchmarks.cartpole --seeds {options.seeds}`"
    on = f"{machine()}, stable-baselines3 {stable_baselines3.__version__}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(f"# CartPole\n\n{command} on {on}.\n\n{tables(learned, compared)}")
    if any(result["difference"] for result in compared):
        sys.exit(1)


if __name__ == "__main__":
    main()
