"""Disk cache of outer factors: the exact decomposition of a large base is paid for once.

An entry is named by the content it came from (weight, statistic, settings), so it can't go stale and needs no index.
The folder is ``$NORA_CACHE_DIR``, by default ``~/.cache/nora``; ``NORA_CACHE_DIR=""`` turns the cache off. It may be
deleted at any time. A statistic is another for every subject, so entries add up: the least recently used go where all
would be more than ``$NORA_CACHE_GB``, by default 8 GB (10⁹ bytes); 0 is no limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from storage.tensors import tensor_bytes, write_safetensors

from .functional import OuterFactors

# Part of every entry's name: raise it when the numbers of `outer_factors` change.
ALGORITHM_VERSION = 1
# Measured on one CPU core: 512 x 512 takes 60 ms, 640 x 640 110 ms, 1280 x 1280 610 ms; hashing the weight and reading
# the entry takes 2-10 ms. Below 512 the cache would fill a folder to save less than a second in all.
SMALLEST_SIDE = 512

DEFAULT_GB = 8.0


def cache_dir() -> Path | None:
    """The cache folder, or None if the cache is off."""
    configured = os.environ.get("NORA_CACHE_DIR")
    if configured == "":
        return None
    return Path(configured) if configured else Path.home() / ".cache" / "nora"


def cache_limit() -> float:
    """Bytes that all entries may take; infinity for no limit.

    Raises:
        ValueError: for a ``NORA_CACHE_GB`` that says no size.
    """
    configured = os.environ.get("NORA_CACHE_GB") or DEFAULT_GB
    try:
        gigabytes = float(configured)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ValueError(f"NORA_CACHE_GB={configured} must be a number of gigabytes, such as 8, or 0 for no limit")
    return gigabytes * 1e9 or math.inf


def cache_key(W: torch.Tensor, statistic: torch.Tensor | None, settings: tuple) -> str:
    """Hash of all that determines the factors: weight (m, n), float16 statistic (n,) or None, and the settings."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(repr((ALGORITHM_VERSION, str(W.dtype), tuple(W.shape), settings)).encode())
    for tensor in (W, statistic):
        if tensor is not None:
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def cached_outer_factors(
    W: torch.Tensor, statistic: torch.Tensor | None, settings: tuple, compute: Callable[[], OuterFactors]
) -> OuterFactors:
    """``compute()``, or what it returned before for the same content. A broken or unwritable cache only costs time."""
    folder = cache_dir()
    if folder is None or min(W.shape) < SMALLEST_SIDE:
        return compute()
    limit = cache_limit()
    path = folder / f"outer-{cache_key(W, statistic, settings)}.safetensors"
    try:
        entry = load_file(path, device=str(W.device))
        outer = OuterFactors(entry["A"], entry["B"])
    except (OSError, SafetensorError, KeyError):
        outer, entry = compute(), None
    with contextlib.suppress(OSError):  # a read-only home or a full disk must not stop a run that has its factors
        if entry is None:
            write_safetensors(path, {"A": outer.A, "B": outer.B})
            evict(folder, limit)
        else:
            os.utime(path)  # used just now
    return outer


def evict(folder: Path, limit: float) -> None:
    """Delete the least recently used entries, until the others have at most ``limit`` bytes; beside other processes.

    A process that reads a deleted entry reads it to its end; one that comes later computes it anew.
    """
    entries = []
    with os.scandir(folder) as found:
        for file in found:
            if file.name.startswith("outer-") and file.name.endswith(".safetensors"):
                with contextlib.suppress(FileNotFoundError):  # another process evicts, too
                    entries.append((file.stat().st_mtime_ns, file.stat().st_size, file.name))
    total = sum(size for _, size, _ in entries)
    for _, size, name in sorted(entries):
        if total <= limit:
            break
        (folder / name).unlink(missing_ok=True)
        total -= size
