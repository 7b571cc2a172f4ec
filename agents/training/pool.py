"""Runs side by side, each in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Say = Callable[[str], None]


def run_all(
    function: Callable[[Item], Answer], items: Sequence[Item], workers: int
) -> Iterator[Answer]:
    """Yield what a function makes of items, in the order in which they end.

    An interrupt reaches the processes, too: each ends what it does in its own way first.

    Args:
        function: Importable, as it is called in other processes.
        items: What to call it with.
        workers: How many processes, spawned as torch wants it. 0: in this one, item by item.

    Raises:
        ValueError: If a process was killed.
    """
    if not workers or not items:
        yield from map(function, items)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), context, _begin) as pool:
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


def _begin() -> None:
    """Prepare a process: it shows no bars, and ends when the one that has started it does."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    connection.wait([sentinel])
    os._exit(1)
