"""The NoRA layer: a frozen linear layer with ``s B B' A' A x`` added to its output."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from .basis import Basis, build_basis, check_basis, is_transposed, oriented_weight
from .config import LayerRanks, NoraConfig
from .functional import FINGERPRINT_SHAPE, OuterFactors, fold, matched_std

RANDOM_UPDATE_SIZE = 0.5


class ExactBuffers(BufferDict):
    """Buffers that follow the model to its device but never to another dtype: a later load is checked against them."""

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self else None  # noqa: SIM401 (this is get)

    def _apply(self, fn, recurse=True):
        kept = dict(self.items())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self[name] = buffer.to(self[name].device)
        return self


class NoraLinear(nn.Module, BaseTunerLayer):
    """``h = W x + s B B' A' A x`` (NoRA, arXiv 2408.10280, Sec. 3.2) around an ``nn.Linear`` or ``Conv1D``.

    Per adapter: `nora_inner_A` (A', r' x r) and `nora_inner_B` (B', r x r') are trained; `nora_outer_A` (r x n) and
    `nora_outer_B` (m x r) are buffers, in the base weight's dtype and out of the state dict, since they are recomputed
    from the base weight; `nora_stats` and `nora_fingerprint` (see `Basis`) are in it, to recompute and check them.

    The forward is the sequential form: autograd keeps r + r' numbers per token where LoRA keeps the n-dimensional x.
    """

    adapter_layer_names = ("nora_inner_A", "nora_inner_B")
    other_param_names = (
        "nora_outer_A",
        "nora_outer_B",
        "nora_dropout",
        "r",
        "nora_alpha",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = oriented_weight(base_layer).shape
        self.nora_inner_A = nn.ModuleDict()
        self.nora_inner_B = nn.ModuleDict()
        self.nora_outer_A = BufferDict(persistent=False)
        self.nora_outer_B = BufferDict(persistent=False)
        self.nora_dropout = nn.ModuleDict()
        self.nora_stats = ExactBuffers(persistent=True)
        self.nora_fingerprint = ExactBuffers(persistent=True)
        self._awaited: dict[str, tuple[str, NoraConfig]] = {}
        self.r: dict[str, int] = {}
        self.nora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters = []
        self._weight_before_merge: torch.Tensor | None = None
        self._disable_adapters = False

    # ------------------------------------------------------------------ adding an adapter

    def update_layer(self, adapter_name: str, config: NoraConfig, ranks: LayerRanks, inference_mode: bool) -> None:
        """Add the adapter's trained part; `set_basis` then gives it its basis."""
        r, outer_r, alpha, _ = ranks
        self.r[adapter_name] = r
        self.nora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        dropout = nn.Dropout(config.nora_dropout) if config.nora_dropout > 0 else nn.Identity()
        self.nora_dropout[adapter_name] = dropout
        self.nora_inner_A[adapter_name] = nn.Linear(outer_r, r, bias=False)
        self.nora_inner_B[adapter_name] = nn.Linear(r, outer_r, bias=False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Install the frozen pair with its fingerprint and the float16 statistic that it came from."""
        weight = self.get_base_layer().weight
        # The pair takes the base's dtype: in fp32 it would double the frozen memory of a half-precision base.
        self.nora_outer_A[adapter_name] = basis.outer.A.to(weight)
        self.nora_outer_B[adapter_name] = basis.outer.B.to(weight)
        if basis.fingerprint is not None:
            self.nora_fingerprint[adapter_name] = basis.fingerprint.to(weight.device)
        if basis.statistic is not None:
            self.nora_stats[adapter_name] = basis.statistic.to(weight.device)
        self._awaited.pop(adapter_name, None)

    def await_basis(self, adapter_name: str, name: str, config: NoraConfig) -> None:
        """Make room for a saved adapter: its fingerprint and statistic come with its weights, and then its basis."""
        device = self.get_base_layer().weight.device
        nn.init.zeros_(self.nora_inner_A[adapter_name].weight)
        nn.init.zeros_(self.nora_inner_B[adapter_name].weight)
        self.nora_fingerprint[adapter_name] = torch.full(FINGERPRINT_SHAPE, math.nan, device=device)
        if config.needs_statistics:
            self.nora_stats[adapter_name] = torch.full((self.in_features,), math.nan, dtype=torch.half, device=device)
        self._awaited[adapter_name] = (name, config)

    def basis(self, adapter_name: str) -> Basis:
        """The adapter's basis as it is in use."""
        outer = self.outer(adapter_name)
        return Basis(outer, self.nora_fingerprint[adapter_name], self.nora_stats.get(adapter_name))

    def delete_adapter(self, adapter_name: str) -> None:
        # not in other_param_names, because PEFT casts the buffers named there to the base's dtype
        for held in (self.nora_stats, self.nora_fingerprint, self._awaited):
            if adapter_name in held:
                del held[adapter_name]
        super().delete_adapter(adapter_name)

    @torch.no_grad()
    def reset_inner(self, adapter_name: str, config: NoraConfig, basis: Basis) -> None:
        """Draw A' and B' on the CPU, so that ``torch.manual_seed`` gives the same start on every device."""
        inner_A = self.nora_inner_A[adapter_name].weight
        inner_B = self.nora_inner_B[adapter_name].weight
        if inner_A.is_meta:
            return
        r, outer_r = inner_A.shape
        shape = (self.out_features, self.in_features)
        scaling = self.nora_alpha[adapter_name] / r
        outer = basis.outer
        start_A, start_B = torch.randn(r, outer_r), torch.zeros(outer_r, r)
        if not config.init_weights:
            # ‖s B B' A' A‖ ≈ s √r' σ² ‖A‖ ‖B‖, set to RANDOM_UPDATE_SIZE ‖W‖
            norms = outer.A.norm().item() * outer.B.norm().item()
            size = RANDOM_UPDATE_SIZE * oriented_weight(self.get_base_layer()).float().norm().item()
            std = math.sqrt(size / (scaling * math.sqrt(r) * norms))
            start_A, start_B = start_A * std, torch.randn(outer_r, r) * std
        elif config.inner_init == "matched":
            start_A *= matched_std(shape, r, scaling, outer, basis.statistic)
        elif config.inner_init == "normal":
            start_A, start_B = start_A * config.inner_std, torch.randn(outer_r, r) * config.inner_std
        else:  # zero_uniform
            start_A.uniform_(-1 / math.sqrt(outer_r), 1 / math.sqrt(outer_r))
        inner_A.copy_(start_A)
        inner_B.copy_(start_B)

    def outer(self, adapter_name: str) -> OuterFactors:
        """The frozen pair in use.

        Raises:
            ValueError: if the adapter still waits for its file, or if the file turns out to be for another base.
        """
        if adapter_name not in self.nora_outer_A:
            # Loaders that set tensors one by one (transformers' own) leave no better moment than the first use.
            name, config = self._awaited[adapter_name]
            expected = self.nora_fingerprint[adapter_name]
            if expected.isnan().any():
                raise ValueError(
                    f"adapter {adapter_name!r} has no outer factors yet at {name}, because its config was saved and "
                    "they come with its saved weights: load those, or set config.saved=False to start a new adapter"
                )
            statistic = self.nora_stats[adapter_name] if config.needs_statistics else None
            outer_r = self.nora_inner_A[adapter_name].in_features
            basis = build_basis(name, self.get_base_layer(), config, outer_r, statistic)
            check_basis(name, basis, expected)
            self.set_basis(adapter_name, basis)
        return OuterFactors(self.nora_outer_A[adapter_name], self.nora_outer_B[adapter_name])

    # ------------------------------------------------------------------ scale, as diffusers sets it

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set s to ``scale`` times the adapter's own s."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.nora_alpha[adapter] / self.r[adapter]

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
        return [name for name in self.active_adapters if name in self.nora_inner_A]

    # ------------------------------------------------------------------ ΔW, folding and merging

    def fold(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``lora_A`` (r', n) and ``lora_B`` (m, r') in float32 at the adapter's own s, whatever `set_scale` says.

        On the CPU: what a file holds must not depend on how a GPU rounds its products (TF32: to 3 digits).
        """
        return fold(
            self.nora_inner_A[adapter_name].weight.detach().cpu(),
            self.nora_inner_B[adapter_name].weight.detach().cpu(),
            OuterFactors(*(factor.cpu() for factor in self.outer(adapter_name))),
            self.nora_alpha[adapter_name] / self.r[adapter_name],
        )

    def _delta_weight(self, adapter_name: str) -> torch.Tensor:
        """ΔW at the current scale in float32, in the base weight's own layout."""
        lora_A, lora_B = fold(
            self.nora_inner_A[adapter_name].weight.detach(),
            self.nora_inner_B[adapter_name].weight.detach(),
            self.outer(adapter_name),
            self.scaling[adapter_name],
        )
        delta = lora_B @ lora_A  # (m, n)
        return delta.T if is_transposed(self.get_base_layer()) else delta

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """``ΔW = s B B' A' A`` at the current scale, in the base weight's layout and dtype."""
        return self._delta_weight(adapter_name).to(self.get_base_layer().weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the base weight; `unmerge` puts back the very bits that were there.

        The sum is formed in float32 and rounded once. A copy of the base weight is kept until `unmerge`, because
        subtracting ΔW again would leave rounding behind, in bfloat16 most of it.

        Args:
            safe_merge: check that the merged weight is finite before it is written.
            adapter_names: which; None means the active ones.

        Raises:
            ValueError: with ``safe_merge``, if the merged weight would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.nora_inner_A:
                continue
            weight = self.get_base_layer().weight
            merged = (weight.data.float() + self._delta_weight(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name!r} gives NaN or infinity: the adapter seems to be broken")
            if self._weight_before_merge is None:
                self._weight_before_merge = weight.data
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weight exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._weight_before_merge.to(weight)  # .to: the model may have moved since
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # ------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(..., n) -> (..., m)."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.merged and (self.disable_adapters or adapter_names is not None):
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if adapter_names is None:
            for adapter in self._own_active_adapters():
                result = result + self._update(x, adapter).to(dtype)
            return result
        for adapter in sorted(set(adapter_names) & set(self.nora_inner_A)):
            rows = [i for i, name in enumerate(adapter_names) if name == adapter]
            result[rows] = result[rows] + self._update(x[rows], adapter).to(dtype)
        return result

    def _update(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """``s B B' A' A x`` (..., m). A and B compute in their own dtype, A' and B' in theirs."""
        A, B = self.outer(adapter)
        inner_A, inner_B = self.nora_inner_A[adapter], self.nora_inner_B[adapter]
        z = F.linear(self.nora_dropout[adapter](self._cast_input_dtype(x, A.dtype)), A)  # (..., r)
        u = inner_A(self._cast_input_dtype(z, inner_A.weight.dtype))  # (..., r')
        return self.scaling[adapter] * F.linear(self._cast_input_dtype(inner_B(u), B.dtype), B)

    def __repr__(self) -> str:
        return "nora." + super().__repr__()
