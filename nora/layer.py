"""The NoRA layer: a frozen linear layer with ``s B B' A' A x`` added to its output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from .basis import (
    Basis,
    base_weight,
    check_base,
    is_plain,
    is_transposed,
    oriented_weight,
    pair_fits,
    rebuild_basis,
)
from .config import LayerRanks, NoraConfig
from .functional import FINGERPRINT_SHAPE, OuterFactors, fold, matched_std

RANDOM_UPDATE_SIZE = 0.5


class ExactBuffers(BufferDict):
    """Buffers that follow the model to its device but never to another dtype: a later load is checked against them.

    Args:
        on_set: called with the adapter's name when a loader sets its buffer, which transformers' own does one by one.
    """

    def __init__(self, on_set: Callable[[str], None]) -> None:
        super().__init__(persistent=True)
        self._on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self._on_set(name)

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self else None  # noqa: SIM401 (this is get)

    def _apply(self, fn, recurse=True):
        kept = dict(self.items())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self[name] = buffer.to(self[name].device)
        return self


class Origin(NamedTuple):
    """What an adapter's layer was made from: its config, and its name with what wrappers put before it."""

    config: NoraConfig
    full_name: str


class NoraLinear(nn.Module, BaseTunerLayer):
    """``h = W x + s B B' A' A x`` (NoRA, arXiv 2408.10280, Sec. 3.2) around an ``nn.Linear`` or ``Conv1D``.

    Per adapter: `nora_inner_A` (A', r' x r) and `nora_inner_B` (B', r x r') are trained; `nora_outer_A` (r x n) and
    `nora_outer_B` (m x r) are buffers, in the base weight's dtype and out of the state dict, since they are recomputed
    from the base weight; `nora_stats` and `nora_fingerprint` (see `Basis`) are in it, to recompute and check it
    whenever a loader has set them (`refresh_basis`), never in a forward pass.

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

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.out_features, self.in_features = oriented_weight(base_layer).shape
        self.nora_inner_A = nn.ModuleDict()
        self.nora_inner_B = nn.ModuleDict()
        self.nora_outer_A = BufferDict(persistent=False)
        self.nora_outer_B = BufferDict(persistent=False)
        self.nora_dropout = nn.ModuleDict()
        self.nora_stats = ExactBuffers(self._record_set)
        self.nora_fingerprint = ExactBuffers(self._record_set)
        self._origins: dict[str, Origin] = {}
        self.r: dict[str, int] = {}
        self.nora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: torch.Tensor | None = None
        self._disable_adapters = False
        self._base_loaded = False
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)

    # ------------------------------------------------------------------ adding an adapter

    def update_layer(self, adapter_name: str, origin: Origin, ranks: LayerRanks, inference_mode: bool) -> None:
        """Add the adapter's trained part; `set_basis` then gives it its basis."""
        r, outer_r, alpha, _ = ranks
        config = origin.config
        self._origins[adapter_name] = origin
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
        weight = self.base_weight
        # The pair takes the base's dtype: in fp32 it would double the frozen memory of a half-precision base.
        self.nora_outer_A[adapter_name] = basis.outer.A.to(weight)
        self.nora_outer_B[adapter_name] = basis.outer.B.to(weight)
        # Copies: load_state_dict writes into the buffers in place, and the basis may be another layer's too.
        if basis.fingerprint is not None:
            self.nora_fingerprint[adapter_name] = basis.fingerprint.to(weight.device, copy=True)
        if basis.statistic is not None:
            self.nora_stats[adapter_name] = basis.statistic.to(weight.device, copy=True)

    def await_basis(self, adapter_name: str) -> None:
        """Make room for a saved adapter: its fingerprint and statistic come with its weights, and then its basis."""
        device = self.base_weight.device
        for inner in self.inner(adapter_name):
            nn.init.zeros_(inner)
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
            for held in (self.nora_outer_A, self.nora_outer_B):
                if adapter_name in held:
                    del held[adapter_name]
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

    def outer_rank(self, adapter_name: str) -> int:
        """The paper's r."""
        return self.inner(adapter_name)[0].shape[1]

    def basis(self, adapter_name: str) -> Basis:
        """The adapter's basis as it is in use.

        Raises:
            ValueError: if the adapter waits for its weights or is offloaded.
        """
        self.check_adapter_is_here(adapter_name)
        outer = self.outer(adapter_name)
        return Basis(outer, self.nora_fingerprint[adapter_name], self.nora_stats.get(adapter_name))

    def delete_adapter(self, adapter_name: str) -> None:
        # not in other_param_names, because PEFT casts the buffers named there to the base's dtype
        for held in (self.nora_stats, self.nora_fingerprint, self._origins):
            if adapter_name in held:
                del held[adapter_name]
        super().delete_adapter(adapter_name)

    @torch.no_grad()
    def reset_inner(self, adapter_name: str, config: NoraConfig, basis: Basis) -> None:
        """Draw A' and B' on the CPU, so that ``torch.manual_seed`` gives the same start on every device."""
        inner_A, inner_B = self.inner(adapter_name)
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
            ValueError: if the adapter's weights are not loaded, or their loading was refused.
        """
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
        return self._pair(adapter_name)

    def _pair(self, adapter_name: str) -> OuterFactors:
        return OuterFactors(self.nora_outer_A[adapter_name], self.nora_outer_B[adapter_name])

    def check_adapter_is_here(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter's numbers can't be read: it waits for them, or they are offloaded."""
        outer = self.outer(adapter_name)
        if any(tensor.is_meta for tensor in (*outer, *self.inner(adapter_name))):
            raise ValueError(
                f"adapter {adapter_name!r} at {self.name} is not in memory (meta device), as after accelerate's "
                "offloading: take it off first with accelerate.hooks.remove_hook_from_submodules"
            )

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

        Raises:
            ValueError: if the adapter waits for its weights or is offloaded.
        """
        self.check_adapter_is_here(adapter_name)
        inner_A, inner_B = self.inner(adapter_name)
        return fold(
            inner_A.detach().cpu(),
            inner_B.detach().cpu(),
            OuterFactors(*(factor.cpu() for factor in self.outer(adapter_name))),
            self.nora_alpha[adapter_name] / self.r[adapter_name],
        )

    def _delta_weight(self, adapter_name: str) -> torch.Tensor:
        """ΔW at the current scale, in the base weight's own layout; float32, or float64 for a float64 base."""
        self.check_base_is_here()
        inner_A, inner_B = self.inner(adapter_name)
        lora_A, lora_B = fold(
            inner_A.detach(),
            inner_B.detach(),
            self.outer(adapter_name),
            self.scaling[adapter_name],
            self._merging_dtype,
        )
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
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.nora_inner_A]
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

    def _update(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """``s B B' A' A x`` (..., m). A and B compute in their own dtype, A' and B' in theirs."""
        A, B = self.outer(adapter)
        inner_A, inner_B = self.nora_inner_A[adapter], self.nora_inner_B[adapter]
        z = F.linear(self.nora_dropout[adapter](self._cast_input_dtype(x, A.dtype)), A)  # (..., r)
        u = inner_A(self._cast_input_dtype(z, self.inner(adapter)[0].dtype))  # (..., r')
        return self.scaling[adapter] * F.linear(self._cast_input_dtype(inner_B(u), B.dtype), B)

    def __repr__(self) -> str:
        return "nora." + super().__repr__()


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
