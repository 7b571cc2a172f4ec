"""Runs one after another, or side by side in processes of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import PathFinder
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th

import agents
from agents.training.folder import is_run
from agents.training.logs import OnLog
from agents.training.run import Run
from agents.training.spec import RunSpec

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def run_all(
    function: Callable[[Item], Answer], items: Sequence[Item], workers: int, threads: int
) -> Iterator[Answer]:
    """Yield what a function makes of items, in the order in which they end.

    An interrupt reaches the processes, too: each ends what it does in its own way first.

    Args:
        function: Importable, as it is called in other processes.
        items: What to call it with.
        workers: How many processes; see `_fresh_processes`. 0: in this one, item by item.
        threads: How many torch has in each.

    Raises:
        ValueError: If a process was killed.
    """
    if not workers or not items:
        before = th.get_num_threads()
        th.set_num_threads(threads)
        try:
            yield from map(function, items)
        finally:
            th.set_num_threads(before)
        return
    begin, given = _begin, (threads, dict(os.environ))
    with ProcessPoolExecutor(min(workers, len(items)), _fresh_processes(), begin, given) as pool:
        waiting = [pool.submit(function, item) for item in items]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "A process was killed, perhaps for its memory: the same command goes on where it "
                "was, with fewer workers if need be."
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def train_to_the_end(
    spec: RunSpec, folder: Path, on_log: OnLog = lambda row: None
) -> dict[str, Any]:
    """Start a run, or go on with the one that is in its folder, and return its summary.

    Raises:
        ValueError: If the folder has another run.
        KeyboardInterrupt: If it was interrupted, and has written what it had learned.
    """
    run = Run.open(folder, spec) if is_run(folder) else Run.create(spec, folder)
    summary = run.train(on_log=on_log)
    if summary["interrupted"]:
        raise KeyboardInterrupt
    return summary


def _fresh_processes() -> BaseContext:
    """Return how to start processes that hold nothing of this one, as torch wants it.

    Where the platform can, they come from a server that has imported everything once: a process
    takes seconds for that, and memory of its own.
    """
    own = PathFinder.find_spec("agents", [os.getcwd()])  # a server looks there first
    other = own is not None and own.origin != agents.__file__
    if other or "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["agents"])
    return context


def _begin(threads: int, environment: dict[str, str]) -> None:
    """Prepare a process: it shows no bars, and ends when the one that has started it does."""
    from transformers.utils import logging

    os.environ.clear()  # a server has those of its own start
    os.environ.update(environment)
    np.random.seed()
    th.set_num_threads(threads)
    logging.disable_progress_bar()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    connection.wait([sentinel])
    os._exit(1)
