"""One layer's tensors, as files hold them -> its update. ``s`` is alpha / rank, and 1 where a file says no alpha."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from methods.update import Update

Parts = dict[str, torch.Tensor]  # by the names of `keys.PARTS`; what a formula uses it takes out
Scaling = Callable[[int], float]  # rank -> s


def layer_update(parts: Parts, weight: torch.Tensor, scaling: Scaling) -> Update:
    """The update of a layer with the given base weight (m, n) or (m, n, k, k).

    Raises:
        ValueError: a tensor is missing, or shapes don't fit each other or the base. It goes on from "adapter PATH",
            with "{layer}" for the layer's name.
    """
    if {"down", "up"} & parts.keys():
        update = lora(parts, scaling)
    elif any(name.startswith("hada") for name in parts):
        update = loha(parts, scaling)
    elif any(name.startswith("lokr") for name in parts):
        update = lokr(parts, scaling)
    elif "diff" in parts:
        update = Update.dense(parts.pop("diff"))
    elif "diff_b" in parts:
        update = Update(torch.zeros(len(weight), 1), torch.zeros(1, *weight.shape[1:]))
    else:
        raise ValueError(f"has only {min(parts, default='an alpha')} for {{layer}}: the file is incomplete")
    update = _shaped(update, weight)
    for name in ("magnitude", "dora_scale"):
        if name in parts:
            update = dora(update, weight, parts.pop(name), by_shape=name == "dora_scale")
    return _with_bias(update, parts.pop("diff_b", None), len(weight))


def lora(parts: Parts, scaling: Scaling) -> Update:
    """``s up · down``; Tucker's ``mid`` (r, r, k, k) stands between the two. A bias is PEFT's ``s b``."""
    if not {"down", "up"} <= parts.keys():
        only = "lora_A" if "down" in parts else "lora_B"
        raise ValueError(f"has only {only} for {{layer}}: the file is incomplete")
    up, down = parts.pop("up"), parts.pop("down")
    if min(up.ndim, down.ndim) < 2 or not min(*up.shape, *down.shape):
        raise ValueError(f"has lora_A {_shape(down)} and lora_B {_shape(up)} for {{layer}}: the file is damaged")
    rank, mid, bias = down.shape[0], parts.pop("mid", None), parts.pop("up_bias", None)
    inner = rank if mid is None else mid.shape[0]
    if up.flatten(1).shape[1] != inner:
        raise ValueError(f"has rank {rank} in lora_A and {up.flatten(1).shape[1]} in lora_B for {{layer}}")
    scale = scaling(rank)
    if mid is not None:
        down = torch.einsum("ij...,jn->in...", mid, down.flatten(1))
    return Update(scale * up, down, None if bias is None else scale * bias)


def loha(parts: Parts, scaling: Scaling) -> Update:
    """``s (w1_a w1_b) ∘ (w2_a w2_b)`` (arXiv 2108.06098), of rank r²; Tucker's with t1, t2 (r, r, k, k)."""
    w1_a, w1_b, w2_a, w2_b = (_take(parts, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = w1_b.shape[0]
    if "hada_t1" in parts or "hada_t2" in parts:
        first, second = tucker(_take(parts, "hada_t1"), w1_a, w1_b), tucker(_take(parts, "hada_t2"), w2_a, w2_b)
        return Update.dense(scaling(rank) * first * second)
    up = torch.einsum("mi,mj->mij", w1_a, w2_a).flatten(1)  # (m, r²)
    down = torch.einsum("in,jn->ijn", w1_b, w2_b).flatten(0, 1)  # (r², n)
    return _smaller(Update(scaling(rank) * up, down))


def lokr(parts: Parts, scaling: Scaling) -> Update:
    """``s w1 ⊗ w2`` (LyCORIS, arXiv 2309.14859); each whole or a product, w2 perhaps Tucker's. Both whole: s = 1."""
    rank, factors = None, []
    for name in ("w1", "w2"):
        if f"lokr_{name}" in parts:
            whole = parts.pop(f"lokr_{name}")
            factors.append(Update.dense(whole))
            continue
        a, b = _take(parts, f"lokr_{name}_a"), _take(parts, f"lokr_{name}_b")
        rank = b.shape[0]
        t = parts.pop(f"lokr_t{name[1]}", None)
        factors.append(Update(a, b) if t is None else Update.dense(tucker(t, a, b)))
    (up_1, down_1, _), (up_2, down_2, _) = factors
    up = torch.kron(up_1.flatten(1), up_2.flatten(1))
    down = torch.kron(down_1.flatten(1), down_2.flatten(1))
    # (w1 ⊗ w2) of a convolution is that of its flat kernels: (v, q, k, k) is in the order of v · (q k k)
    return _smaller(Update((1.0 if rank is None else scaling(rank)) * up, down))


def tucker(t: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(m, n, k, k) of a core (r, r, k, k) and factors a (r, m), b (r, n)."""
    return torch.einsum("ij...,im,jn->mn...", t, a, b)


def dora(update: Update, weight: torch.Tensor, magnitude: torch.Tensor, by_shape: bool = False) -> Update:
    """``mag (W + ΔW) / ‖W + ΔW‖ − W`` (DoRA, arXiv 2402.09353), the norm being each output's.

    Args:
        by_shape: a magnitude of shape (1, n, …) is of the inputs, as LyCORIS wrote it at first and OneTrainer does.
    """
    weight = weight.detach().float().cpu()
    m, n = weight.shape[:2]
    by_input = by_shape and magnitude.ndim > 1 and magnitude.shape[:2] == (1, n) and magnitude.numel() == n
    if magnitude.numel() != (n if by_input else m):
        raise ValueError(f"has a magnitude of shape {_shape(magnitude)} for {{layer}}, which is {_size(weight.shape)}")
    kept = 1 if by_input else 0
    whole = weight + update.weight()
    norm = torch.linalg.vector_norm(whole, dim=[d for d in range(weight.ndim) if d != kept], keepdim=True)
    scale = magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return Update.dense(scale * whole - weight, update.bias)


def _with_bias(update: Update, bias: torch.Tensor | None, m: int) -> Update:
    both = [one.flatten() for one in (update.bias, bias) if one is not None]
    for one in both:
        if len(one) != m:
            raise ValueError(f"has a bias of {len(one)} entries for {{layer}}, which has {m} outputs")
    return update._replace(bias=sum(both) if both else None)


def _take(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise ValueError(f"lacks {name} of {{layer}}: the file is incomplete")
    return parts.pop(name)


def _smaller(update: Update) -> Update:
    """As one matrix where the factors are larger than that."""
    m, n = update.up.shape[0], update.down.flatten(1).shape[1]
    return update if update.rank < min(m, n) else Update.dense(update.up.flatten(1) @ update.down.flatten(1))


def _shaped(update: Update, weight: torch.Tensor) -> Update:
    """The factors in the shapes that the base's layer wants: kernels of 1 × 1 are spelled in both ways."""
    m, n, kernel = weight.shape[0], weight.shape[1:].numel(), weight.shape[2:]
    found = tuple(update.down.shape[1:])
    spatial = tuple(size for size in found[1:] if size > 1)
    fits = update.up.shape[0] == m and math.prod(found) == n
    if not fits or len(found) > 1 and spatial != tuple(size for size in kernel if size > 1):
        raise ValueError(
            f"belongs to another base: {{layer}} is {_size((len(update.up), *found))} in the file and "
            f"{_size(weight.shape)} in this base; use the base it was trained on"
        )
    rank, ones = update.rank, [1] * len(kernel)
    return update._replace(up=update.up.reshape(m, rank, *ones), down=update.down.reshape(rank, *weight.shape[1:]))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
