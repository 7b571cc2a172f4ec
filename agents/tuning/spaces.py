"""What a search tries, by algorithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agents.training.registry import algorithm_class, keywords


@dataclass(frozen=True)
class Among:
    """An option that takes one of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that a trial tries."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Between:
    """An option that takes a number between two others; all orders of magnitude are as likely."""

    low: float
    high: float

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that a trial tries."""
        return trial.suggest_float(name, self.low, self.high, log=True)


_EVERY: dict[str, Among | Between] = {"learning_rate": Between(3e-5, 2e-3)}
_NEAR: dict[str, Among | Between] = {**_EVERY, "kl_coef": Between(0.005, 0.2)}
_BATCHES: dict[str, Among | Between] = {
    "batch_size": Among((256, 512, 1024, 2048)),
    "n_epochs": Among((1, 2, 4, 8)),
}
_GROUPS: dict[str, Among | Between] = {
    **_NEAR,
    **_BATCHES,
    "group_size": Among((4, 8, 16)),
    "episodes_per_slot": Among((1, 2)),
}
_CRITIC: dict[str, Among | Between] = {
    **_NEAR,
    "n_steps": Among((32, 64, 128)),
    "gae_lambda": Among((0.9, 0.95, 1.0)),
    "ent_coef": Among((0.0, 0.001, 0.01)),
}
_BOUND: dict[str, Among | Between] = {"target_kl": Among((0.015, 0.03, 0.06))}
_PPO: dict[str, Among | Between] = {**_CRITIC, **_BATCHES, **_BOUND}
# What is searched, by algorithm; docs/comparison.md has it as a table.
SPACES: dict[str, dict[str, Among | Between]] = {
    "ppo": _PPO,
    "nlpo": {
        **_PPO,
        "top_mask": Among((0.8, 0.9, 0.95)),
        "target_update_iterations": Among((2, 4, 8, 20)),
    },
    "a2c": _CRITIC,
    "reinforce": {**_NEAR, "n_steps": Among((32, 64, 128))},
    "grpo": {
        **_GROUPS,
        **_BOUND,
        "recipe": Among(("grpo", "dr_grpo", "dapo", "gspo", "cispo")),
    },
    "rloo": {**_GROUPS, **_BOUND},
    "reinforce++": {**_NEAR, **_BATCHES, **_BOUND, "baseline": Among(("none", "group"))},
    "remax": {**_NEAR, "episodes_per_slot": Among((1, 2))},
    "expert_iteration": {**_GROUPS, "keep_best": Among((1, 2, 4))},
    "sft": {**_EVERY, "batch_size": Among((128, 256, 512, 1024))},
}


def space(algo: str) -> dict[str, Among | Between]:
    """Return what is searched for an algorithm; for one of your own, what it has of PPO's."""
    if algo in SPACES:
        return SPACES[algo]
    accepted = set(keywords(algorithm_class(algo)))
    return {name: option for name, option in _PPO.items() if name in accepted}
