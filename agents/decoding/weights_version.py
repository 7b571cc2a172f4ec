"""Whether a model's weights are still the same."""

from __future__ import annotations

import torch as th

from agents.compat import on_optimizer_step, parameter_places, version_of

# How many steps optimizers have taken: PyTorch keeps no count of what fused ones change in place.
_optimizer_steps = 0


def _count_step() -> None:
    global _optimizer_steps
    _optimizer_steps += 1


on_optimizer_step(_count_step)


class WeightsVersion:
    """Tells whether a module's weights are still the same.

    Asked at every step of a rollout: the places of the parameters are listed once, and to look
    them all up takes about 0.3 microseconds each.

    Args:
        module: The module; its submodules must stay, their parameters may be replaced.
    """

    def __init__(self, module: th.nn.Module) -> None:
        self._places = parameter_places(module)

    def __call__(self) -> object:
        """Return something that differs after a parameter was replaced or changed in place.

        PyTorch does not count changes through `.data`.
        """
        weights = [w for place, name in self._places if (w := place[name]) is not None]
        return _optimizer_steps, [*map(th.Tensor.data_ptr, weights)], [*map(version_of, weights)]
