"""What an algorithm refuses before anything long begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch as th
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from agents import parallel
from agents.rollouts.buffer import Diverged
from agents.rollouts.collector import check_slots_can_wait

# The advantages of one token alone cannot be whitened.
MINIMUMS = {
    "n_steps": 1,
    "batch_size": 2,
    "n_epochs": 1,
    "micro_batch_size": 1,
    "episodes_per_slot": 1,
    "critic_warmup": 0,
    "warmup_steps": 0,
    "dynamic_sampling": 0,
    "keep_best": 0,
    "target_update_iterations": 1,
    "whiten_floor": 0,
    "vf_coef": 0,
}

# What lies between two bounds, by name: the lower one, the upper one, whether the lower one counts.
RANGES = {
    "gamma": (0, 1, True),
    "gae_lambda": (0, 1, True),
    "gae_lambda_vf": (0, 1, True),
    "gae_length_alpha": (0, math.inf, False),
    "clip_range": (0, math.inf, False),
    "clip_range_high": (0, math.inf, False),
    "clip_range_vf": (0, math.inf, False),
    "epsilon": (0, math.inf, False),
    "overlong_margin": (0, 1, True),
    "max_grad_norm": (0, math.inf, False),
    "target_kl": (0, math.inf, False),
    "learning_rate": (0, math.inf, True),
    "vf_learning_rate": (0, math.inf, True),
}

# What several ranks must agree on, or one would wait for what the others never do.
RANK_INVARIANT = (
    "num_timesteps",
    "n_envs",
    "n_steps",
    "episodes_per_slot",
    "batch_size",
    "n_epochs",
    "kl_coef",
    "target_kl",
    "warmup_steps",
    "aggregation",
    "keep_best",
    "threshold",
    "top_mask",
    "target_update_iterations",
)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise a ValueError unless a value is one of those that a `Literal` has."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}.")


def check_minimums(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError for numbers that are too small; what is None or absent is left alone."""
    for name, minimum in MINIMUMS.items():
        value = arguments.get(name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, but it is {value}.")


def check_ranges(agent: Any) -> None:
    """Refuse numbers that are out of their bounds; a schedule is asked for its first one.

    Raises:
        ValueError: It names the argument.
    """
    for name, (low, high, inclusive) in RANGES.items():
        value = getattr(agent, name, None)
        if value is None:
            continue
        number = value(1.0) if callable(value) else value
        if not (low <= number <= high) or (number == low and not inclusive):
            least = "at least" if inclusive else "more than"
            most = "" if math.isinf(high) else f" and at most {high}"
            raise ValueError(f"{name} must be {least} {low}{most}, but it is {number}.")
    if agent.critic_warmup and not getattr(agent, "vf_coef", 0):
        raise ValueError("critic_warmup trains the critic, so vf_coef must not be 0.")


def check_batch_size(agent: Any) -> None:
    """Refuse minibatches that are larger than a rollout.

    Raises:
        ValueError: If no rollout has so many tokens.
    """
    tokens = agent.n_steps * agent.n_envs
    if agent.episodes_per_slot is None and agent.batch_size > tokens:
        raise ValueError(
            f"batch_size must be at most a rollout's {tokens} tokens (n_steps={agent.n_steps} from "
            f"each of {agent.n_envs} environments), but it is {agent.batch_size}: lower it, or "
            "raise n_steps."
        )


def check_environment(env: VecEnv, episodes_per_slot: int | None) -> None:
    """Refuse an environment whose tokens or slots are not what we need.

    Raises:
        ValueError: If it normalizes tokens, or its slots cannot wait for each other.
    """
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None and normalizer.norm_obs:
        raise ValueError("Tokens cannot be normalized: give VecNormalize norm_obs=False.")
    if episodes_per_slot is not None:
        check_slots_can_wait(env)


def check_ranks_agree(agent: Any, total_timesteps: int) -> None:
    """Refuse ranks that are about to do different things.

    Raises:
        ValueError: If any of `RANK_INVARIANT`, or the total, differs.
    """
    own = {name: getattr(agent, name) for name in RANK_INVARIANT if hasattr(agent, name)}
    own["total_timesteps"] = total_timesteps
    for rank, other in enumerate(parallel.all_gather([own])):
        if other != own:
            raise ValueError(
                f"All ranks must do the same, but rank {parallel.rank()} has {own}, and rank "
                f"{rank} has {other}: give them the same arguments."
            )


def check_finite(model: Any) -> None:
    """Refuse to go on with, or to save, an agent that has diverged.

    Raises:
        Diverged: If a weight, or what the optimizer remembers of it, is infinite or NaN.
    """
    name = first_not_finite(_tensors(model.policy))
    if name is not None:
        raise Diverged(
            f"The training has diverged: {name} is not finite after {model.num_timesteps:,} "
            "tokens, and an agent like that is not saved. Lower the learning rate, or raise "
            "kl_coef; what was saved before is as it was."
        )


def first_not_finite(named: Iterable[tuple[str, th.Tensor]]) -> str | None:
    """Return the name of the first tensor that holds something infinite or NaN, if one does."""
    return next((name for name, tensor in named if not bool(th.isfinite(tensor).all())), None)


def _tensors(policy: Any) -> Iterator[tuple[str, th.Tensor]]:
    """Yield a policy's floating-point weights, and what its optimizer remembers."""
    named = {id(parameter): name for name, parameter in policy.named_parameters()}
    yield from policy.named_parameters()
    for parameter, state in policy.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, th.Tensor):
                yield f"{key} of {named.get(id(parameter), 'a weight')}", value
