"""Dictionaries of buffers, one entry an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict


class Buffers(BufferDict):
    """PEFT's dictionary of buffers, with `get`."""

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self else None  # noqa: SIM401 (this is get)


class ExactBuffers(Buffers):
    """Buffers that follow the model to its device but never to another dtype.

    Args:
        persistent: whether they are in the state dict.
        on_set: called with the adapter's name when a loader sets its buffer, which transformers' own does one by one.
    """

    def __init__(self, persistent: bool, on_set: Callable[[str], None] | None = None) -> None:
        super().__init__(persistent=persistent)
        self._on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers and self._on_set is not None:
            self._on_set(name)

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.items() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self[name] = buffer.to(self[name].device)
        return self
