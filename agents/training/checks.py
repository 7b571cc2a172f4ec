"""What a run refuses before anything long begins."""

from __future__ import annotations

from typing import Any

from agents import parallel
from agents.rng import preserved_rng_state
from agents.rollouts.vec_env import engine_of
from textenvs.envs.playing import ScriptedAgent, play


def check_rewards(*envs: Any) -> None:
    """Score one episode of each environment, so that a reward that fails does so now.

    Nothing is drawn from any generator, and the environments are left as they are. With several
    ranks, each has to call this.

    Raises:
        ValueError: What the rewards or the task raise.
    """

    def play_one() -> bool:
        for env in envs:
            agent = ScriptedAgent(lambda example, turns, rng: (*example.references, "")[0])
            with preserved_rng_state():
                play(engine_of(env).with_slots(1), agent, [0])
        return True

    parallel.run_on_all(play_one)
