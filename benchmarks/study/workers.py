"""The study's processes; their functions can't stand in ``__main__``, which a spawned process doesn't import."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks.study.settings import Setting
from benchmarks.study.trainings import Laboratory, Training
from benchmarks.study.tuning import tune
from settings.command_line import quiet_libraries


def best_rate(laboratory: Laboratory, subjects: Sequence[str], steps: int, one: Setting) -> float:
    return tune(laboratory, one, subjects, steps).rate


def score(laboratory: Laboratory, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """Of one subject, whose base pictures are shared."""
    return [laboratory.measure(training, scored=True) for training in trainings]


def one_thread() -> None:
    """A core to a process: small matrices gain nothing from two."""
    torch.set_num_threads(1)
    quiet_libraries()
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """A worker would go on with its training, and write its result, after the command was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def in_processes(jobs: int, work: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_thread) as pool:
        return list(pool.map(work, items))
