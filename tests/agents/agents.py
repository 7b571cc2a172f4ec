"""Agents with a rollout to learn from, and what an update makes of it, for the tests of both."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from torch.utils._python_dispatch import TorchDispatchMode

from agents import PPO
from tests.agents.helpers import FEW, gpt2
from tests.textenvs.toys import Chat

NUM_ENVS, N_STEPS = 4, 24
ITERATION = NUM_ENVS * N_STEPS
# Gradients far from 0 everywhere, and a step that is the gradient itself.
PLAIN_STEPS: dict[str, Any] = {"optimizer_class": th.optim.SGD}
# Gradients alone: no step is taken, and none is scaled.
STILL: dict[str, Any] = {"learning_rate": 0.0, "max_grad_norm": 1e9, "n_epochs": 1}


# Episodes of one turn and of up to three, all of them short enough to end within a rollout.
KINDS: dict[str, dict[str, Any]] = {"one turn": {}, "several turns": {"task": Chat}}


def make_agent(
    kind: str = "one turn",
    env: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    cls: Any = PPO,
    **kwargs: Any,
) -> Any:
    """An agent of a GPT-2 of one layer with few allowed tokens, whose values are not 0.

    What its class has no argument for is left out.
    """
    budgets = {"num_envs": NUM_ENVS, "max_new_tokens": 8, "reward": ["task", "length_penalty"]}
    # Steps here are large: without a limit, no epoch is cut short, and none is a small one.
    settings = {"n_steps": N_STEPS, "n_epochs": 2, "seed": 0, "device": "cpu"}
    settings |= {"target_kl": 1e9, "warmup_steps": 0}
    settings["batch_size"] = min(32, NUM_ENVS * kwargs.get("n_steps", N_STEPS))
    settings = {**settings, "learning_rate": 3e-3, **kwargs}
    known = inspect.signature(cls).parameters
    model = cls(
        "TransformerPolicy",
        gym.make_vec("TextGen-v0", **{**budgets, **KINDS[kind], **(env or {})}),
        policy_kwargs={"model": gpt2(n_layer=1), "allowed_tokens": FEW, **(policy or {})},
        **{name: value for name, value in settings.items() if name in known},
    )
    if model.policy.value_head is not None:
        generator = th.Generator().manual_seed(1)
        th.nn.init.normal_(model.policy.value_head.weight, std=0.3, generator=generator)
    return model


def collect(model: Any, callback: Callable[[Any], None] | None = None, fresh: bool = True) -> Any:
    """Fill an agent's buffer with a rollout, and leave the update to the test.

    Args:
        model: The agent.
        callback: Called with the local variables of each step.
        fresh: Whether new episodes begin, or those of the rollout before go on.
    """
    each = EachStep(callback) if callback else None
    _, callbacks = model._setup_learn(10 * model.n_steps * model.n_envs, each, fresh)
    callbacks.on_training_start({}, {})
    assert model.collect_rollouts(model.env, callbacks, model.rollout_buffer, model.n_steps)
    return model


class EachStep(BaseCallback):
    """Calls a function after each step, with the rollout's local variables."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        self.function(self.locals)
        return True


def shake(module: th.nn.Module, scale: float = 0.02) -> None:
    """Change all weights a little, so that an update's ratios are not 1."""
    generator = th.Generator().manual_seed(2)
    with th.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * th.randn(parameter.shape, generator=generator))


def weights(module: th.nn.Module) -> dict[str, th.Tensor]:
    """A copy of everything that a module has."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Whether two of them are equal bit for bit."""
    return set(first) == set(second) and all(th.equal(first[k], second[k]) for k in first)


@dataclass
class Update:
    """What an update did: the gradients of each step before it was taken, and what was logged."""

    gradients: list[dict[str, th.Tensor]] = field(default_factory=list)
    log: dict[str, float] = field(default_factory=dict)

    def difference(self, other: Update) -> float:
        """The largest difference of two updates' gradients, relative to the largest gradient."""
        assert len(self.gradients) == len(other.gradients) > 0
        worst = 0.0
        for ours, theirs in zip(self.gradients, other.gradients, strict=True):
            assert set(ours) == set(theirs)
            scale = max(float(gradient.abs().max()) for gradient in ours.values())
            errors = [float((ours[name] - theirs[name]).abs().max()) for name in ours]
            worst = max(worst, max(errors) / scale)
        return worst


def train(model: Any) -> Update:
    """Run an agent's update with a fixed order of minibatches."""
    update = Update()

    def keep(*_: Any) -> None:
        update.gradients.append(
            {
                name: parameter.grad.clone()
                for name, parameter in model.policy.named_parameters()
                if parameter.grad is not None
            }
        )

    state = np.random.get_state()
    np.random.seed(0)
    with Hook(model.policy.optimizer.register_step_pre_hook(keep)):
        model.train()
    np.random.set_state(state)
    update.log = dict(model.logger.name_to_value)
    return update


class Hook:
    """Removes a hook at the end of a block."""

    def __init__(self, *handles: Any) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


class Calls:
    """Counts the calls of modules, also those that recompute what was not kept."""

    def __init__(self, *modules: th.nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.handles = [module.register_forward_pre_hook(self._count) for module in modules]

    def _count(self, module: th.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.shapes.append(tuple(inputs[0].shape))

    def tokens(self, width: int) -> int:
        """How many tokens have been computed, of numbers that many to a token."""
        return sum(math.prod(shape) for shape in self.shapes) // width

    def take(self) -> int:
        """How many there have been since the last time."""
        count = len(self.shapes)
        self.shapes.clear()
        return count


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it gives."""
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, th.Tensor):
                self.elements = max(self.elements, value.numel())
        return result
