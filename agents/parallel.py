"""The processes that train one agent together, called ranks: what they tell each other.

They are started by `torchrun` or `accelerate launch`, which set WORLD_SIZE. Without it, or at 1,
everything here is trivial and no process group is ever made.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch as th
from accelerate import PartialState
from accelerate.utils import broadcast as broadcast_tensors
from accelerate.utils import gather_object, patch_environment

from agents import compat

T = TypeVar("T")

# How many numbers to sum over the ranks at a time: few calls, and no copy of a whole model.
BUCKET = 2**23
# The others wait for what the main rank does alone; of one that is gone the launcher tells them.
BARRIER_TIMEOUT = timedelta(days=1)

_interrupted = threading.Event()


def count() -> int:
    """Return how many processes there are."""
    return 1 if _is_alone() else int(_state().num_processes)


def rank() -> int:
    """Return this process's number; the first is 0."""
    return 0 if _is_alone() else int(_state().process_index)


def is_main() -> bool:
    """Return whether this is the process that writes and prints."""
    return rank() == 0


def all_gather(items: list[T]) -> list[T]:
    """Return the items of all ranks, one rank's after the other's."""
    if _is_alone():
        return items
    _state()
    return list(gather_object(items))


def sum_gradients(module: th.nn.Module, *further: th.Tensor) -> None:
    """Replace a module's gradients, and further tensors, by their sums over the ranks."""
    if _is_alone():
        return
    _state()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # nothing to learn from here, but perhaps elsewhere
            parameter.grad = th.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    for bucket in _buckets([*further, *gradients]):
        flat = th.cat([tensor.reshape(-1) for tensor in bucket])
        th.distributed.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in bucket])
        for tensor, total in zip(bucket, sums, strict=True):
            tensor.copy_(total.view_as(tensor))


def broadcast(*modules: th.nn.Module) -> None:
    """Give every rank the main one's weights."""
    if _is_alone():
        return
    _state()
    for module in modules:
        broadcast_tensors(module.state_dict())


def run_on_all(act: Callable[[], bool]) -> bool:
    """Do something on every rank, and return whether it came out true on all of them.

    What one rank raises ends it for all, so that nobody waits for a rank that is gone.

    Raises:
        KeyboardInterrupt: If any of them was interrupted within `interrupted_together`.
        RuntimeError: If another one has raised something.
    """
    if _is_alone():
        return act()
    good, error = False, None
    try:
        good = act()
    except Exception as raised:
        error = raised
    failure = None if error is None else f"{type(error).__name__}: {error}"
    outcomes = all_gather([(good, failure, _interrupted.is_set())])
    if any(interrupted for _, _, interrupted in outcomes):
        _interrupted.clear()
        raise KeyboardInterrupt from error
    if error is not None:
        raise error
    for number, (_, failure, _) in enumerate(outcomes):
        if failure is not None:
            raise RuntimeError(f"Rank {number} ended the training of all by {failure}")
    return all(good for good, _, _ in outcomes)


@contextmanager
def interrupted_together() -> Iterator[None]:
    """Hold an interrupt (Ctrl-C) back until the ranks next `run_on_all`, and interrupt all of them.

    A rank that left by itself would be waited for. With one process an interrupt is what it is.
    """
    if _is_alone() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: _interrupted.set())
    try:
        yield
        if _interrupted.is_set():  # since they last agreed
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


@contextmanager
def main_process_only() -> Iterator[None]:
    """Hide the other ranks from libraries that would wait for them: the main rank works alone."""
    if _is_alone():
        yield
        return
    _state()
    # It wonders about the group that there is.
    wondering = logging.getLogger("transformers.training_args")
    level = wondering.level
    wondering.setLevel(logging.ERROR)
    try:
        with patch_environment(WORLD_SIZE=1, RANK=0, LOCAL_WORLD_SIZE=1, LOCAL_RANK=-1):
            compat.forget_processes()
            yield
    finally:
        wondering.setLevel(level)
        compat.forget_processes()


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1


def _state() -> PartialState:
    """Return accelerate's view of the processes; at first, make their group."""
    # Numbers and objects go by the CPU, tensors from where they are.
    cuda = th.cuda.is_available()
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    if not th.distributed.is_initialized():
        atexit.register(_leave)
    state = PartialState(cpu=not cuda, backend=backend, timeout=BARRIER_TIMEOUT)
    if state.num_processes == 1:
        raise RuntimeError(
            f"Launched as one of {os.environ['WORLD_SIZE']} processes, but accelerate's state is "
            "that of one: make the agent before any Accelerator, or launch one process."
        )
    return state


def _leave() -> None:
    if th.distributed.is_initialized():
        th.distributed.destroy_process_group()


def _buckets(tensors: Iterable[th.Tensor]) -> Iterator[Sequence[th.Tensor]]:
    """Yield consecutive tensors of at most `BUCKET` numbers together, one tensor at least."""
    bucket: list[th.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
