"""The NoRA layer: a frozen linear layer with ``s B B' A' A x`` added to its output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from .basis import (
    Basis,
    base_weight,
    check_base,
    held_pair,
    is_on_output,
    is_plain,
    is_transposed,
    oriented_weight,
    pair_fits,
    rebuild_basis,
    rows_times_weight,
    weight_times_columns,
)
from .buffers import Buffers, ExactBuffers
from .cells import TRAINED, Cell, product
from .config import LayerRanks, NoraConfig
from .functional import FINGERPRINT_SHAPE, OuterFactors
from .generators import Generated, module_dtype, trained_module
from .nested import RightFactor, nested_input, right_product
from .start import diagonals, drawn, needs_pair, spreads

RANDOM_UPDATE_SIZE = 0.5
# Their input is what attention puts out, which its backward pass keeps by itself.
ATTENTION_OUTPUTS = ("to_out.0", "out_proj", "o_proj")


class Origin(NamedTuple):
    """What an adapter's layer was made from: its config, and its name with what wrappers put before it."""

    config: NoraConfig
    full_name: str


class NoraLinear(nn.Module, BaseTunerLayer):
    """``h = W x + s B B' A' A x`` (NoRA, arXiv 2408.10280, Sec. 3.2) around an ``nn.Linear`` or ``Conv1D``.

    Computed on the input of W or on its output, with one factor (see `nested`); random factors have a B of their own,
    whose product is added to W's. Per adapter: `nora_inner_A` (A', r' x r) and `nora_inner_B` (B', r x r') are trained.
    `nora_outer_A` (r x n; L, r x m, on the output), in the base weight's dtype, and R's diagonals or `nora_outer_B`
    (m x r) are buffers out of the state dict, since they are recomputed from the base weight; `nora_stats` and
    `nora_fingerprint` (see `Basis`) are in it, to recompute and check them whenever a loader has set these
    (`refresh_basis`), never in a forward pass.

    Autograd keeps r + r' numbers per token where LoRA keeps the n-dimensional x.
    """

    adapter_layer_names = tuple(f"nora_{name}" for name in TRAINED)
    other_param_names = (
        "nora_outer_A",
        "nora_outer_B",
        "nora_dropout",
        "r",
        "outer_r",
        "own_scaling",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.out_features, self.in_features = oriented_weight(base_layer).shape
        for trained in self.adapter_layer_names:
            setattr(self, trained, nn.ModuleDict())
        self.nora_outer_A = Buffers(persistent=False)
        self.nora_outer_B = Buffers(persistent=False)
        self.nora_right_channel = ExactBuffers(persistent=False)
        self.nora_right_row = ExactBuffers(persistent=False)
        self.nora_dropout = nn.ModuleDict()
        self.nora_stats = ExactBuffers(persistent=True, on_set=self._record_set)
        self.nora_fingerprint = ExactBuffers(persistent=True, on_set=self._record_set)
        self.nora_start = ExactBuffers(persistent=True)
        self._origins: dict[str, Origin] = {}
        self.r: dict[str, int] = {}
        self.outer_r: dict[str, int] = {}
        self.own_scaling: dict[str, float] = {}  # s, whatever `set_scale` says
        self.scaling: dict[str, float] = {}
        self.keeps_input = name.endswith(ATTENTION_OUTPUTS)
        self.merged_adapters: list[str] = []
        self._weight_before_merge: torch.Tensor | None = None
        self._disable_adapters = False
        self._base_loaded = False
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)

    # ------------------------------------------------------------------ adding an adapter

    def update_layer(self, adapter_name: str, origin: Origin, ranks: LayerRanks, inference_mode: bool) -> None:
        """Add the adapter's trained part; `set_basis` then gives it its basis."""
        config = origin.config
        self._origins[adapter_name] = origin
        self.r[adapter_name], self.outer_r[adapter_name] = ranks.r, ranks.outer_r
        self.own_scaling[adapter_name] = self.scaling[adapter_name] = ranks.scaling
        dropout = nn.Dropout(config.nora_dropout) if config.nora_dropout > 0 else nn.Identity()
        self.nora_dropout[adapter_name] = dropout
        for name, module in trained_modules(config, ranks, (self.out_features, self.in_features)).items():
            getattr(self, f"nora_{name}")[adapter_name] = module
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Install the frozen pair with its fingerprint and the float16 statistic that it came from."""
        weight = self.base_weight
        self._forget_basis(adapter_name)
        # The factors take the base's dtype: in fp32 they would double the frozen memory of a half-precision base.
        A, B = basis.A, basis.B
        if "B" in self.cell(adapter_name).chain and (
            # another tuner's layer must see x itself, not x with this update, and gives more than W x
            isinstance(self.base_layer, BaseTunerLayer) or not self.cell(adapter_name).on_input
        ):
            A, B = held_pair(self._unmerged_weight, A, B, basis.right)
        self.nora_outer_A[adapter_name] = A.to(weight)
        if B is not None:
            self.nora_outer_B[adapter_name] = B.to(weight)
        elif basis.right is not None:
            self.nora_right_channel[adapter_name] = basis.right.channel.to(weight.device)
            self.nora_right_row[adapter_name] = basis.right.row.to(weight.device)
        # Copies: load_state_dict writes into the buffers in place, and the basis may be another layer's too.
        if basis.fingerprint is not None:
            self.nora_fingerprint[adapter_name] = basis.fingerprint.to(weight.device, copy=True)
        if basis.statistic is not None:
            self.nora_stats[adapter_name] = basis.statistic.to(weight.device, copy=True)

    def await_basis(self, adapter_name: str) -> None:
        """Make room for a saved adapter: its fingerprint and statistic come with its weights, and then its basis."""
        device = self.base_weight.device
        for module in self.trained(adapter_name).values():
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        if self._origins[adapter_name].config.has_residual:
            count = sum(math.prod(shape) for shape in self.shapes(adapter_name).values())
            self.nora_start[adapter_name] = torch.full((count,), math.nan, device=device)
        self.nora_fingerprint[adapter_name] = torch.full(FINGERPRINT_SHAPE, math.nan, device=device)
        if self._origins[adapter_name].config.needs_statistics:
            self.nora_stats[adapter_name] = torch.full((self.in_features,), math.nan, dtype=torch.half, device=device)

    # ------------------------------------------------------------------ loading

    def pair_fits(self, adapter_name: str, fingerprint: torch.Tensor) -> bool:
        """Whether the pair in use is the one that this fingerprint (3, k) is of; measured, whatever was done to it."""
        if adapter_name not in self.nora_outer_A:
            return False
        return pair_fits(self.get_base_layer(), self._pair(adapter_name), fingerprint)

    def rebuilt_basis(self, adapter_name: str, fingerprint: torch.Tensor, statistic: torch.Tensor | None) -> Basis:
        """The basis that this fingerprint and statistic are of, from the base weight; changes nothing.

        Raises:
            ValueError: if the base weight is another one.
        """
        config, full_name = self._origins[adapter_name]
        self.check_base_is_plain()
        names = tuple(dict.fromkeys((self.name, full_name)))
        outer_r = self.outer_rank(adapter_name)
        return rebuild_basis(self.name, names, self.get_base_layer(), config, outer_r, statistic, fingerprint)

    def refresh_basis(self, adapter_name: str, base_loaded: bool) -> None:
        """Make the pair in use the one that the fingerprint and the statistic, which a loader has set, are of.

        Raises:
            ValueError: if the base weight is another one. The adapter then has no pair, and its forward pass refuses.
        """
        fingerprint, statistic = self.nora_fingerprint[adapter_name], self.nora_stats.get(adapter_name)
        try:
            if base_loaded:
                self.check_base_is_plain()
                check_base(self.name, self.get_base_layer(), fingerprint)
            if not self.pair_fits(adapter_name, fingerprint):
                self.set_basis(adapter_name, self.rebuilt_basis(adapter_name, fingerprint, statistic))
        except ValueError:
            self._forget_basis(adapter_name)
            self.nora_fingerprint[adapter_name] = torch.full_like(fingerprint, math.nan)  # waits for its weights again
            raise

    def _awaits_record(self, adapter_name: str) -> bool:
        record = (self.nora_fingerprint.get(adapter_name), self.nora_stats.get(adapter_name))
        return any(tensor is not None and bool(tensor.isnan().any()) for tensor in record)

    def _record_set(self, adapter_name: str) -> None:
        waits = adapter_name in self._origins and adapter_name not in self.nora_outer_A
        if waits and not self._awaits_record(adapter_name):  # the last of it came just now
            self.refresh_basis(adapter_name, base_loaded=False)

    def is_on_meta(self, adapter_name: str) -> bool:
        """Whether the adapter was put into a model on the meta device, so that its pair has no content."""
        return adapter_name in self.nora_outer_A and adapter_name not in self.nora_fingerprint

    def check_unmerged(self, before: str) -> None:
        """Raise ValueError if adapters are merged into the base weight, here or in a layer around the same base."""
        check_unmerged(self, self.name, before)

    def check_base_is_plain(self) -> None:
        """Raise ValueError if the base weight can't be decomposed or merged into as it is now."""
        self.check_base_is_here()
        if not is_plain(self.base_weight):
            raise ValueError(
                f"{self.name} has a weight that is no plain matrix ({type(self.base_weight).__name__}, dtype "
                f"{self.base_weight.dtype}), as in a quantised or sharded base: load the base without that first"
            )

    def check_base_is_here(self) -> None:
        """Raise ValueError if the base weight is not in memory, as accelerate's offloading leaves it."""
        if self.base_weight.is_meta:
            raise ValueError(
                f"{self.name} has no weight in memory (meta device), as after accelerate's "
                "offloading: load the base without offloading first"
            )

    @property
    def base_weight(self) -> torch.Tensor:
        """The frozen weight as the base layer stores it."""
        return base_weight(self.get_base_layer())

    def inner(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The trained A' (r', r) and B' (r, r')."""
        return base_weight(self.nora_inner_A[adapter_name]), base_weight(self.nora_inner_B[adapter_name])

    def cell(self, adapter_name: str) -> Cell:
        """Where the adapter's trained matrices sit."""
        return self._origins[adapter_name].config.cell

    def shapes(self, adapter_name: str) -> dict[str, tuple[int, int]]:
        """Name of each trained matrix -> (rows, columns), in the cell's order."""
        sides = self.out_features, self.in_features, self.outer_r[adapter_name], self.r[adapter_name]
        return self.cell(adapter_name).shapes(*sides)

    def trained(self, adapter_name: str) -> dict[str, nn.Module]:
        """Name of each trained matrix -> the linear layer with its weight, in the cell's order."""
        return {name: getattr(self, f"nora_{name}")[adapter_name] for name in self.shapes(adapter_name)}

    def start(self, adapter_name: str) -> dict[str, torch.Tensor] | None:
        """θ₀, from which the update is the deviation; None where it is the update itself."""
        if adapter_name not in self.nora_start:
            return None
        shapes = self.shapes(adapter_name)
        parts = self.nora_start[adapter_name].split([math.prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}

    def outer_rank(self, adapter_name: str) -> int:
        """The paper's r."""
        return self.outer_r[adapter_name]

    def _forget_basis(self, adapter_name: str) -> None:
        for held in (self.nora_outer_A, self.nora_outer_B, self.nora_right_channel, self.nora_right_row):
            if adapter_name in held:
                del held[adapter_name]

    def basis(self, adapter_name: str) -> Basis:
        """The adapter's basis as it is in use.

        Raises:
            ValueError: if the adapter waits for its weights or is offloaded.
        """
        self.check_adapter_is_here(adapter_name)
        factors = self.nora_outer_A[adapter_name], self.nora_outer_B.get(adapter_name), self._right(adapter_name)
        return Basis(*factors, self.nora_fingerprint[adapter_name], self.nora_stats.get(adapter_name))

    def delete_adapter(self, adapter_name: str) -> None:
        # not in other_param_names, because PEFT casts the buffers named there to the base's dtype
        self._forget_basis(adapter_name)
        for held in (self.nora_stats, self.nora_fingerprint, self.nora_start, self._origins):
            if adapter_name in held:
                del held[adapter_name]
        super().delete_adapter(adapter_name)

    @torch.no_grad()
    def reset_inner(self, adapter_name: str, config: NoraConfig, basis: Basis) -> None:
        """Draw the start of what is trained; see `start`."""
        modules, shapes = self.trained(adapter_name), self.shapes(adapter_name)
        if any(parameter.is_meta for module in modules.values() for parameter in module.parameters()):
            return
        scaling = self.own_scaling[adapter_name]
        assert basis.fingerprint is not None  # only a basis on the meta device has none
        norm_B = basis.fingerprint[2, 0].item()
        outer = self.outer(adapter_name) if needs_pair(config.cell) or config.inner_init == "diag" else None
        A = self.outer(adapter_name).A if is_on_output(basis.A, self.in_features) else basis.A
        sides = self.out_features, self.in_features
        start = spreads(config, shapes, sides, scaling, outer, A, norm_B, basis.statistic)
        for name, module in modules.items():
            if isinstance(module, Generated):
                module.coefficients.zero_()
                module.offset_scale.fill_(start[name].bound)
            elif config.inner_init != "diag":
                module.weight.copy_(drawn(shapes[name], start[name]))
        if config.inner_init == "diag":
            assert outer is not None and basis.right is not None
            sigma = basis.right.row.float().rsqrt() * outer.B.float().norm(dim=0).to(basis.right.row.device)
            for name, matrix in diagonals(shapes, sigma.cpu()).items():
                modules[name].weight.copy_(matrix)
        if config.has_residual:
            self.nora_start[adapter_name] = torch.cat([m.weight.float().flatten() for m in modules.values()])
        if not config.init_weights:
            self._randomise(adapter_name)

    @torch.no_grad()
    def _randomise(self, adapter_name: str) -> None:
        """A random update of RANDOM_UPDATE_SIZE ‖W‖."""
        parameters = [p for module in self.trained(adapter_name).values() for p in module.parameters()]
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape))
        down, up = self._folded(adapter_name, self.own_scaling[adapter_name], parameters[0].device)
        norm = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt().item()
        size = RANDOM_UPDATE_SIZE * oriented_weight(self.get_base_layer()).float().norm().item()
        for parameter in parameters:
            parameter.mul_((size / norm) ** (1 / len(parameters)))

    def outer(self, adapter_name: str) -> OuterFactors:
        """The frozen pair in use; what is not held of it is computed from the base weight.

        Raises:
            ValueError: if the adapter's weights are not loaded, or their loading was refused.
        """
        self._check_has_basis(adapter_name)
        return self._pair(adapter_name)

    def _pair(self, adapter_name: str) -> OuterFactors:
        A, B = self.nora_outer_A[adapter_name], self.nora_outer_B.get(adapter_name)
        return held_pair(self._unmerged_weight, A, B, self._right(adapter_name))

    @property
    def _unmerged_weight(self) -> torch.Tensor:
        """(m, n), without what `merge` has added: B is this weight's, not the merged one's."""
        if self._weight_before_merge is None:
            return oriented_weight(self.get_base_layer())
        weight = self._weight_before_merge.to(self.base_weight.device)
        return weight.T if is_transposed(self.get_base_layer()) else weight

    def shares_basis(self, adapter_name: str, other: str) -> bool:
        """Whether both adapters have the same frozen factors here, to the bit."""
        held = (self.nora_outer_A, self.nora_outer_B, self.nora_right_channel, self.nora_right_row)
        for buffers in held:
            one, two = buffers.get(adapter_name), buffers.get(other)
            if (one is None) != (two is None) or (one is not None and not torch.equal(one, two)):
                return False
        return True

    def _right(self, adapter_name: str) -> RightFactor | None:
        if adapter_name not in self.nora_right_row:
            return None
        return RightFactor(self.nora_right_channel[adapter_name], self.nora_right_row[adapter_name])

    def hold_both_factors(self, adapter_name: str) -> None:
        """Hold B too: for a base whose weight can't be read once it is split over processes."""
        pair = self.outer(adapter_name)
        self.set_basis(adapter_name, self.basis(adapter_name)._replace(A=pair.A, B=pair.B, right=None))

    def _check_has_basis(self, adapter_name: str) -> None:
        if adapter_name not in self.nora_outer_A:
            raise ValueError(
                f"adapter {adapter_name!r} has no outer factors at {self.name}, because its "
                "config was saved and they come with its saved weights: load those with load_adapter or "
                "set_peft_model_state_dict, or inject with config.saved=False to start a new adapter"
            )
        if self.is_on_meta(adapter_name) and not self.base_weight.is_meta:
            raise ValueError(
                f"adapter {adapter_name!r} at {self.name} was put into a model on the meta device, so its outer "
                "factors have no content: inject it once the base is loaded"
            )

    def _parameters_of(self, adapter_name: str) -> list[nn.Parameter]:
        return [p for module in self.trained(adapter_name).values() for p in module.parameters()]

    def check_adapter_is_here(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter's numbers can't be read: it waits for them, or they are offloaded."""
        self._check_has_basis(adapter_name)
        if any(tensor.is_meta for tensor in (self.nora_outer_A[adapter_name], *self._parameters_of(adapter_name))):
            raise ValueError(
                f"adapter {adapter_name!r} at {self.name} is not in memory (meta device), as after accelerate's "
                "offloading: take it off first with accelerate.hooks.remove_hook_from_submodules"
            )

    # ------------------------------------------------------------------ scale, as diffusers sets it

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to ``scale`` times the adapter's own s."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.own_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters."""
        for adapter in self._own_active_adapters():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None goes back to the adapter's own s."""
        for adapter in self._own_active_adapters():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def _own_active_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.r]

    # ------------------------------------------------------------------ ΔW, folding and merging

    def fold(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``lora_A`` (r', n) and ``lora_B`` (m, r') in float32 at the adapter's own s, whatever `set_scale` says.

        On the CPU: what a file holds must not depend on how a GPU rounds its products (TF32: to 3 digits).

        Raises:
            ValueError: if the adapter waits for its weights or is offloaded.
        """
        self.check_adapter_is_here(adapter_name)
        lora_A, lora_B = self._folded(adapter_name, self.own_scaling[adapter_name], "cpu")
        return lora_A.float(), lora_B.float()

    @torch.no_grad()
    def _folded(
        self, adapter_name: str, scaling: float, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``A' A`` (r', n) and ``s B B'`` (m, r') on the device; float32, or float64 for a float64 base."""
        self._check_has_basis(adapter_name)
        dtype, cell = self._merging_dtype, self.cell(adapter_name)
        trained = {
            name: module.weight.detach().to(device, dtype) for name, module in self.trained(adapter_name).items()
        }
        down, up = self._factors(adapter_name, cell, trained, scaling)
        start = self.start(adapter_name)
        if start is None:
            return down, up
        first = {name: matrix.to(device, dtype) for name, matrix in start.items()}
        first_down, first_up = self._factors(adapter_name, cell, first, scaling)
        return torch.cat([down, first_down]), torch.cat([up, -first_up], dim=1)

    def _factors(
        self, adapter_name: str, cell: Cell, trained: dict[str, torch.Tensor], scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        like = next(iter(trained.values()))
        A, B, right = self.nora_outer_A[adapter_name], self.nora_outer_B.get(adapter_name), self._right(adapter_name)
        matrices = {"A": A.to(like), **trained}
        if B is not None:
            matrices["B"] = B.to(like)
        if "B" in matrices or "B" not in cell.chain:
            up, down = cell.factors(matrices)
            return down, scaling * up
        assert right is not None
        right = RightFactor(*(diagonal.to(like.device) for diagonal in right))
        down, up = product(cell.down, matrices), right_product(trained[cell.last], matrices["A"], right, scaling)
        layer, W = self.get_base_layer(), self._unmerged_weight
        if is_on_output(A, self.in_features):
            return rows_times_weight(layer, W, down), up
        return down, weight_times_columns(layer, W, up)

    def _delta_weight(self, adapter_name: str) -> torch.Tensor:
        """ΔW at the current scale, in the base weight's own layout; float32, or float64 for a float64 base."""
        self.check_base_is_here()
        lora_A, lora_B = self._folded(adapter_name, self.scaling[adapter_name], self.base_weight.device)
        delta = lora_B @ lora_A  # (m, n)
        return delta.T if is_transposed(self.get_base_layer()) else delta

    @property
    def _merging_dtype(self) -> torch.dtype:
        return torch.float64 if self.base_weight.dtype == torch.float64 else torch.float32

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """``ΔW = s B B' A' A`` at the current scale, in the base weight's layout and dtype."""
        return self._delta_weight(adapter_name).to(self.base_weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight; `unmerge` puts back the very bits that were there.

        All of them or none. Their sum is formed in float32, or float64 for a float64 base, and rounded once. A copy of
        the base weight is kept until `unmerge`, because subtracting ΔW again would leave rounding behind, in bfloat16
        most of it.

        Args:
            safe_merge: check that the merged weight is finite before it is written.
            adapter_names: which; None means the active ones.

        Raises:
            ValueError: if the base weight is offloaded, quantised or computed from other parameters, or with
                ``safe_merge`` if the merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        weight = self.base_weight
        self.check_base_is_plain()
        if "weight" not in self.get_base_layer()._parameters:
            raise ValueError(
                f"{self.name} computes its weight from other parameters, as weight_norm does, and a merged one would "
                "be lost at the next pass: make it a plain weight first"
            )
        total = weight.data.to(self._merging_dtype)
        for name in names:
            total = total + self._delta_weight(name)
            if safe_merge and not torch.isfinite(total.to(weight.dtype)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: "
                    f"{self.name} would get NaN or infinity, so load a sound one"
                )
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.data
        weight.data = total.to(weight.dtype)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=2)
            return
        weight = self.base_weight
        assert self._weight_before_merge is not None
        weight.data = self._weight_before_merge.to(weight)  # .to: the model may have moved since
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # ------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., n) -> (..., m)."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_mixed_batch(x, adapter_names)
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            adapters, rows = self._own_active_adapters(), None
        else:
            adapters = sorted(set(adapter_names) & set(self.r))
            rows = {adapter: [i for i, name in enumerate(adapter_names) if name == adapter] for adapter in adapters}
        for adapter in adapters:
            self._check_has_basis(adapter)
        on_input = [adapter for adapter in adapters if self._side(adapter) == "input"]
        on_output = [adapter for adapter in adapters if self._side(adapter) == "output"]
        result = self.base_layer(self._nested(x, on_input, rows), *args, **kwargs)
        if on_input and on_output:  # each adapter's update is of x alone
            bare = self.base_layer(x, *args, **kwargs)
            result = result + (self._nested(bare, on_output, rows) - bare)
        else:
            result = self._nested(result, on_output, rows)
        for adapter in adapters:
            if adapter not in on_input + on_output:
                result = _add(result, partial(self._outer_update, adapter), x, rows[adapter] if rows else None)
        return result

    def _check_mixed_batch(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively: give one name for each sample, and leave {self.name} "
                "out of target_modules if the model flattens its batch"
            )

    def _nested(self, x: torch.Tensor, adapters: list[str], rows: dict[str, list[int]] | None) -> torch.Tensor:
        """``x + Σ s R B' A' A x`` over the adapters, each on its rows or on all; x: W's input or output."""
        if not adapters:
            return x
        adapter = adapters[0]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the base layer will: here, so that it is done once
        if len(adapters) == 1 and rows is None and self._is_plainly_nested(adapter, x):
            right = self._right(adapter)
            assert right is not None
            A, scaling = self.nora_outer_A[adapter], self.scaling[adapter]
            keep_input = self.keeps_input and self._side(adapter) == "input"
            return nested_input(x, *self.inner(adapter), A, right, scaling, keep_input)
        total = x
        for adapter in adapters:
            total = _add(total, partial(self._nested_update, adapter), x, rows[adapter] if rows else None)
        return total

    def _side(self, adapter: str) -> str | None:
        """Of W, where the adapter's product is added: "input" or "output"; None: beside W, with a B of its own."""
        if not self.cell(adapter).on_input or adapter in self.nora_outer_B:
            return None
        return "output" if is_on_output(self.nora_outer_A[adapter], self.in_features) else "input"

    def _nested_update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """``s R … x``, as wide as x, with R in place of the B that the chain ends with."""
        right = self._right(adapter)
        assert right is not None
        y = self._along(adapter, self.cell(adapter).chain[:-1], x)  # (..., r)
        A = self.nora_outer_A[adapter].to(y.dtype)
        return (y * right.row.to(y.dtype)) @ A * (self.scaling[adapter] * right.channel).to(y.dtype)

    def _outer_update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """``s · up · down · x`` (..., m)."""
        return self.scaling[adapter] * self._along(adapter, self.cell(adapter).chain, x)

    def _along(self, adapter: str, chain: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """x through the matrices of the chain, each in its own dtype; less what it is at the start, if that counts."""
        x = self.nora_dropout[adapter](x)
        start = self.start(adapter)
        modules = self.trained(adapter)
        y = first = x
        for name in chain:
            if name in modules:
                dtype = module_dtype(modules[name])
                y = modules[name](self._cast_input_dtype(y, dtype))
                if start is not None:
                    first = F.linear(self._cast_input_dtype(first, dtype), start[name].to(dtype))
                continue
            frozen = self.nora_outer_A[adapter] if name == "A" else self.nora_outer_B[adapter]
            y = F.linear(self._cast_input_dtype(y, frozen.dtype), frozen)
            if start is not None:
                first = F.linear(self._cast_input_dtype(first, frozen.dtype), frozen)
        return y if start is None else y - first

    def _is_plainly_nested(self, adapter: str, x: torch.Tensor) -> bool:
        """Whether `nested_input` has this form, x goes into A as it is and what is trained is in memory.

        accelerate's hooks fetch that for its modules.
        """
        drops = self.training and not isinstance(self.nora_dropout[adapter], nn.Identity)
        nested = self.cell(adapter).is_nested and adapter not in self.nora_start
        return nested and not drops and self._parameters_of(adapter)[0].is_meta == x.is_meta

    def __repr__(self) -> str:
        return "nora." + super().__repr__()


def _add(
    total: torch.Tensor, update: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: list[int] | None
) -> torch.Tensor:
    """``total + update(x)``, or that on some rows alone; in total's dtype."""
    if rows is None:
        return total + update(x).to(total.dtype)
    total = total.clone()
    total[rows] = total[rows] + update(x[rows]).to(total.dtype)
    return total


def trained_modules(config: NoraConfig, ranks: LayerRanks, shape: tuple[int, int]) -> dict[str, nn.Module]:
    """What the cell of the config trains in a layer of this shape (m, n), by name, in the cell's order."""
    shapes = config.cell.shapes(*shape, ranks.outer_r, ranks.r)
    settings = config.generator, config.coefficients, config.generator_seed
    return {name: trained_module(name, sides, *settings) for name, sides in shapes.items()}


def check_unmerged(layer: nn.Module, name: str, before: str) -> None:
    """Raise ValueError if a tuner's layer, or one that it is wrapped around, has merged adapters."""
    while isinstance(layer, BaseTunerLayer) and isinstance(layer.base_layer, nn.Module):
        if layer.merged:
            raise ValueError(
                f"{name} has merged adapters {layer.merged_adapters}, so its weight is not the base's: unmerge them "
                f"before {before}"
            )
        layer = layer.base_layer


def _before_load(layer: NoraLinear, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    if state_dict:
        layer.check_unmerged("loading")
    layer._base_loaded = any(key.startswith(f"{prefix}base_layer.") for key in state_dict)


def _after_load(layer: NoraLinear, _: Any) -> None:
    for adapter_name in layer.nora_fingerprint:
        if adapter_name in layer.nora_outer_A or not layer._awaits_record(adapter_name):
            layer.refresh_basis(adapter_name, layer._base_loaded)
