"""What an adapter adds to one layer, whatever made it: two factors, in the form that PEFT's LoRA layers hold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Update(NamedTuple):
    """``ΔW = up · down`` of a layer, and what is added to its bias.

    A linear layer (m, n): ``up`` (m, r), ``down`` (r, n). A convolution (m, n, k, k): ``up`` (m, r, 1, 1), ``down``
    (r, n, k, k). Every scale, alpha / rank among them, is in ``up``. ``bias``: (m,) or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def weight(self) -> torch.Tensor:
        """ΔW in the layer's own shape."""
        return (self.up.flatten(1) @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])

    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self if tensor is not None)

    def balanced(self) -> Update:
        """The same, with factors of one size: so neither leaves float16's range. A power of two changes no digit."""
        up, down = self.up.abs().max().item(), self.down.abs().max().item()
        if not (up > 0 and down > 0):
            return self
        balance = 2.0 ** round(math.log2(down / up) / 2)
        return Update(self.up * balance, self.down / balance, self.bias)

    @classmethod
    def dense(cls, delta: torch.Tensor, bias: torch.Tensor | None = None) -> Update:
        """Any ΔW, exactly: one factor is the identity of the layer's smaller side."""
        m, n = delta.shape[0], delta.shape[1:].numel()
        if m <= n:
            eye = torch.eye(m, dtype=delta.dtype, device=delta.device)
            return cls(eye.reshape(m, m, *[1] * (delta.ndim - 2)), delta, bias)
        eye = torch.eye(n, dtype=delta.dtype, device=delta.device)
        return cls(delta.reshape(m, n, *[1] * (delta.ndim - 2)), eye.reshape(n, *delta.shape[1:]), bias)


@torch.no_grad()
def measured_update(layer: nn.Module, base: nn.Module) -> Update:
    """What a layer that acts linearly on its input adds to the base layer, read off its outputs at 0 and I.

    It needs to know nothing of the method: OFT's rotations and DoRA's magnitudes are a ΔW like any other.

    Args:
        layer: an adapted ``nn.Linear``, its adapter active, in evaluation mode; or a convolution without padding.
        base: the same layer without it.
    """
    weight = base.weight
    shape = weight.shape[1:]
    eye = torch.eye(shape.numel(), dtype=weight.dtype, device=weight.device).reshape(-1, *shape)
    zero = torch.zeros_like(eye[:1])
    offset = (layer(zero) - base(zero)).flatten(1)  # (1, m)
    delta = ((layer(eye) - base(eye)).flatten(1) - offset).T.reshape(weight.shape)
    return Update.dense(delta, offset[0] if bool(offset.any()) else None)
