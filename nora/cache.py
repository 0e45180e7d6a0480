"""Disk cache of outer factors: the exact decomposition of a large base is paid for once.

An entry is named by the content it came from (weight, statistic, settings), so it can't go stale and needs no index.
The folder may be deleted at any time. A statistic is another for every calibration, so entries add up: the least
recently used go where all would be larger than the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .safetensors_file import tensor_bytes, write_safetensors

Tensors = dict[str, torch.Tensor]
# Part of every entry's name: raise it when the numbers of `outer_factors` change.
ALGORITHM_VERSION = 2
# Measured on one CPU core: the iterated factors of 320 x 320 take 6 ms, those of 1280 x 1280 60 ms; hashing the weight
# and reading the entry takes 1-5 ms. Below this side the cache would fill a folder to save less than a second in all.
SMALLEST_SIDE = 160


@dataclass(frozen=True)
class BasisCache:
    """A folder of outer factors.

    Args:
        folder: made with the first entry.
        limit_bytes: what all entries may take; infinity for no limit.
    """

    folder: Path
    limit_bytes: float = math.inf

    def tensors(
        self, W: torch.Tensor, statistic: torch.Tensor | None, settings: tuple, compute: Callable[[], Tensors]
    ) -> Tensors:
        """``compute()``, or what it returned before for the same content. A broken or full disk only costs time."""
        path = Path(self.folder) / f"outer-{cache_key(W, statistic, settings)}.safetensors"
        try:
            entry, cached = {name: tensor.to(W.device) for name, tensor in load_file(path).items()}, True
        except (OSError, SafetensorError):
            entry, cached = compute(), False
        with contextlib.suppress(OSError):  # a read-only folder or a full disk must not stop who has the factors
            if cached:
                os.utime(path)  # used just now
            else:
                write_safetensors(path, entry)
                self.evict()
        return entry

    def evict(self) -> None:
        """Delete the least recently used entries, until the others fit the limit; beside other processes.

        A process that reads a deleted entry reads it to its end; one that comes later computes it anew.
        """
        if self.limit_bytes == math.inf:
            return  # looking at every entry after each new one is quadratic
        entries = []
        with os.scandir(self.folder) as found:
            for file in found:
                if file.name.startswith("outer-") and file.name.endswith(".safetensors"):
                    with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                        entries.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


_cache: ContextVar[BasisCache | None] = ContextVar("basis_cache", default=None)


@contextmanager
def use_basis_cache(cache: BasisCache | None) -> Iterator[None]:
    """Inside, layers with both sides of at least SMALLEST_SIDE take their outer factors from the cache.

    None decomposes every time, which is what happens outside, too. Injecting and loading decompose; a forward pass
    never does.
    """
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


def cached_tensors(
    W: torch.Tensor, statistic: torch.Tensor | None, settings: tuple, compute: Callable[[], Tensors]
) -> Tensors:
    """``compute()``, or what the cache in use has for this weight, statistic and settings."""
    cache = _cache.get()
    if cache is None or min(W.shape) < SMALLEST_SIDE:
        return compute()
    return cache.tensors(W, statistic, settings, compute)


def cache_key(W: torch.Tensor, statistic: torch.Tensor | None, settings: tuple) -> str:
    """Hash of all that determines the factors: weight (m, n), float16 statistic (n,) or None, and the settings."""
    digest = hashlib.sha256()  # processors have instructions for it, and a whole model is hashed
    digest.update(repr((ALGORITHM_VERSION, str(W.dtype), tuple(W.shape), settings)).encode())
    for tensor in (W, statistic):
        if tensor is not None:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:40]
