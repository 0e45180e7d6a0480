"""Weighted sums of adapters that share their outer factors."""

from __future__ import annotations

import torch

from .functional import OuterFactors, fix_signs, float64

InnerFactors = tuple[torch.Tensor, torch.Tensor]  # A' (r', r), B' (r, r')


def concatenated(parts: list[tuple[float, InnerFactors]]) -> InnerFactors:
    """``Σ_i c_i B'_i A'_i`` exactly, as one pair of rank Σ r'_i: c_i A'_i stacked, B'_i side by side."""
    wide = torch.promote_types(parts[0][1][0].dtype, torch.float32)
    inner_A = torch.cat([c * inner_A.to(wide) for c, (inner_A, _) in parts], dim=0)
    inner_B = torch.cat([inner_B.to(wide) for _, (_, inner_B) in parts], dim=1)
    return inner_A, inner_B


def truncated(core: InnerFactors, outer: OuterFactors, rank: int) -> InnerFactors:
    """The pair of the given rank whose ``B B' A' A`` is nearest in Frobenius norm to that of ``core``.

    With the QR factors ``B = Q_B R_B``, ``Aᵀ = Q_A R_A`` the norm is that of the small matrix ``R_B B' A' R_Aᵀ``: cut
    its SVD and solve R_B, R_A away again. Float64 throughout, the result too.
    """
    inner_A, inner_B = (float64(factor) for factor in core)
    R_B = torch.linalg.qr(float64(outer.B))[1]  # (r, r)
    R_A = torch.linalg.qr(float64(outer.A).T)[1]  # (r, r)
    U, sigma, Vt = torch.linalg.svd((R_B @ inner_B) @ (inner_A @ R_A.T))
    root = sigma[:rank].sqrt()
    Vt, U = fix_signs(root[:, None] * Vt[:rank], U[:, :rank] * root)
    new_A = torch.linalg.solve(R_A, Vt.T).T
    new_B = torch.linalg.solve(R_B, U)
    return new_A, new_B
