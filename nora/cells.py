"""The paper's design space (NoRA, arXiv 2408.10280, Sec. 3.3, Tables 6, 7): where the trained matrices sit.

``ΔW = s · up · down``, each a product of matrices: the frozen A (r, n) and B (m, r), and trained ones. So a cell is two
chains of names, and one layer, one fold and one file serve them all. m, n: the weight's sides; r: outer rank, the
paper's r; k: rank of the update, its r'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch

FROZEN = ("A", "B")
# The names of trained matrices, in a layer as `nora_{name}` and in an inner-only file as given here.
FILE_NAMES = {"inner_A": "lora_A", "inner_B": "lora_B", "core": "core", "wide_A": "wide_A", "wide_B": "wide_B"}
TRAINED = tuple(FILE_NAMES)
# adapter b trains m x m numbers a layer: above this side more than a million each.
LARGEST_OUTPUT_CORE = 1024


@dataclass(frozen=True)
class Cell:
    """One cell of the design space.

    Args:
        formula: ΔW / s in the names of design documents and docstrings.
        down, up: names of the chain's matrices in the order in which an input passes them.
        trained: name of a trained matrix -> its sides, two of the letters m, n, r, k.

    With the last trained matrix of the chain at 0, ``ΔW = 0`` and its own gradient is not: every cell starts there.
    """

    formula: str
    down: tuple[str, ...]
    up: tuple[str, ...]
    trained: Mapping[str, str]

    @property
    def chain(self) -> tuple[str, ...]:
        return self.down + self.up

    @property
    def last(self) -> str:
        """The trained matrix nearest to the output."""
        return next(name for name in reversed(self.chain) if name in self.trained)

    @property
    def on_input(self) -> bool:
        """Whether B comes last, so that with ``B = W R`` the cell is one on the input: ``W (x + s R … x)``."""
        return self.up[-1] == "B"

    @property
    def is_nested(self) -> bool:
        """Whether it is the paper's own ``B B' A' A``."""
        return self.chain == ("A", "inner_A", "inner_B", "B")

    def shapes(self, m: int, n: int, r: int, k: int) -> dict[str, tuple[int, int]]:
        """Name of each trained matrix -> (rows, columns), in the chain's order."""
        sides = {"m": m, "n": n, "r": r, "k": k}
        names = [name for name in self.chain if name in self.trained]
        return {name: (sides[self.trained[name][0]], sides[self.trained[name][1]]) for name in names}

    def factors(self, matrices: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """``up`` (m, ·) and ``down`` (·, n) from all matrices of the chain; ``ΔW = s · up · down``."""
        return product(self.up, matrices), product(self.down, matrices)


def product(names: tuple[str, ...], matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrices' product, the first one rightmost."""
    return reduce(lambda done, name: matrices[name] @ done, names[1:], matrices[names[0]])


# (structure, position). The parallel cells hold B A ≈ W itself, which would double W: only their deviation from it.
CELLS: dict[tuple[str, str], Cell] = {
    ("serial", "a"): Cell("B B' A' A", ("A", "inner_A"), ("inner_B", "B"), {"inner_A": "kr", "inner_B": "rk"}),
    ("adapter", "a"): Cell("B R A", ("A",), ("core", "B"), {"core": "rr"}),
    ("parallel", "a"): Cell("B C' A''", ("inner_A",), ("inner_B", "B"), {"inner_A": "kn", "inner_B": "rk"}),
    ("serial", "b"): Cell("D₂ D₁ B A", ("A", "B", "inner_A"), ("inner_B",), {"inner_A": "km", "inner_B": "mk"}),
    ("adapter", "b"): Cell("R B A", ("A",), ("B", "core"), {"core": "mm"}),
    ("parallel", "b"): Cell("C A' A", ("A", "inner_A"), ("inner_B",), {"inner_A": "kr", "inner_B": "mk"}),
    ("serial", "ab"): Cell(
        "D₂ D₁ B B' A' A",
        ("A", "inner_A", "inner_B", "B", "wide_A"),
        ("wide_B",),
        {"inner_A": "kr", "inner_B": "rk", "wide_A": "km", "wide_B": "mk"},
    ),
    # no frozen factors: LoRA's own pair, for generators
    ("plain", "a"): Cell("B A", ("inner_A",), ("inner_B",), {"inner_A": "kn", "inner_B": "mk"}),
}
STRUCTURES = tuple(dict.fromkeys(structure for structure, _ in CELLS))
POSITIONS = tuple(dict.fromkeys(position for _, position in CELLS))
