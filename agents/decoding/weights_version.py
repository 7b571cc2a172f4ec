"""Whether a model's weights are still the same."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch as th

from agents.compat import on_optimizer_step, parameter_places, version_of

# Of each parameter so many numbers are looked at, from its first to its last.
SAMPLES = 16
# Numbers are compared as bits.
BITS = {1: th.int8, 2: th.int16, 4: th.int32, 8: th.int64}

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
        self._pointers: list[int] = []
        self._samples: list[npt.NDArray[np.int64]] = []
        self._seen: tuple[object, object] | None = None

    def __call__(self) -> object:
        """Return something that differs after a parameter was replaced or changed in place.

        PyTorch does not count changes through `.data`. On a CPU some numbers of each parameter are
        compared, too; `fingerprint` notices all such changes, on any device.
        """
        weights = self._weights()
        pointers = [*map(th.Tensor.data_ptr, weights)]
        if pointers != self._pointers:
            self._pointers = pointers
            self._samples = [_samples(w) for w in weights if w.device.type == "cpu"]
        samples = np.concatenate(self._samples).tobytes() if self._samples else b""
        return _optimizer_steps, pointers, [*map(version_of, weights)], samples

    def fingerprint(self) -> object:
        """Return something that differs after a change of any number; it reads all of them."""
        return fingerprint(self._weights())

    def missed_a_change(self) -> bool:
        """Return whether numbers have changed since the last call while the version has not."""
        before, self._seen = self._seen, (self(), self.fingerprint())
        return before is not None and before[0] == self._seen[0] and before[1] != self._seen[1]

    def _weights(self) -> list[th.Tensor]:
        return [w for place, name in self._places if (w := place[name]) is not None]


def fingerprint(weights: Iterable[th.Tensor]) -> list[int]:
    """Return numbers that differ after any change of a number in the weights.

    They are sums of bits, which are as fast as the memory; only what trades places stays unnoticed.
    """
    return [int(_bits(weight).sum(dtype=th.int64)) for weight in weights]


def _bits(weight: th.Tensor) -> th.Tensor:
    """Return a weight's memory as integers, as wide as possible."""
    bits = weight.detach().reshape(-1)
    whole = bits.numel() * bits.element_size() % 8 == 0
    return bits.view(th.int64 if whole else BITS[bits.element_size()])


def _samples(weight: th.Tensor) -> npt.NDArray[np.int64]:
    """Return a view of some of a parameter's numbers, as bits; it shows what they become."""
    count = min(SAMPLES, weight.numel())
    bits = weight.detach().view(BITS[weight.element_size()])
    step = (weight.numel() - 1) // (count - 1) if count > 1 else 1
    view: npt.NDArray[np.int64] = bits.as_strided((count,), (step,)).numpy()
    return view
