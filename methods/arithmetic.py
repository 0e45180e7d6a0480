"""Updates made smaller, added up, and compared, without forming ΔW where its factors do.

All in float64: for ``up · down`` = Q_u R_u (Q_d R_d)ᵀ, what is asked of the large ΔW is asked of the small R_u R_dᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from methods.update import Update

Layers = Mapping[str, Mapping[str, Update]]  # component -> module path -> update


class Compressed(NamedTuple):
    """An update of smaller rank, with the squared norms ‖ΔW‖² of what it holds and of what there was."""

    update: Update
    kept: float
    whole: float


def compressed(update: Update, rank: int | None = None, energy: float | None = None) -> Compressed:
    """The update of a rank that is nearest to the given one in Frobenius norm (Eckart and Young).

    Args:
        rank: at most this.
        energy: or the smallest rank that keeps this share of ‖ΔW‖².
    """
    Q_u, Q_d, core = _core(update)
    U, sigma, Vt = torch.linalg.svd(core, full_matrices=False)
    squares = sigma.square()
    whole = float(squares.sum())
    k = len(sigma) if rank is None else min(rank, len(sigma))
    if energy is not None and whole > 0:
        k = min(k, 1 + int((squares.cumsum(0) < energy * whole * (1 - 1e-12)).sum()))
    root = sigma[:k].sqrt()
    up, down = (Q_u @ U[:, :k]) * root, root[:, None] * (Vt[:k] @ Q_d.T)
    ones = [1] * (update.up.ndim - 2)
    small = Update(up.float().reshape(len(up), k, *ones), down.float().reshape(k, *update.down.shape[1:]), update.bias)
    return Compressed(small, float(squares[:k].sum()), whole)


def conditioned(update: Update) -> Update:
    """The same of singular vectors, whose products don't cancel as PiSSA's do: half precision would leave nothing."""
    return compressed(update).update


def rounded(update: Update, dtype: torch.dtype) -> Update:
    """With factors in a dtype; as they were where float16 would lose numbers so small.

    Raises:
        ValueError: for numbers too large for the dtype.
    """
    cast = Update(*(None if one is None else one.to(dtype) for one in update))
    if not cast.is_finite():
        raise ValueError(f"is too large for {str(dtype).removeprefix('torch.')}: take fp32")
    pairs = zip((cast.up, cast.down), (update.up, update.down))
    worst = max(_relative(one.float() - other, other) for one, other in pairs)
    return cast if worst <= torch.finfo(dtype).eps else update


def added(parts: Sequence[tuple[float, Update]]) -> Update:
    """``Σ w_i ΔW_i`` exactly: factors side by side, of rank Σ r_i, or as one matrix where that is smaller."""
    up = torch.cat([weight * update.up.flatten(1) for weight, update in parts], 1)
    down = torch.cat([update.down.flatten(1) for _, update in parts], 0)
    biases = [weight * update.bias for weight, update in parts if update.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    shape, ones = parts[0][1].down.shape[1:], [1] * (parts[0][1].up.ndim - 2)
    if len(down) > min(len(up), down.shape[1]):
        return Update.dense((up.double() @ down.double()).float().reshape(len(up), *shape), bias)
    return Update(up.reshape(*up.shape, *ones), down.reshape(len(down), *shape), bias)


def added_layers(parts: Sequence[tuple[float, Layers]]) -> dict[str, dict[str, Update]]:
    """The same of whole adapters, which may adapt different layers."""
    places = {(component, path): None for _, layers in parts for component, some in layers.items() for path in some}
    total: dict[str, dict[str, Update]] = {}
    for component, path in places:
        having = [(weight, layers[component][path]) for weight, layers in parts if path in layers.get(component, {})]
        total.setdefault(component, {})[path] = added(having)
    return total


def squared_norm(update: Update) -> float:
    """‖ΔW‖²."""
    return float(_core(update)[2].square().sum())


def largest_difference(found: Layers, expected: Layers) -> tuple[float, str]:
    """``‖ΔW − ΔW'‖ / ‖ΔW'‖`` of the layer where it is largest, and that layer; infinite where one has no layer.

    A layer of zeros is compared with the largest one.
    """
    eps = torch.finfo(torch.float32).eps
    norms = {  # no less than what float32 factors can tell: PiSSA's may cancel to nothing
        f"{component}.{path}": max(squared_norm(update) ** 0.5, eps * float(update.up.norm() * update.down.norm()))
        for component, layers in expected.items()
        for path, update in layers.items()
    }
    names = {f"{component}.{path}" for component, layers in found.items() for path in layers}
    if unlike := names.symmetric_difference(norms):
        return math.inf, min(unlike)
    greatest = max(norms.values(), default=0.0) or 1.0
    worst = (0.0, "")
    for component, layers in expected.items():
        for path, update in layers.items():
            name, other = f"{component}.{path}", found[component][path]
            error = squared_norm(added([(1.0, other._replace(bias=None)), (-1.0, update._replace(bias=None))])) ** 0.5
            zero = torch.zeros(len(update.up))
            biases = [one.bias if one.bias is not None else zero for one in (other, update)]
            error = max(error / (norms[name] or greatest), _relative(biases[0] - biases[1], biases[1]))
            worst = max(worst, (error, name))
    return worst


def _relative(difference: torch.Tensor, of: torch.Tensor) -> float:
    size = float(difference.norm())
    return size / float(of.norm()) if size > 0 and float(of.norm()) > 0 else size


def _core(update: Update) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q_u (m, k), Q_d (n, k) with orthonormal columns, and the core with ``ΔW = Q_u core Q_dᵀ``; float64."""
    Q_u, R_u = torch.linalg.qr(update.up.flatten(1).double())
    Q_d, R_d = torch.linalg.qr(update.down.flatten(1).double().T)
    return Q_u, Q_d, R_u @ R_d.T
