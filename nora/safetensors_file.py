"""Safetensors files that are either whole or not there, and the bytes of tensors for a hash."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device and layout; a reader sees the old file or the new one, never half of one.

    Raises:
        OSError: if it can't be written, with the path.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # a name of its own may be as long as names can be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
        with temporary.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk, most of all
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any device, layout and dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
