"""NoRA's mathematics on plain tensors: no files, no modules, no global random state.

The names are the paper's (NoRA, arXiv 2408.10280): ``h = W x + s B B' A' A x`` with W (m, n), A (r, n), B (m, r) frozen
and A' (r', r), B' (r, r') trained. ``outer_r`` is its r, ``r`` its r'.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

# Below this ratio sigma_r / sigma_1 the eigenvalues of the Gram matrix (sigma squared) have lost too many of float64's
# 16 digits to give V = Mᵀ U / sigma, and LAPACK's SVD, 1.8 times slower at 1280 x 1280, takes over.
GRAM_CONDITION_LIMIT = 1e-6
# Entries this close to a row's largest magnitude count as tied, so that rounding can't choose the sign.
SIGN_TIE = 1e-6
# Chosen by captured energy: with 6 at least .9995 of the optimum in the mean and .99 in the worst layer.
SUBSPACE_STEPS = 6
# Below this ratio sigma_r / sigma_1 float32 has lost the right vectors' orthogonality.
SUBSPACE_CONDITION_LIMIT = 1e-4
OUTER_PARTS = ("top", "middle", "last")
# Directions whose singular value is below this share of the largest are no part of outer_part="middle" or "last": in
# float32, W times such a direction is mostly what rounding of the direction has left in it of the others.
SMALLEST_DIRECTION = 1e-4
STATISTIC_FLOOR = 1e-3
REFERENCE_LORA_RANK = 4
SKETCH_SEED = 240810280
SKETCH_SIZE = 4
FINGERPRINT_SHAPE = (3, 1 + SKETCH_SIZE)  # W, A, B
FINGERPRINT_TOLERANCE = 1e-3
DEVICES_WITHOUT_FLOAT64 = {"mps"}


class OuterFactors(NamedTuple):
    """The frozen pair: ``A`` (r, n) and ``B`` (m, r), float32."""

    A: torch.Tensor
    B: torch.Tensor


def where_float64_is(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or on the CPU if its device has no float64."""
    return tensor.cpu() if tensor.device.type in DEVICES_WITHOUT_FLOAT64 else tensor


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64: on its own device, or on the CPU if that has none."""
    return where_float64_is(tensor).double()


def canonical_statistic(statistic: torch.Tensor) -> torch.Tensor:
    """Per-channel statistic (n,) in units of its own mean, rounded to float16: the form that is used and stored.

    A global rescale of the statistic cancels in ΔW, and S is a heuristic that half precision serves well; rounding it
    *before* the factors are computed lets a file hold 2 bytes a channel and still give back exactly the same A and B.
    The ratio to the mean is at most n, so float16 holds it for every n up to 65504. A float16 statistic is taken to be
    in this form already.

    Raises:
        ValueError: if an entry is negative or not finite, or if all are zero.
    """
    canonical = statistic.dtype == torch.float16
    statistic = float64(statistic.detach())
    if not bool(torch.isfinite(statistic).all()) or bool((statistic < 0).any()):
        bad = statistic[~torch.isfinite(statistic) | (statistic < 0)][0].item()
        raise ValueError(
            f"a channel's statistic is {bad}, it must be finite and at least 0: look for NaN activations in calibration"
        )
    mean = statistic.mean()
    if mean <= 0:
        raise ValueError(
            "every channel's statistic is 0, so no channel can be weighted: calibrate on real inputs, or use "
            'outer_init="svd"'
        )
    # A second division by a mean that rounding moved off 1 could round some channels the other way.
    return (statistic if canonical else statistic / mean).half()


def awsvd_scale(statistic: torch.Tensor, gamma: float, floor: float = STATISTIC_FLOOR) -> torch.Tensor:
    """Diagonal of S, ``S_j = statistic_j ** gamma`` (n,) float64, floored and with mean 1.

    Eq. 3 has gamma 0.5 (its printed axis is wrong: S is n x n); the authors' code has 1.0. Deviation: the paper leaves
    dead channels unguarded, and one zero makes S singular; here ``S = max(S, floor * mean(S))``. The unit mean keeps A
    and B at the weights' own magnitude whatever the activations' units are, which matters in half precision.
    """
    scale = float64(statistic) ** gamma
    scale = scale.clamp_min(floor * scale.mean())
    return scale / scale.mean()


def fix_signs(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip the pairs (row of A, column of B) so that each row of A has its largest-magnitude entry positive.

    An SVD is unique only up to these signs. Among entries tied to within ``SIGN_TIE`` the first one decides.
    """
    magnitude = A.abs()
    tied = magnitude >= (1 - SIGN_TIE) * magnitude.amax(dim=1, keepdim=True)
    first = tied.int().argmax(dim=1, keepdim=True)  # (r, 1): argmax of 0/1 gives the first tied entry
    signs = torch.where(A.gather(1, first) < 0, -1.0, 1.0).to(A.dtype)  # (r, 1)
    return A * signs, B * signs.T


def truncated_svd(M: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact leading singular triplets of a float64 matrix (m, n): U (m, r), sigma (r,), Vᵀ (r, n).

    By the eigenvectors of the Gram matrix of the smaller side, or by LAPACK's SVD where that would lose precision.
    Deviation from the authors' code, whose ``svd_lowrank(niter=2)`` gives another basis on every call.
    """
    if M.shape[0] > M.shape[1]:
        U, sigma, Vt = truncated_svd(M.T, r)
        return Vt.T, sigma, U.T
    eigenvalues, U = torch.linalg.eigh(M @ M.T)  # ascending
    sigma = eigenvalues.flip(0)[:r].clamp_min(0).sqrt()
    if sigma[-1] > GRAM_CONDITION_LIMIT * sigma[0]:
        U = U.flip(1)[:, :r]
        return U, sigma, (U.T @ M) / sigma[:, None]
    U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :r], sigma[:r], Vt[:r]


def partial_svd(M: torch.Tensor, r: int, part: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """r exact singular triplets of a float64 matrix (m, n): the "top", "middle" or "last" ones; see `truncated_svd`.

    Middle and last among those with a singular value of at least SMALLEST_DIRECTION of the largest.

    Raises:
        ValueError: if there are fewer than r of these.
    """
    if part == "top":
        return truncated_svd(M, r)
    U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
    count = int((sigma >= SMALLEST_DIRECTION * sigma[0]).sum())
    if count < r:
        raise ValueError(
            f"outer_part={part!r} needs {r} singular directions that don't vanish, and the weight has {count}: lower "
            f"outer_r to at most {count}"
        )
    first = (count - r) // 2 if part == "middle" else count - r
    return U[:, first : first + r], sigma[first : first + r], Vt[first : first + r]


def outer_factors(
    W: torch.Tensor, r: int, scale: torch.Tensor | None = None, sigma_side: str = "B", part: str = "top"
) -> OuterFactors:
    """``W S = U Σ Vᵀ``; ``B = U_r Σ_r``, ``A = V_rᵀ S⁻¹`` (Eq. 4, 5, 7; Eq. 6 forgets S⁻¹).

    Args:
        W: weight (m, n), any floating dtype; the decomposition runs in float64.
        r: outer rank, at most min(m, n).
        scale: diagonal of S (n,); None means S = I, the plain SVD.
        sigma_side: where Σ goes: "B" (the paper), "A", or "both" (√Σ on each; Table 8).
        part: which singular directions; see `partial_svd`, also for what it raises.
    """
    M = float64(W)
    S = M.new_ones(W.shape[1]) if scale is None else float64(scale).to(M)
    U, sigma, Vt = partial_svd(M * S, r, part)
    on_B = {"B": sigma, "A": torch.ones_like(sigma), "both": sigma.sqrt()}[sigma_side]
    on_A = {"B": torch.ones_like(sigma), "A": sigma, "both": sigma.sqrt()}[sigma_side]
    A, B = fix_signs(on_A[:, None] * Vt / S, U * on_B)
    return OuterFactors(A.float().contiguous().to(W.device), B.float().contiguous().to(W.device))


def iterated_factors(
    W: torch.Tensor, r: int, scale: torch.Tensor | None = None, sigma_side: str = "B", side: str = "input"
) -> OuterFactors:
    """`outer_factors` by seeded subspace iteration in float32: nearly the best subspace, many times faster.

    SUBSPACE_STEPS times ``Q ← orth((W S)(W S)ᵀ Q)`` from a frozen Gaussian start with a quarter more columns than r (at
    least 8), then Rayleigh-Ritz (Halko et al., arXiv 0909.4061, Algorithm 4.4). Deviation from the paper, whose factors
    are the exact SVD's: any basis of the same subspace gives the same family of updates, and this one is a smooth
    function of W, where an exact singular vector depends on the gap to its neighbour. Captured energy against the
    optimum: docs/performance.md. Small or nearly rank-deficient weights take `outer_factors`.

    Args:
        side: which of the SVD's two relations holds to rounding (see `nested`), as no pair from an iteration has both:
            "input", ``B = W R``; or "output", ``A = L W``, for weights with fewer outputs than inputs.
    """
    columns = r + max(8, r // 4)
    if columns >= min(W.shape):
        return outer_factors(W, r, scale, sigma_side)
    wide = where_float64_is(W).float()  # a device without float64 lacks these decompositions too
    S = wide.new_ones(W.shape[1]) if scale is None else scale.to(wide)
    M = wide * S
    if W.shape[0] > W.shape[1]:
        M = M.T
    Q = gaussian(M.shape[0], columns).to(M.device)  # (k, columns)
    for _ in range(SUBSPACE_STEPS):
        Q = torch.linalg.qr(M @ (M.T @ Q))[0]
    projected = Q.T @ M
    eigenvalues, U = torch.linalg.eigh((projected @ projected.T).double())  # ascending
    sigma = eigenvalues.flip(0)[:r].clamp_min(0).sqrt()
    if not bool(sigma[-1] > SUBSPACE_CONDITION_LIMIT * sigma[0]):
        return outer_factors(W, r, scale, sigma_side)
    turned, sigma = U.flip(1)[:, :r].to(M), sigma.to(M)
    left, right = Q @ turned, (turned.T @ projected) / sigma[:, None]  # (k, r), (r, l)
    if W.shape[0] > W.shape[1]:
        left, right = right.T, left.T
        M = M.T
    on_A = {"B": torch.ones_like(sigma), "A": sigma, "both": sigma.sqrt()}[sigma_side]
    on_B = {"B": torch.ones_like(sigma), "A": 1 / sigma, "both": sigma.rsqrt()}[sigma_side]
    A, B = fix_signs(on_A[:, None] * right / S, (left * sigma if side == "output" else M @ right.T) * on_B)
    return OuterFactors(A.contiguous().to(W.device), B.contiguous().to(W.device))


@functools.lru_cache(maxsize=8)
def gaussian(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) normal numbers, float32, the same everywhere: NumPy's legacy stream is frozen, torch's is not."""
    return torch.from_numpy(np.random.RandomState(SKETCH_SEED).standard_normal((rows, columns))).float()


def random_factors(W: torch.Tensor, r: int, seed: int, sigma_side: str = "B") -> OuterFactors:
    """Gaussian A and B with the Frobenius norms that the plain SVD of W would give them (Table 4's "Random").

    Deviation from the authors' code, which leaves B at zero: in a serial cell that pins ΔW to 0 for ever. NumPy's
    legacy generator draws them, because its stream is frozen across versions and machines while torch's is not.
    """
    svd = outer_factors(W, r, sigma_side=sigma_side)
    draws = np.random.RandomState(seed)
    A = torch.from_numpy(draws.standard_normal(svd.A.shape)).float().to(svd.A.device)
    B = torch.from_numpy(draws.standard_normal(svd.B.shape)).float().to(svd.B.device)
    return OuterFactors(A * (svd.A.norm() / A.norm()), B * (svd.B.norm() / B.norm()))


def rounding_gain(W: torch.Tensor, scale: torch.Tensor | None, A: torch.Tensor, L: torch.Tensor) -> float:
    """How far rounding y = W x by a relative ε moves ``A x = L y``, in units of ε: root mean square over A's rows.

    ``√(mean_i ‖L_i‖² / ‖A_i S‖² · ‖W S‖_F² / m)``, for x of covariance S² and rounding that is independent of it.
    """
    S = 1.0 if scale is None else scale.to(A)
    rows = L.square().sum(dim=1) / (A * S).square().sum(dim=1)
    return (rows.mean() * (W.to(A) * S).square().sum() / W.shape[0]).sqrt().item()


def matched_std(
    shape: tuple[int, int],
    r: int,
    scaling: float,
    A: torch.Tensor,
    norm_B: float,
    statistic: torch.Tensor | None = None,
) -> float:
    """Standard deviation of A' for which, with B' = 0, Adam's first step moves W x as far as a rank-4 LoRA's.

    ``τ = √(m Σ_j d_j²) / (s √(r_L r') ‖B‖_F ‖A D‖_F)``, r_L = 4, D = diag(d) with the activations' channel statistic d
    (n,), or I where it isn't known. Adam's first step writes ±lr into B', so
    ``E‖δΔW D‖² = lr² s² r' τ² ‖A D‖² ‖B‖²``; for LoRA with A ~ N(0, 1/r_L²) it is ``lr² m Σ d² / r_L``.

    Not in the paper, whose N(0, σ²) on both factors learns 10-25 times slower at first at LoRA's learning rate. With
    D = I and AwSVD, quiet channels dominate ‖A‖_F: measured at gamma 0.5, (320, 320), rank (64, 8), channel sizes
    log-normal with log-std 0.3, 1, 2, the first step's change of the output is 1.1, 1.0, 0.4 of LoRA's; weighted by the
    statistic it is 1.1, 0.9, 1.1.
    """
    m, n = shape
    A = float64(A)
    d = A.new_ones(n) if statistic is None else float64(statistic).to(A)
    norms = norm_B * (A * d).norm().item()
    return math.sqrt(m) * d.norm().item() / (scaling * math.sqrt(REFERENCE_LORA_RANK * r) * norms)


def sketch(M: torch.Tensor) -> torch.Tensor:
    """Numeric fingerprint of a matrix (m, n): ``[‖M‖_F, u_iᵀ M v_i / ‖M‖_F]`` (1 + SKETCH_SIZE,) float64.

    u_i, v_i are seeded Gaussian vectors, so the mean square of the difference of two sketches estimates, without bias,
    ``‖M − M'‖² / ‖M‖²``: rounding shows as rounding, and a sign flip, a permutation or a rotation at its real size.
    """
    M = float64(M)
    u, v = (vectors.to(M.device) for vectors in _sketch_vectors(*M.shape))
    norm = M.norm()
    projections = ((u @ M) * v).sum(dim=1) / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([norm[None], projections]).cpu()


@functools.lru_cache(maxsize=64)  # a model has few shapes and many layers
def _sketch_vectors(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The u_i (SKETCH_SIZE, m) and v_i (SKETCH_SIZE, n) of `sketch`."""
    draws = np.random.RandomState(SKETCH_SEED)
    u, v = (torch.from_numpy(draws.standard_normal((SKETCH_SIZE, size))) for size in (m, n))
    return u, v


def fingerprint(W: torch.Tensor, outer: OuterFactors) -> torch.Tensor:
    """Sketches of W, A and B, one row each: (3, 1 + SKETCH_SIZE) float32."""
    return torch.stack([sketch(W), sketch(outer.A), sketch(outer.B)]).float()


def sketch_distance(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Estimated relative Frobenius distances (...) between the matrices that sketches (..., 1 + SKETCH_SIZE) are of."""
    expected, found = expected.cpu().double(), found.cpu().double()
    norm = expected[..., 0].clamp_min(torch.finfo(torch.float64).tiny)
    by_norm = (found[..., 0] - expected[..., 0]).abs() / norm
    by_projection = (found[..., 1:] - expected[..., 1:]).square().mean(dim=-1).sqrt()
    return torch.maximum(by_norm, by_projection)
