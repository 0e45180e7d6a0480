"""What the frozen encoders made of pictures and prompts, on disk: encoded once, read by every later run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from storage.tensors import hash_tensors, write_safetensors


class EncodedCache:
    """Entries by key; a key names the content that an entry was made from, so an entry can't go stale.

    A file that is torn, or holds another entry than its name says, counts as absent and is written anew.

    Args:
        folder: may be shared by runs, also at the same time, and deleted whenever none is running.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The entry's tensors, or None."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None
        sound = header.get("key") == key and header.get("checksum") == checksum(tensors)
        return tensors if sound else None

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        write_safetensors(self.path(key), tensors, {"key": key, "checksum": checksum(tensors)})


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE2 of the tensors' names, dtypes, shapes and bytes."""
    return hash_tensors(hashlib.blake2b(digest_size=16), tensors.items())
