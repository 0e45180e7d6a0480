"""NoraConfig: every choice of the method, checked on construction."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from .cells import CELLS, LARGEST_OUTPUT_CORE, POSITIONS, STRUCTURES, Cell
from .functional import OUTER_PARTS
from .generators import GENERATORS
from .registration import NAME

DEFAULT_OUTER_MULTIPLE = 8

_CHOICES = {
    "structure": STRUCTURES,
    "position": POSITIONS,
    "outer_init": ("awsvd", "svd", "random"),
    "outer_part": OUTER_PARTS,
    "awsvd_stat": ("mean_abs", "rms", "weight"),
    "sigma_side": ("B", "A", "both"),
    "basis": ("iterated", "exact"),
    "side": ("narrower", "input"),
    "inner_init": ("matched", "normal", "zero_uniform", "diag"),
    "scaling": ("alpha/r", "alpha/sqrt(r)"),
    "generator": GENERATORS,
}


class LayerRanks(NamedTuple):
    """What one layer gets: ``r`` (the update's rank), ``outer_r``, s, and whether outer_r was cut to fit."""

    r: int
    outer_r: int
    scaling: float
    cut: bool


@dataclass
class NoraConfig(PeftConfig):
    """Configuration of NoRA, ``h = W x + s B B' A' A x`` (arXiv 2408.10280), s = nora_alpha / r.

    Args:
        r: rank of the update: the paper's r'. Trained parameters per layer are ``2 r outer_r``.
        outer_r: outer rank, the paper's r: the width of the frozen pair A (outer_r, n), B (m, outer_r). None means 8 r,
            or a layer's smaller side where that is less (logged once); a number that a layer can't hold is refused.
        nora_alpha: s = nora_alpha / r. None means r, that is s = 1, which is what the paper always uses.
        scaling: "alpha/r", or "alpha/sqrt(r)" (rsLoRA, arXiv 2312.03732).
        structure, position: the cell of the paper's design space (Sec. 3.3; `cells.CELLS`): "serial" at "a" is NoRA,
            "b" and "ab" its other places; "adapter" (at "a" it is LoRA-XS, arXiv 2405.17604) trains one matrix, of
            rank r = outer_r; "parallel" is the deviation from B A. "plain" is LoRA's pair, without frozen factors.
        target_modules: names, a regular expression, or "all-linear", as in every PEFT method. ``nn.Linear`` and
            transformers' ``Conv1D``.
        outer_init: "awsvd" (activation-aware SVD of W), "svd", or "random" (Gaussian at the SVD's Frobenius norms).
            None: "awsvd" where `preprocess_nora` has measured the model, else "svd" with a warning; injection writes
            here which.
        outer_part: which singular directions: the "top" r, the "middle" or the "last" ones among those whose singular
            value is at least 1e-4 of the largest: a vanishing one would make a column of B zero, and pin the update
            there to 0. Always exact, since the iteration finds leading directions alone.
        awsvd_gamma: exponent of the statistic in S: 0.5 in the paper's Eq. 3, 1.0 in the authors' code.
        awsvd_stat: what S measures per input channel: "mean_abs" or "rms" of the activations (both need
            `preprocess_nora`), or "weight", the data-free mean |W| of the channel's column.
        sigma_side: where Σ goes: "B" (the paper), "A" or "both" (√Σ each).
        basis: how the SVD is computed: "iterated" (seeded subspace iteration, fast and as reproducible) or "exact" (the
            paper's). None: "iterated", or "exact" in a saved config, which is what files from before this choice hold.
        side: where a layer adds its product, and so which factor it holds (see `nested`): on the "input" of W, or on
            its "narrower" side, which is the output where a layer has fewer outputs than inputs, no bias, no dropout
            and no residual. None: "narrower", or "input" in a saved config, which is what older files hold.
        outer_seed: seed of outer_init="random".
        inner_init: "matched" (B' = 0, A' at the scale that gives a rank-4 LoRA's first step; starts at the base model),
            "normal" (the paper: both N(0, inner_std²)), "zero_uniform" (B' = 0, A' uniform on ±1/√outer_r) or "diag"
            (the paper's Table 5: both diag(Σ), cut to r; serial a alone). In other cells the trained matrix nearest to
            the output takes the place of B'.
        residual: compute ``W x + s (Δ(θ) − Δ(θ₀)) x`` with the start θ₀, which the files hold, so that a start with
            ΔW ≠ 0 is the base. The paper subtracts s Δ(θ₀) from W; here W keeps its bits. Folded LoRA has rank 2 r.
            None: only for inner_init="diag", whose ΔW(0) ≈ W³ would destroy the model.
        generator: "dense", or "nola" (arXiv 2310.02556): the trained matrices from coefficients over seeded bases.
        coefficients, generator_seed: of generator="nola", per trained matrix; see `generators`.
        inner_std: standard deviation of inner_init="normal". The paper gives none.
        nora_dropout: dropout on the layer's input, on the adapter's path only.
        rank_pattern, outer_rank_pattern, alpha_pattern: module name or pattern -> r, outer_r, nora_alpha for it.
        init_weights: False draws both inner factors so that the update is random and clearly non-zero (for tests).
        modules_to_save, exclude_modules, layers_to_transform, layers_pattern: as in every PEFT method.
        saved: set in a saved config: the fingerprints, and the statistics of AwSVD, come with the weights, and the
            outer factors are built when these are loaded. Set it to False to start a new adapter from a saved config.

    Raises:
        ValueError: for a value outside its limits, on construction.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update (the paper's r')."})
    outer_r: int | None = field(default=None, metadata={"help": "Outer rank (the paper's r); None means 8 r."})
    nora_alpha: float | None = field(default=None, metadata={"help": "s = nora_alpha / r; None means s = 1."})
    scaling: str = field(default="alpha/r", metadata={"help": "alpha/r or alpha/sqrt(r)."})
    structure: str = field(default="serial", metadata={"help": "serial, adapter, parallel or plain."})
    position: str = field(default="a", metadata={"help": "a, b or ab."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    outer_init: str | None = field(
        default=None, metadata={"help": "awsvd, svd or random; None: awsvd where the model was calibrated, else svd."}
    )
    outer_part: str = field(default="top", metadata={"help": "top, middle or last singular directions."})
    awsvd_gamma: float = field(default=0.5, metadata={"help": "Exponent of the statistic in S."})
    awsvd_stat: str = field(default="mean_abs", metadata={"help": "mean_abs, rms or weight."})
    sigma_side: str = field(default="B", metadata={"help": "B, A or both."})
    basis: str | None = field(default=None, metadata={"help": "iterated or exact."})
    side: str | None = field(default=None, metadata={"help": "narrower or input."})
    outer_seed: int = field(default=0, metadata={"help": 'Seed of outer_init="random".'})
    inner_init: str = field(default="matched", metadata={"help": "matched, normal, zero_uniform or diag."})
    inner_std: float = field(default=0.01, metadata={"help": 'Standard deviation of inner_init="normal".'})
    residual: bool | None = field(default=None, metadata={"help": "Subtract the start; None: for diag alone."})
    generator: str = field(default="dense", metadata={"help": "dense or nola."})
    coefficients: int = field(default=512, metadata={"help": "Coefficients of a generated matrix."})
    generator_seed: int = field(default=0, metadata={"help": 'Seed of generator="nola".'})
    nora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module pattern -> r."})
    outer_rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module pattern -> outer_r."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Module pattern -> nora_alpha."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' ModuleList."})
    init_weights: bool = field(default=True, metadata={"help": "False starts at a random, non-zero update."})
    saved: bool = field(default=False, metadata={"help": "Set by saving: the basis comes with the weights."})

    outer_init_was_chosen = False  # no field: outer_init was None until an injection wrote it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.structure == "plain" and self.outer_init is None:
            self.outer_init = "svd"  # of nothing: it has no outer factors
        if self.saved and self.outer_init is None:
            self.outer_init = "awsvd"  # saving writes it; this is what None meant to whoever left it out of a file
        if self.basis is None:
            self.basis = "exact" if self.saved else "iterated"
        if self.side is None:
            self.side = "input" if self.saved else "narrower"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_choices()
        self._check_numbers()
        self._check_cell()
        self._check_start()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect alone: set layers_to_transform too, or drop it"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform} needs target_modules as a list of names, not the "
                f"pattern {self.target_modules!r}: pass a list, or put the layer indices into the pattern"
            )

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "outer_init" and value is None):
                raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(allowed)}")

    def _check_cell(self) -> None:
        where = f"structure={self.structure!r} with position={self.position!r}"
        if (self.structure, self.position) not in CELLS:
            known = ", ".join(f"{structure} {position}" for structure, position in CELLS)
            raise ValueError(f"{where} is no cell of the design space: choose one of {known}")
        given = [name for name in ("outer_r", "outer_rank_pattern") if getattr(self, name)]
        if given and self.structure in ("adapter", "plain"):
            reason = "has no outer factors" if self.structure == "plain" else "trains a matrix of rank r = outer_r"
            raise ValueError(f"{given[0]}={getattr(self, given[0])!r}: {where} {reason}, so set r and leave it out")
        if self.structure == "plain" and (self.outer_init, self.outer_part) != ("svd", "top"):
            raise ValueError(f"{where} has no outer factors: leave outer_init and outer_part out")
        if self.outer_part != "top" and self.outer_init == "random":
            raise ValueError(f'outer_part={self.outer_part!r} has no effect with outer_init="random": leave one out')

    def _check_start(self) -> None:
        if self.inner_init == "diag":
            if (self.structure, self.position) != ("serial", "a"):
                raise ValueError('inner_init="diag" is a start of structure="serial" at position="a": use "matched"')
            if self.outer_init == "random":
                raise ValueError('inner_init="diag" needs singular values: use outer_init="awsvd" or "svd"')
            if self.residual is False:
                raise ValueError(
                    'inner_init="diag" starts at an update larger than the weight itself, which residual=False leaves '
                    'in the model: leave residual out, or use "matched", "normal" or "zero_uniform"'
                )
        if self.generator != "dense" and (self.has_residual or self.inner_init == "normal"):
            raise ValueError(
                f'generator={self.generator!r} starts at the base: use inner_init="matched" or "zero_uniform" and no '
                "residual"
            )

    def _check_numbers(self) -> None:
        for name, rank in [("r", self.r), ("outer_r", self.outer_r)]:
            if rank is not None:
                _check_rank(name, rank)
        for name in ("rank_pattern", "outer_rank_pattern"):
            for pattern, rank in getattr(self, name).items():
                _check_rank(f"{name}[{pattern!r}]", rank)
        _check_rank("coefficients", self.coefficients)
        if self.outer_r is not None and self.r > self.outer_r:
            raise ValueError(
                f"r={self.r} exceeds outer_r={self.outer_r}: the update lives between the outer factors, so lower r to "
                f"at most {self.outer_r} or raise outer_r"
            )
        alphas = {"nora_alpha": self.nora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if alpha is not None and not (_is_number(alpha) and alpha > 0):
                raise ValueError(f"{name}={alpha!r} must be a number above 0: leave it at None for s = 1")
        if not (_is_number(self.awsvd_gamma) and self.awsvd_gamma >= 0):
            raise ValueError(f"awsvd_gamma={self.awsvd_gamma!r} must be at least 0: 0.5 is the paper's")
        if not (_is_number(self.inner_std) and self.inner_std > 0):
            raise ValueError(f"inner_std={self.inner_std!r} must be above 0: 0.01 is the default")
        if not (_is_number(self.nora_dropout) and 0 <= self.nora_dropout < 1):
            raise ValueError(f"nora_dropout={self.nora_dropout!r} must be at least 0 and below 1")
        for name in ("outer_seed", "generator_seed"):
            seed = getattr(self, name)
            if not (isinstance(seed, int) and 0 <= seed < 2**32):
                raise ValueError(f"{name}={seed!r} must be an integer from 0 to 2**32 - 1")

    @property
    def needs_statistics(self) -> bool:
        """Whether the outer factors depend on activations, so that `preprocess_nora` must run before injection."""
        return self.outer_init in (None, "awsvd") and self.awsvd_stat != "weight"

    @property
    def cell(self) -> Cell:
        """Where the trained matrices sit."""
        return CELLS[self.structure, self.position]

    @property
    def has_residual(self) -> bool:
        """Whether the update is the deviation from the start."""
        return self.inner_init == "diag" if self.residual is None else self.residual

    def layer_ranks(self, name: str, shape: tuple[int, int]) -> LayerRanks:
        """Ranks and s of the module ``name`` with weight shape (out, in).

        Raises:
            ValueError: if the layer can't hold them, with its name, the value, the limit and the fix.
        """
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        outer_r = self.outer_rank_pattern.get(get_pattern_key(list(self.outer_rank_pattern), name), self.outer_r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), name), self.nora_alpha)
        side = min(shape)
        limit, cut = f"min(out, in)={side}", False
        if (self.structure, self.position) == ("adapter", "b") and shape[0] > LARGEST_OUTPUT_CORE:
            raise ValueError(
                f'structure="adapter" at position="b" trains a matrix of {shape[0]} x {shape[0]} at {name}, and more '
                f'than {LARGEST_OUTPUT_CORE} outputs are refused: use position="a", or leave that module out of '
                "target_modules"
            )
        if self.structure in ("adapter", "plain"):
            outer_r = min(r, side)
        elif outer_r is None:
            outer_r, cut = min(DEFAULT_OUTER_MULTIPLE * r, side), DEFAULT_OUTER_MULTIPLE * r > side
        elif outer_r > side:
            raise ValueError(
                f"outer_r={outer_r} exceeds {limit} at {name}: lower outer_r, set outer_rank_pattern for it, "
                "or leave that module out of target_modules"
            )
        else:
            limit = f"outer_r={outer_r}"
        if r > outer_r:
            raise ValueError(
                f"r={r} exceeds {limit} at {name}: lower r, set rank_pattern for it, or leave that module out of "
                "target_modules"
            )
        scaling = (r if alpha is None else alpha) / (r if self.scaling == "alpha/r" else math.sqrt(r))
        return LayerRanks(r, 0 if self.structure == "plain" else outer_r, scaling, cut)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json, in which ``saved`` is set; this object stays as it is.

        Not where outer_init is still None: no adapter was made of such a config, so there are no weights beside it.
        """
        marked = copy.copy(self)
        marked.saved = self.outer_init is not None
        super(NoraConfig, marked).save_pretrained(save_directory, **kwargs)


def plain_config(config: NoraConfig) -> dict:
    """The config's own values as a file holds them, in a stable order: sets as sorted lists, no paths of a machine."""
    inherited = {f.name for f in fields(PeftConfig)}
    values = {name: value for name, value in config.to_dict().items() if name not in inherited} | {"saved": True}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(values.items())}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(name: str, rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name}={rank!r} must be an integer of at least 1")
