"""The layer's product on one side of the frozen weight, with one factor instead of two: ``h = W (x + s R B' A' A x)``.

AwSVD's factors obey ``B = W R`` with ``R = S² Aᵀ diag(1 / ‖A_i S‖²)`` (n, r): for ``W S = U Σ Vᵀ``, ``A = V_rᵀ S⁻¹``
(NoRA, arXiv 2408.10280, Eq. 4 to 7) it is ``W S V_r = U_r Σ_r``, and with Σ on A or on both sides only powers of σ move
into the diagonal. So W is the only wide product: B is neither stored nor multiplied.

With fewer outputs than inputs the output side is the cheaper one. There ``A = L W`` with ``L = diag(1 / ‖B_i‖²) Bᵀ``
(r, m), and ``h = y + s R B' A' L y`` of ``y = W x`` is the same product with L for A: its R, ``Lᵀ diag(‖B_i‖²)``, is B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .functional import where_float64_is


class RightFactor(NamedTuple):
    """The diagonals of ``R = diag(channel) Aᵀ diag(row)``: ``channel`` = S² (n,), ``row`` = 1 / ‖A_i S‖² (r,).

    On the output side of L: ``channel`` = 1 (m,), ``row`` = 1 / ‖L_i‖² (r,).
    """

    channel: torch.Tensor
    row: torch.Tensor


def right_factor(A: torch.Tensor, scale: torch.Tensor | None) -> RightFactor:
    """R of A (r, n) and the diagonal of S (n,), None for S = I: ``A R = I``, and ``W R`` is AwSVD's B.

    Rows of A must be orthogonal under S, as those of an SVD are.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    exact = where_float64_is(A).double()
    scale = exact.new_ones(A.shape[1]) if scale is None else scale.to(exact)
    row = (exact * scale).square().sum(dim=1).reciprocal()
    return RightFactor(scale.square().to(A.device, wide), row.to(A.device, wide))


def left_factor(B: torch.Tensor) -> torch.Tensor:
    """L (r, m) of B (m, r): ``L B = I`` where B's columns are orthogonal, as those of an SVD are; R of L is B."""
    exact = where_float64_is(B).double()
    return (exact / exact.square().sum(dim=0)).T.contiguous().to(B)


def right_product(inner_B: torch.Tensor, A: torch.Tensor, right: RightFactor, scaling: float) -> torch.Tensor:
    """``s R B'`` (n, r'), in float32 or B's wider dtype."""
    wide = torch.promote_types(inner_B.dtype, torch.float32)
    product = A.to(wide).T @ (right.row.to(wide)[:, None] * inner_B.to(wide))
    return product.mul_(scaling * right.channel.to(wide)[:, None])


def nested_input(
    x: torch.Tensor,
    inner_A: torch.Tensor,
    inner_B: torch.Tensor,
    A: torch.Tensor,
    right: RightFactor,
    scaling: float,
    keep_input: bool = False,
) -> torch.Tensor:
    """``x + s R B' A' A x`` (..., n) of x (..., n), A' (r', r), B' (r, r') and A (r, n), in x's dtype.

    Products of factors with factors are formed in float32 and then rounded to x's dtype; x' is rounded once.

    Args:
        keep_input: keep x for the backward pass instead of ``A x`` and ``A' A x``, r + r' numbers a token. For layers
            whose x is kept by somebody else anyway.
    """
    return _NestedInput.apply(x, inner_A, inner_B, A, right.channel, right.row, scaling, keep_input)  # type: ignore[no-any-return]


class _NestedInput(torch.autograd.Function):
    """With ``P = A' A``, ``Q = s R B'``, ``u = P x`` and g the gradient of x + Q u:

    ``∇x = g + Pᵀ Qᵀ g``, ``∇A' = Σ (Qᵀ g) (A x)ᵀ`` and ``∇B' = s Rᵀ Σ g uᵀ``, all sums over tokens.
    """

    @staticmethod
    def forward(ctx, x, inner_A, inner_B, A, channel, row, scaling, keep_input):
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, x.shape[-1])
            Q = right_product(inner_B, A, RightFactor(channel, row), scaling).to(x.dtype)
            if keep_input:
                kept, u = x, tokens @ _product(inner_A, A).to(x.dtype).T
            else:
                kept = tokens @ A.to(x.dtype).T  # (tokens, r)
                u = kept @ inner_A.to(x.dtype).T  # (tokens, r')
            ctx.save_for_backward(kept, u, inner_A, inner_B, A, channel, row)
            ctx.scaling, ctx.keep_input = scaling, keep_input
            return torch.addmm(tokens, u, Q.T).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kept, u, inner_A, inner_B, A, channel, row = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1])
            Q = right_product(inner_B, A, RightFactor(channel, row), ctx.scaling).to(g.dtype)
            v = g @ Q  # (tokens, r')
            grad_x = grad_A = grad_B = None
            if ctx.needs_input_grad[0]:
                grad_x = torch.addmm(g, v, _product(inner_A, A).to(g.dtype)).view_as(grad)
            if ctx.needs_input_grad[1]:
                grad_A = v.T @ kept.reshape(-1, kept.shape[-1])  # (r', n) if x was kept, else (r', r)
                grad_A = (grad_A.to(inner_A.dtype) @ A.T.to(inner_A.dtype)) if ctx.keep_input else grad_A
                grad_A = grad_A.to(inner_A.dtype)
            if ctx.needs_input_grad[2]:
                wide = torch.promote_types(inner_B.dtype, torch.float32)
                grad_Q = (g.T @ u).to(wide) * (ctx.scaling * channel.to(wide)[:, None])  # (n, r')
                grad_B = (row.to(wide)[:, None] * (A.to(wide) @ grad_Q)).to(inner_B.dtype)
        return grad_x, grad_A, grad_B, None, None, None, None, None


def _product(inner_A: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """``A' A`` (r', n), in float32 or A's wider dtype."""
    wide = torch.promote_types(inner_A.dtype, torch.float32)
    return inner_A.to(wide) @ A.to(wide)
