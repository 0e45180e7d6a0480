"""Tensors in files: written whole, their headers read alone, and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from storage.files import replacing


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device and layout; a reader sees the old file or the new one, never half of one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # its own kind of a full disk
            raise OSError(str(error)) from error


def add_to_header(path: Path, entries: Mapping[str, str]) -> None:
    """Add metadata to a file, whose tensors stay as they are."""
    metadata, _ = read_safetensors_header(path, "file")
    write_safetensors(path, load_file(path), {**metadata, **entries})


def read_safetensors_header(path: Path, role: str) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata, and key -> shape, of a safetensors file; `role` names the file in the error."""
    try:
        with safe_open(path, framework="pt") as file:
            # not a mapping: it can't be iterated without keys()
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), shapes
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{role} {path} is not a readable safetensors file: {error}") from error


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor of any device, layout and dtype, for a hash."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def hash_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hexadecimal digest of the tensors' names, dtypes, shapes and bytes, in the order of their names."""
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters: names, dtypes, shapes and bytes. Taken before anything is injected."""
    return hash_tensors(hashlib.sha256(), module.named_parameters())
