"""Work on many layers at once: a core to a layer."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(compute: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[compute(item) for item in items]``, on as many cores as PyTorch may use; the first exception ends it.

    A decomposition of one layer uses several cores badly (measured at 1280 x 1280: two threads are 1.2 times as fast as
    one), while layers don't wait for each other. What runs on a GPU is queued there all the same.
    """
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [compute(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            runs = [pool.submit(contextvars.copy_context().run, compute, item) for item in items]
            try:
                return [run.result() for run in runs]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
