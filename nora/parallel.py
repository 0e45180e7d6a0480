"""Work on many layers at once: a core to a layer, and a share of the layers to each process."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

Item = TypeVar("Item")
Result = TypeVar("Result")
_splitting: contextvars.ContextVar[bool] = contextvars.ContextVar("splitting", default=False)


@contextmanager
def split_over_processes() -> Iterator[None]:
    """Inside, `over_layers` computes each layer in one of torch.distributed's processes and gives the result to all.

    All of them must enter it and do the same: adapters that one process alone injects or loads go without.
    """
    token = _splitting.set(True)
    try:
        yield
    finally:
        _splitting.reset(token)


def over_layers(compute: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[compute(item) for item in items]``, over this process's cores and, if asked for, over all processes.

    What other processes computed comes on the CPU.

    Raises:
        Exception: in every process, what `compute` raised in one.
    """
    items = list(items)
    if not (_splitting.get() and dist.is_available() and dist.is_initialized()):
        return in_parallel(compute, items)
    rank, count = dist.get_rank(), dist.get_world_size()
    mine: list[Any] | Exception
    try:
        mine = tree_map_only(torch.Tensor, torch.Tensor.cpu, in_parallel(compute, items[rank::count]))
    except Exception as error:
        mine = error
    shares: list[Any] = [None] * count
    dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, Exception):
            raise share
    return [shares[place % count][place // count] for place in range(len(items))]


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
