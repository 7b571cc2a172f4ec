"""Where a run stands: what a saved agent holds besides SB3's so that it goes on exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypedDict

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from agents import compat, parallel
from agents.rng import get_rng_state, set_rng_state
from agents.rollouts.env_state import get_env_state, set_env_state, shows
from textenvs.envs.state import generator_state


class ResumePoint(TypedDict):
    """Where a run stands between two rollouts, as plain data.

    Keys:
        rng: See `get_rng_state`.
        action_rng: The state of the action space's own generator, if it was used.
        environment: See `get_env_state`. None: the environments start with a reset.
        last: The attributes in which SB3 keeps the last step's observations and ends, the
            episodes that go on, and with several ranks those of `PER_RANK`.
        logged: The logger's attributes about what was recorded since the log's last row.
    """

    rng: dict[str, Any]
    action_rng: Mapping[str, Any] | None
    environment: dict[str, Any] | None
    last: dict[str, Any]
    logged: dict[str, dict[str, Any]]


LAST = ("_last_obs", "_last_episode_starts", "unfinished")
# What is saved with an agent, but differs from rank to rank.
PER_RANK = ("ep_info_buffer", "ep_success_buffer", "turn_metrics", "episode_kl")
LOGGED = ("name_to_value", "name_to_count", "name_to_excluded")


def resume_point(agent: BaseAlgorithm) -> ResumePoint | None:
    """Return where an agent's run stands; nothing is drawn or changed.

    Returns:
        None before training and in the middle of a rollout, whose steps are not saved: the next
        one then starts with a reset, as in SB3.
    """
    if agent.env is None or agent._last_obs is None or _in_rollout(agent):
        return None
    environment = get_env_state(agent.env)
    if environment is not None and not shows(environment, agent._last_obs):
        return None
    last = LAST if parallel.count() == 1 else (*LAST, *PER_RANK)
    return ResumePoint(
        rng=get_rng_state(),
        action_rng=generator_state(compat.used_generator(agent.action_space)),
        environment=environment,
        last={name: deepcopy(getattr(agent, name)) for name in last},
        logged=_logged(agent),
    )


def point_of_rank(points: ResumePoint | Sequence[ResumePoint | None] | None) -> ResumePoint | None:
    """Return this rank's point of what an agent was saved with: one, or one for each rank.

    With another number of ranks there is none, with a warning.
    """
    of_ranks = points if isinstance(points, Sequence) else [points]
    if points is not None and len(of_ranks) != parallel.count():
        warnings.warn(
            f"Training goes on with new episodes, not where it was saved: {len(of_ranks)} "
            f"processes saved it, and {parallel.count()} go on.",
            stacklevel=4,
        )
        return None
    return of_ranks[parallel.rank()] if points is not None else None


def is_in_step(agent: BaseAlgorithm) -> bool:
    """Return whether the environments are where the agent saw them last.

    They are not after a rollout that a callback or an interrupt ended, nor after somebody else has
    stepped them. Environments that cannot be asked are taken to be.
    """
    environment = None if agent.env is None else get_env_state(agent.env)
    return environment is None or shows(environment, agent._last_obs)


def _in_rollout(agent: Any) -> bool:
    """Return whether there are steps that no update has seen yet."""
    return bool(agent.awaits_update and agent.rollout_buffer.pos)


def restore(agent: BaseAlgorithm, point: ResumePoint) -> None:
    """Put an agent whose environments have just been reset where its run stood.

    If the environments are not those of the run, they stay as they are, with a warning.
    """
    if agent.env is None:
        return
    if point["environment"] is not None:
        try:
            set_env_state(agent.env, point["environment"])
        except ValueError as error:
            warnings.warn(
                f"Training goes on with new episodes, not where it was saved. {error}", stacklevel=4
            )
            return
        vars(agent).update(deepcopy(point["last"]))
    for name, values in point["logged"].items():
        getattr(agent.logger, name).update(values)
    if point["action_rng"] is not None:
        agent.action_space.np_random.bit_generator.state = point["action_rng"]
    set_rng_state(point["rng"])


def _logged(agent: BaseAlgorithm) -> dict[str, dict[str, Any]]:
    """Return the metrics that the log's next row will hold already; pictures are left out."""
    logger = getattr(agent, "_logger", None)
    if logger is None:
        return {}
    metrics = [k for k, v in logger.name_to_value.items() if isinstance(v, (int, float, np.number))]
    tables = {name: getattr(logger, name) for name in LOGGED}
    return {
        kind: {name: table[name] for name in metrics if name in table}
        for kind, table in tables.items()
    }
