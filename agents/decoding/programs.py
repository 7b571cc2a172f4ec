"""Functions compiled for rollouts, on a GPU as captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import count
from typing import Any

import torch as th

from agents.compat import map_tensors

_NAMES = count()


class Programs:
    """What `torch.compile` has made of functions, by name."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Callable[..., Any]] = {}

    def get(
        self, key: Hashable, function: Callable[..., Any], capture: bool, any_shape: bool = False
    ) -> Callable[..., Any]:
        """Return a function compiled.

        Args:
            key: Names what is compiled. Whatever else it depends on than its arguments and the
                model belongs here.
            function: The function.
            capture: Whether it is captured as a graph.
            any_shape: Whether each call comes in another shape, so that there is nothing to
                capture.
        """
        if key not in self._programs:
            options: dict[str, Any] = {}
            capture = capture and not any_shape
            if capture:
                options["triton.cudagraphs"] = True
            if hasattr(th.compiler, "skip_guard_on_all_nn_modules_unsafe"):
                # Modules stay what they are, and a new decode model gets new programs. To ask each
                # of them at every step takes longer than what they compute.
                options["guard_filter_fn"] = th.compiler.skip_guard_on_all_nn_modules_unsafe
            program = th.compile(
                _isolated(function), dynamic=True if any_shape else None, options=options
            )
            self._programs[key] = _replayed(program) if capture else program
        return self._programs[key]

    def clear(self) -> None:
        """Let them go, since the modules that they run are others now."""
        self._programs.clear()


def _isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with code of its own, which is what compilers remember programs by."""

    def run(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    run.__code__ = run.__code__.replace(co_name=f"run_{next(_NAMES)}")
    return run


def _replayed(program: Callable[..., Any]) -> Callable[..., Any]:
    """Return a captured program whose answers outlive its next run."""

    def run(*arguments: Any) -> Any:
        th.compiler.cudagraph_mark_step_begin()
        return map_tensors(th.Tensor.clone, program(*arguments))

    return run
