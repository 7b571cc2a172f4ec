"""What a run refuses before anything long begins."""

from __future__ import annotations

from typing import Any

import torch as th

from agents import parallel
from agents.rng import preserved_rng_state
from agents.rollouts.vec_env import engine_of
from textenvs.envs.playing import ScriptedAgent, play


def check_device(device: str, name: str = "device") -> None:
    """Refuse a device that is not there; SB3 takes the CPU instead and says nothing.

    Args:
        device: "auto", or what `torch.device` takes.
        name: What a message calls it.

    Raises:
        ValueError: If there is no such device, or no such kind of device.
    """
    try:
        wanted = th.device("cpu" if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"{name} must be auto, cpu, cuda, ..., but it is {device!r}.") from error
    if wanted.type == "cpu":
        return
    kind = th.accelerator.current_accelerator() if th.accelerator.is_available() else None
    there = th.accelerator.device_count() if kind is not None and kind.type == wanted.type else 0
    if (wanted.index or 0) >= there:
        have = ["auto", "cpu"] if kind is None else ["auto", "cpu", kind.type]
        count = f" ({there} of its kind are there)" if there else ""
        raise ValueError(
            f"{name} is {device!r}, but torch sees no such device here{count}: choose one of "
            f"{', '.join(have)}, or install a build of torch that has it."
        )


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
