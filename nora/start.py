"""Where the trained matrices start."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .cells import Cell
from .config import NoraConfig
from .functional import OuterFactors, matched_std


class Spread(NamedTuple):
    """Of a matrix's first numbers: their standard deviation, or the bound of a uniform distribution; 0: zeros."""

    size: float
    uniform: bool = False

    @property
    def bound(self) -> float:
        """Of the uniform distribution with the same variance."""
        return self.size if self.uniform else math.sqrt(3) * self.size


def spreads(
    config: NoraConfig,
    shapes: dict[str, tuple[int, int]],
    layer_shape: tuple[int, int],
    scaling: float,
    outer: OuterFactors | None,
    A: torch.Tensor,
    norm_B: float,
    statistic: torch.Tensor | None,
) -> dict[str, Spread]:
    """Name of each trained matrix, in the cell's order -> how its start is drawn.

    "matched" is `matched_std` of the second to last, with the last at 0: LoRA of rank 4's first step in every cell.
    What serial ab has before them starts at ``A' ~ N(0, 1/r)``, ``B' ~ N(0, 1/r')``.

    Args:
        outer: the pair, where `needs_pair` says so.
        norm_B: ‖B‖_F.
    """
    cell, names = config.cell, list(shapes)
    if config.inner_init == "normal":
        return dict.fromkeys(names, Spread(config.inner_std))
    found = {
        name: Spread(1 / math.sqrt(shape[1]), config.inner_init == "zero_uniform") for name, shape in shapes.items()
    }
    found[names[-1]] = Spread(0.0)
    if config.inner_init != "matched" or len(names) == 1:
        return found
    second = names[-2]
    before = cell.chain[: cell.chain.index(second)]
    if not before:
        right = torch.ones(1, layer_shape[1])  # the identity's norm, and its norm under any statistic
    elif before == ("A",):
        right = A
    else:
        assert outer is not None
        right = outer.B.float() @ outer.A.float()  # (m, n)
        if len(names) > 2:  # E‖B B' A' A‖² = ‖B‖² ‖A‖² / r
            right = right / right.norm() * norm_B * A.float().norm() / math.sqrt(len(A))
    left = norm_B if cell.chain[-1] == "B" else math.sqrt(layer_shape[0])
    found[second] = Spread(matched_std(layer_shape, shapes[second][0], scaling, right, left, statistic))
    return found


def needs_pair(cell: Cell) -> bool:
    """Whether the matched start needs B itself, beside its norm."""
    names = [name for name in cell.chain if name in cell.trained]
    return len(names) > 1 and "B" in cell.chain[: cell.chain.index(names[-2])]


def drawn(shape: tuple[int, int], spread: Spread) -> torch.Tensor:
    """On the CPU, so that ``torch.manual_seed`` gives the same start on every device."""
    if spread.size == 0:
        return torch.zeros(shape)
    start = torch.randn(shape)
    return start.uniform_(-spread.size, spread.size) if spread.uniform else start * spread.size


def diagonals(shapes: dict[str, tuple[int, int]], sigma: torch.Tensor) -> dict[str, torch.Tensor]:
    """diag(Σ) in both inner factors, cut to their shapes (the paper's Table 5)."""
    starts = {}
    for name, (rows, columns) in shapes.items():
        starts[name] = torch.zeros(rows, columns)
        starts[name].fill_diagonal_(1.0).mul_(sigma[:columns] if columns >= rows else sigma[None, :columns])
    return starts
