"""Where the suite keeps the outer factors that NoRA has computed.

The folder is ``$NORA_CACHE_DIR``, by default ``~/.cache/nora``; ``NORA_CACHE_DIR=""`` turns the cache off. It takes at
most ``$NORA_CACHE_GB``, by default 8 GB (10⁹ bytes); 0 is no limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nora import BasisCache, use_basis_cache
from storage.text import home_path

DEFAULT_GB = 8.0


@contextmanager
def basis_cache() -> Iterator[None]:
    """Inside (it decorates, too), adapters take their outer factors from the user's cache.

    Raises:
        ValueError: for a ``NORA_CACHE_GB`` that says no size.
    """
    with use_basis_cache(configured_cache()):
        yield


def configured_cache() -> BasisCache | None:
    """The cache that the environment asks for, or None if it is turned off."""
    folder = os.environ.get("NORA_CACHE_DIR")
    if folder == "":
        return None
    return BasisCache(home_path(folder) if folder else Path.home() / ".cache" / "nora", _limit_bytes())


def _limit_bytes() -> float:
    configured = os.environ.get("NORA_CACHE_GB") or DEFAULT_GB
    try:
        gigabytes = float(configured)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise ValueError(f"NORA_CACHE_GB={configured} must be a number of gigabytes, such as 8, or 0 for no limit")
    return gigabytes * 1e9 or math.inf
