"""From a frozen layer to its outer factors: statistic, cached decomposition, fingerprint, and the check against one."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .cache import cached_tensors
from .config import NoraConfig
from .functional import (
    FINGERPRINT_TOLERANCE,
    STATISTIC_FLOOR,
    OuterFactors,
    awsvd_scale,
    canonical_statistic,
    fingerprint,
    float64,
    iterated_factors,
    outer_factors,
    random_factors,
    rounding_gain,
    sketch,
    sketch_distance,
)
from .nested import RightFactor, left_factor, right_factor, right_product

COMPUTING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Where rounding of W x would be amplified more than this, the product stays on the input: docs/performance.md.
LARGEST_ROUNDING_GAIN = 1.5
_STATISTICS_ATTRIBUTE = "_nora_statistics"


class Basis(NamedTuple):
    """A layer's frozen factors with what identifies them.

    A (r, n); B (m, r), or None where it is ``W R`` with R of `right`. On the output side `A` is L (r, m), m < n, and
    the pair is ``L W`` and R (see `nested`). Fingerprint (3, k), None on the meta device; float16 statistic (n,), or
    None.
    """

    A: torch.Tensor
    B: torch.Tensor | None
    right: RightFactor | None
    fingerprint: torch.Tensor | None
    statistic: torch.Tensor | None

    def at(self, device: torch.device) -> Basis:
        """With what a layer computes with on a device."""
        right = None if self.right is None else RightFactor(*(one.to(device) for one in self.right))
        return self._replace(A=self.A.to(device), B=None if self.B is None else self.B.to(device), right=right)

    def to(self, dtype: torch.dtype) -> Basis:
        """With the factors in another dtype."""
        return self._replace(A=self.A.to(dtype), B=None if self.B is None else self.B.to(dtype))


def is_transposed(base_layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (in, out), as GPT-2's Conv1D does."""
    return isinstance(base_layer, Conv1D)


def base_weight(base_layer: nn.Module) -> torch.Tensor:
    """The frozen weight as the layer stores it."""
    return cast(torch.Tensor, base_layer.weight)


def is_plain(weight: torch.Tensor) -> bool:
    """Whether it is a matrix of torch's own in a dtype that computes: torchao and bitsandbytes have tensors of theirs.

    A float8 weight only stores; diffusers' layerwise casting has such.
    """
    own = type(weight).__module__.partition(".")[0] == "torch"
    return own and weight.dtype in COMPUTING_DTYPES and weight.ndim == 2


def oriented_weight(base_layer: nn.Module) -> torch.Tensor:
    """The frozen weight as (out, in) = (m, n), detached, whatever way the layer stores it."""
    weight = base_weight(base_layer).detach()
    return weight.T if is_transposed(base_layer) else weight


def layer_shape(base_layer: nn.Module) -> tuple[int, int]:
    """(out, in) = (m, n)."""
    m, n = oriented_weight(base_layer).shape
    return m, n


def attach_statistic(base_layer: nn.Module, kind: str, statistic: torch.Tensor) -> None:
    """Leave a statistic on the layer it was measured at, for the injections that follow; never in a state dict."""
    base_layer.__dict__.setdefault(_STATISTICS_ATTRIBUTE, {})[kind] = statistic


def attached_statistic(base_layer: nn.Module, kind: str) -> torch.Tensor | None:
    """The statistic (n,) that calibration left on the layer, if any."""
    return base_layer.__dict__.get(_STATISTICS_ATTRIBUTE, {}).get(kind)


def build_basis(
    name: str, base_layer: nn.Module, config: NoraConfig, outer_r: int, statistic: torch.Tensor | None = None
) -> Basis:
    """Outer factors of one layer as the config asks; ``statistic`` (n,) for a data-driven AwSVD.

    ``name`` is the module's own, without what wrappers put before it: it seeds random factors.
    On the meta device (to count parameters of a model that isn't there) the pair has its shape and no content.
    """
    W = oriented_weight(base_layer)  # (m, n)
    narrower = takes_output(base_layer, config)
    if config.structure == "plain":  # no factors: a pair of width 0
        outer = OuterFactors(W.new_empty(0, W.shape[1]), W.new_empty(W.shape[0], 0))
        return Basis(*outer, None, None if W.is_meta else fingerprint(W, outer), None)
    if W.is_meta:
        A, B = W.new_empty(outer_r, W.shape[1]), W.new_empty(W.shape[0], outer_r)
        if config.outer_init == "random":
            return Basis(A, B, None, None, None)
        held = B.T if narrower else A
        return Basis(held, None, RightFactor(held.new_empty(held.shape[1]), held.new_empty(outer_r)), None, None)
    if config.outer_init == "random":
        seed = layer_seed(config.outer_seed, name)

        def draw() -> dict[str, torch.Tensor]:
            outer = random_factors(W, outer_r, seed, config.sigma_side)
            return {**outer._asdict(), "fingerprint": fingerprint(W, outer)}

        found = cached_tensors(W, None, ("random", outer_r, config.sigma_side, seed), draw)
        return Basis(found["A"], found["B"], None, found["fingerprint"].cpu(), None)
    scale, used = None, None
    if config.outer_init == "awsvd":
        if config.awsvd_stat == "weight":
            statistic = float64(W).abs().mean(dim=0)  # (n,)
        assert statistic is not None  # whoever calls has looked for it
        used = canonical_statistic(statistic).to(W.device)
        scale = awsvd_scale(used, config.awsvd_gamma)
    part = config.outer_part
    settings: tuple = (config.outer_init, outer_r, config.sigma_side)
    settings += (config.awsvd_gamma, STATISTIC_FLOOR, config.basis)
    if part != "top":
        settings += (part,)
    if narrower:
        settings += ("output",)

    def pair(side: str) -> OuterFactors:
        if config.basis != "exact" and part == "top":
            return iterated_factors(W, outer_r, scale, config.sigma_side, side)
        try:
            return outer_factors(W, outer_r, scale, config.sigma_side, part)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def decompose() -> dict[str, torch.Tensor]:  # of the factor that isn't held, its sketch is enough
        if narrower:
            outer = pair("output")
            L = left_factor(outer.B)
            if rounding_gain(W, scale, outer.A, L) <= LARGEST_ROUNDING_GAIN:  # false for NaN
                return {"A": L, "fingerprint": fingerprint(W, outer)}
        outer = pair("input")
        return {"A": outer.A, "fingerprint": fingerprint(W, outer)}

    found = cached_tensors(W, used, settings, decompose)
    held = found["A"]
    kept = used.cpu() if used is not None and config.needs_statistics else None
    right = right_factor(held, None if is_on_output(held, W.shape[1]) else scale)
    return Basis(held, None, right, found["fingerprint"].cpu(), kept)


def takes_output(base_layer: nn.Module, config: NoraConfig) -> bool:
    """Whether a layer's product may be on the output of W: fewer numbers there, and nothing in the way."""
    m, n = layer_shape(base_layer)
    direct = config.cell.is_nested and not config.has_residual and config.nora_dropout == 0
    return config.side == "narrower" and m < n and direct and base_layer.bias is None


def is_on_output(held: torch.Tensor, n: int) -> bool:
    """Whether the factor that a layer of n inputs holds is L (r, m) rather than A (r, n): only for m < n it can be."""
    return held.shape[1] < n


def held_pair(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor | None, right: RightFactor | None) -> OuterFactors:
    """The pair as an adapted layer computes with it: what is held in the base's dtype, and else ``W R`` or ``L W``."""
    if B is not None:
        return OuterFactors(A, B)
    assert right is not None
    wide = torch.promote_types(W.dtype, torch.float32)
    R = right_product(torch.eye(A.shape[0], device=A.device, dtype=wide), A, right, 1.0)
    if is_on_output(A, W.shape[1]):
        return OuterFactors((A.to(wide) @ W.to(wide)).to(A.dtype), R)
    return OuterFactors(A, W.to(wide) @ R)


def weight_times_columns(base_layer: nn.Module, W: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``W columns`` (m, k) of columns (n, k); of a quantised base what it computes with its weight."""
    weight = base_weight(base_layer)
    if is_plain(weight):
        return W.to(columns) @ columns
    rows = columns.T.to(weight.device, weight.dtype)
    return (base_layer(rows) - base_layer(torch.zeros_like(rows[:1]))).T.to(columns)


def rows_times_weight(base_layer: nn.Module, W: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows W`` (k, n) of rows (k, m); of a quantised base the gradient through what it computes."""
    weight = base_weight(base_layer)
    if is_plain(weight):
        return rows @ W.to(rows)
    with torch.enable_grad():
        x = torch.zeros(len(rows), W.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
        y = base_layer(x)
    return torch.autograd.grad(y, x, rows.to(y))[0].to(rows)


def layer_seed(outer_seed: int, name: str) -> int:
    """Seed of one layer's random factors: a function of the config's seed and the module's name."""
    return int.from_bytes(hashlib.blake2b(f"{outer_seed}:{name}".encode(), digest_size=4).digest(), "little")


def rebuild_basis(
    label: str,
    names: tuple[str, ...],
    base_layer: nn.Module,
    config: NoraConfig,
    outer_r: int,
    statistic: torch.Tensor | None,
    expected: torch.Tensor,
    base_checked: bool = False,
) -> Basis:
    """The basis of a saved adapter, made anew from the base weight and checked against its fingerprint (3, k).

    Args:
        label: names the layer in errors.
        names: the module's own name, then others that may have seeded its random factors.
        base_checked: `check_base` was called just before.

    Raises:
        ValueError: if the base weight or the outer pair isn't the one that the fingerprint was taken of.
    """
    if not base_checked:
        check_base(label, base_layer, expected)
    for name in names if config.outer_init == "random" else names[:1]:
        basis = build_basis(name, base_layer, config, outer_r, statistic)
        if fingerprints_agree(basis.fingerprint, expected):
            return basis
    check_basis(label, basis, expected)
    return basis


def fingerprints_agree(
    one: torch.Tensor | None, other: torch.Tensor, pair_tolerance: float = FINGERPRINT_TOLERANCE
) -> bool:
    """Whether two fingerprints (3, k) are of the same base weight (up to FINGERPRINT_TOLERANCE) and the same pair."""
    limits = (FINGERPRINT_TOLERANCE, pair_tolerance, pair_tolerance)
    if one is None:
        return False
    return all(distance <= limit for distance, limit in zip(sketch_distance(other, one).tolist(), limits))


def pair_fits(base_layer: nn.Module, outer: OuterFactors, expected: torch.Tensor) -> bool:
    """Whether this very pair, as a layer computes with it, is the one of the fingerprint (3, k).

    The fingerprint was taken before the pair was rounded to the base's dtype, which is further off in bfloat16 than
    FINGERPRINT_TOLERANCE.
    """
    rounding = max(FINGERPRINT_TOLERANCE, torch.finfo(outer.A.dtype).eps)
    return fingerprints_agree(fingerprint(oriented_weight(base_layer), outer), expected, rounding)


def check_base(name: str, base_layer: nn.Module, expected: torch.Tensor) -> None:
    """Cheap first check: is this the base weight that the fingerprint (3, k) was taken of?

    Raises:
        ValueError: if it isn't, naming the layer.
    """
    _check_sketch(name, "base weight", expected[0], sketch(oriented_weight(base_layer)).float())


def check_basis(name: str, basis: Basis, expected: torch.Tensor) -> None:
    """Is this the base weight and the outer pair that the fingerprint (3, k) was taken of?

    The limit, FINGERPRINT_TOLERANCE = 1e-3 in relative Frobenius distance, lies far above what another BLAS or float32
    rounding gives (1e-8 to 1e-5) and far below a flipped pair among 128 (0.2) or another base (0.1 and more). A float16
    copy of a float32 base passes on W (3e-4) and then, rightly, only if its basis agrees: rounding rotates singular
    vectors whose singular values lie close together.

    Raises:
        ValueError: if it isn't, naming the layer.
    """
    assert basis.fingerprint is not None  # only a basis on the meta device has none
    for part, saved, found in zip(("base weight", "outer factor A", "outer factor B"), expected, basis.fingerprint):
        _check_sketch(name, part, saved, found)


def _check_sketch(name: str, part: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    distance = sketch_distance(expected, found).item()
    if not distance <= FINGERPRINT_TOLERANCE:  # not "<": a NaN must not pass
        raise ValueError(
            f"{name}: the {part} differs from the one this adapter was trained with (relative distance {distance:.2g}, "
            f"limit {FINGERPRINT_TOLERANCE:g}), and inner weights mean nothing in another basis: load the base it was "
            "trained on, in the same dtype, or a LoRA that fold_nora made of the adapter there"
        )
