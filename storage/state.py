"""Whether files have changed, told without reading them."""

from __future__ import annotations

from pathlib import Path


def local_state(path: str | None) -> list[list[str | int]]:
    """Names, sizes and times of the files at a path of this disk, sub-folders too; [] for none, such as a Hub id."""
    root = Path(path) if path else None
    if root is None or not root.exists():
        return []
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    return [[file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
