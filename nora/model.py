"""The tuner: puts NoRA layers into a model and takes PEFT's calls for them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from .basis import Basis, attached_statistic, base_weight, build_basis, check_base, is_plain, layer_shape
from .combine import concatenated, truncated
from .config import DEFAULT_OUTER_MULTIPLE, NoraConfig
from .generators import module_dtype
from .layer import NoraLinear, Origin, check_unmerged
from .parallel import in_parallel, over_layers

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
_WRAPPING_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Bases that were computed (and checked) before injection, by module name: loading must not pay for them twice.
_ready_bases: ContextVar[dict[str, Basis]] = ContextVar("ready_bases", default={})  # noqa: B039 (never mutated)


@contextmanager
def ready_bases(bases: dict[str, Basis]) -> Iterator[None]:
    """Injections inside use these instead of decomposing the weights."""
    token = _ready_bases.set(bases)
    try:
        yield
    finally:
        _ready_bases.reset(token)


def find_targets(model: nn.Module, config: NoraConfig) -> dict[str, nn.Module]:
    """Base layers that the config targets in the model, by module name, in the model's order. Changes neither."""
    config = copy.copy(config)
    if config.target_modules is None:
        tuner = cast(BaseTuner, NoraModel)  # it asks the class only
        NoraModel._prepare_adapter_config(tuner, config, BaseTuner.get_model_config(model))
    _maybe_include_all_linear_layers(config, model)
    tuner_layers = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    targets = {}
    for name, module in model.named_modules():
        inside_adapter = bool(tuner_layers) and name.startswith(tuner_layers)
        if name and not inside_adapter and BaseTuner._check_target_module_exists(config, name):
            targets[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return targets


def nora_layers(model: nn.Module, adapter_name: str) -> dict[str, NoraLinear]:
    """The model's layers that have the adapter, by module name without PEFT's own prefix."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, NoraLinear) and adapter_name in module.r
    }


def own_name(model: nn.Module, name: str) -> str:
    """The module's name without what PEFT, DDP, torch.compile, FSDP and checkpointing put before it."""
    parts = []
    for part in name.split("."):
        wrapped = isinstance(model, (PeftModel, BaseTuner, DataParallel, DistributedDataParallel))
        if not wrapped and part not in _WRAPPING_ATTRIBUTES:
            parts.append(part)
        model = getattr(model, part)
    return ".".join(parts)


def fold_nora(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The plain LoRA of rank r' that computes the same map: ``B B' (A' A) = s ΔW``, exact and loadable anywhere.

    Args:
        model: with NoRA layers inside: a `PeftModel`, or a model after ``add_adapter``.

    Returns:
        ``{module}.lora_A.weight`` (r', n) and ``{module}.lora_B.weight`` (m, r'), float32, with s folded into lora_B so
        that a reader that takes alpha = rank gets it right. Module names are relative to the model.

    Raises:
        ValueError: if the model has no such adapter.
    """
    layers = nora_layers(model, adapter_name)
    if not layers:
        raise ValueError(f"the model has no NoRA adapter {adapter_name!r}: inject one first, or name another")
    folded = {}
    for name, layer in layers.items():
        folded[f"{name}.lora_A.weight"], folded[f"{name}.lora_B.weight"] = layer.fold(adapter_name)
    return folded


def check_layer(name: str, base_layer: nn.Module, config: NoraConfig) -> None:
    """Refuse what can't hold the adapter, before anything is changed.

    Raises:
        ValueError: for a layer that isn't linear, is quantised, offloaded or bypassed, or is too small for the ranks.
    """
    leave_out = "leave that module out of target_modules"
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        kind = f"{type(base_layer).__name__} of {type(base_layer).__module__}"
        raise ValueError(f"{name} is a {kind}, and NoRA adapts nn.Linear and Conv1D: {leave_out}")
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        raise ValueError(f"{name} belongs to nn.MultiheadAttention, which never calls it as a module: {leave_out}")
    weight = base_weight(base_layer)
    if not is_plain(weight):
        kind = f"{type(weight).__name__}, dtype {weight.dtype}, shape {tuple(weight.shape)}"
        raise ValueError(
            f"{name} has a weight that is no plain matrix ({kind}), as in a quantised or sharded base, and NoRA has to "
            f"decompose it: load the base without that, or {leave_out}"
        )
    if not weight.is_meta and not bool(weight.any()):
        raise ValueError(f"{name} has a weight of zeros, and its outer factors would be zero too: {leave_out}")
    config.layer_ranks(name, layer_shape(base_layer))


def check_targets(model: nn.Module, config: NoraConfig) -> None:
    """Refuse a config that the model can't take, without changing either; injection makes the same checks.

    Raises:
        ValueError: if the config targets nothing, or a layer that is not linear or too small for the ranks.
    """
    targets = find_targets(model, config)
    if not targets:
        raise ValueError(f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}")
    for name, layer in targets.items():
        check_layer(name, layer, config)
        check_in_memory(model, name, layer)


def check_in_memory(model: nn.Module, name: str, base_layer: nn.Module) -> None:
    """Refuse a layer whose weight accelerate has offloaded. A model that is on the meta device by itself passes.

    Raises:
        ValueError: naming the layer.
    """
    if not base_weight(base_layer).is_meta:
        return
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    if any(hasattr(module, "_hf_hook") for module in (base_layer, *around)):
        raise ValueError(
            f"{name} is offloaded by accelerate, and NoRA needs its weight to decompose: load the base without "
            "offloading, or offload it after the adapter is in place"
        )


class NoraModel(BaseTuner):
    """NoRA, nested low-rank adaptation (arXiv 2408.10280), as a PEFT tuner.

    Every check of a config against the model runs before the first module is replaced.
    """

    prefix = "nora_"
    tuner_layer_cls = NoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    peft_config: dict[str, NoraConfig]  # type: ignore[assignment]

    # ------------------------------------------------------------------ injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        given = config.outer_init
        try:
            _choose_outer_init(model, config)
            bases = _ready_bases.get()
            if kwargs.get("state_dict") is None:  # with one, its keys choose the modules, and each is checked in turn
                self._check_before_injection(model, config)
                bases = self._bases(model, config)
            with ready_bases(bases):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # The name went into the model's configs, and diffusers and transformers mark the model as adapted, before
            # PEFT called us; left so, a second try with a corrected config would be refused.
            config.outer_init = given
            self.peft_config.pop(adapter_name, None)
            if not self.peft_config and getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    def _check_before_injection(self, model: nn.Module, config: NoraConfig) -> None:
        cut = []
        for name, layer in find_targets(model, config).items():
            check_unmerged(model.get_submodule(name), name, "adding another")
            check_layer(name, layer, config)
            check_in_memory(model, name, layer)
            weight = base_weight(layer)
            if weight.is_meta:
                continue
            if name not in _ready_bases.get():
                if not bool(torch.isfinite(weight).all()):
                    raise ValueError(f"{name} has NaN or infinity in its weight: load a sound base")
                self._statistic(name, layer, config)
            ranks = config.layer_ranks(name, layer_shape(layer))
            if ranks.cut:
                cut.append(f"{name} ({ranks.outer_r})")
        if cut:
            logger.warning(
                "outer_r is %d * r, or the smaller side where that is less: %d modules, the first %s",
                DEFAULT_OUTER_MULTIPLE,
                len(cut),
                cut[0],
            )

    def _bases(self, model: nn.Module, config: NoraConfig) -> dict[str, Basis]:
        """The targets' bases: what is ready, and the others computed, a core to a layer; see `over_layers`."""
        ready = _ready_bases.get()
        if config.saved:  # they come with the weights
            return ready
        targets = find_targets(model, config)
        missing = [name for name, layer in targets.items() if name not in ready and not base_weight(layer).is_meta]

        def build(name: str) -> Basis:
            layer = targets[name]
            statistic = self._statistic(name, layer, config)
            outer_r = config.layer_ranks(name, layer_shape(layer)).outer_r
            return build_basis(own_name(model, name), layer, config, outer_r, statistic).to(base_weight(layer).dtype)

        bases = over_layers(build, missing)
        return ready | {name: one.at(base_weight(targets[name]).device) for name, one in zip(missing, bases)}

    @staticmethod
    def _statistic(name: str, base_layer: nn.Module, config: NoraConfig) -> torch.Tensor | None:
        """The layer's statistic (n,), or None where it isn't needed or comes later with the weights."""
        if not config.needs_statistics or config.saved:
            return None
        statistic = attached_statistic(base_layer, config.awsvd_stat)
        if statistic is None:
            raise ValueError(
                f'outer_init="awsvd" needs the {config.awsvd_stat} of the activations, and {name} has none: call '
                'preprocess_nora(model, config, run_model) first, or use outer_init="svd"'
            )
        return statistic

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: NoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_layer(current_key, base_layer, peft_config)
        ranks = peft_config.layer_ranks(current_key, layer_shape(base_layer))
        name = own_name(self.model, current_key)
        layer = target if isinstance(target, NoraLinear) else NoraLinear(target, name)
        layer.update_layer(adapter_name, Origin(copy.copy(peft_config), current_key), ranks, peft_config.inference_mode)

        basis = _ready_bases.get().get(current_key)
        on_meta = base_weight(base_layer).is_meta
        if basis is None and peft_config.saved and not on_meta:
            layer.await_basis(adapter_name)
        else:
            if basis is None:
                statistic = None if on_meta else self._statistic(current_key, base_layer, peft_config)
                basis = build_basis(name, base_layer, peft_config, ranks.outer_r, statistic)
            layer.set_basis(adapter_name, basis)
            layer.reset_inner(adapter_name, peft_config, basis)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Trained factors to float32. PEFT's own would upcast the frozen pair too and double its memory."""
        if not autocast_adapter_dtype:
            return
        for layer in nora_layers(self.model, adapter_name).values():
            for module in layer.trained(adapter_name).values():
                if module_dtype(module).itemsize < 4:
                    module.float()

    # ------------------------------------------------------------------ sums of adapters

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose update is ``Σ_i weights_i ΔW_i``: exactly ("cat"), or at its best low rank ("svd").

        The adapters must share their outer factors; then ``Σ w_i s_i B B'_i A'_i A = B [B'_1 …] [w_1 s_1 A'_1; …] A``,
        and "cat" is exact at rank ``Σ r_i``, which has to fit between the outer factors. "svd" is the nearest update of
        rank ``svd_rank`` (default: the largest of theirs) in Frobenius norm. PEFT's "linear" adds up the factors
        themselves, which isn't the sum of the updates, and is refused.

        Raises:
            ValueError: if the name is taken, an adapter is unknown, the lengths or the type don't fit, the rank exceeds
                an outer rank, or the adapters differ in their modules or outer factors, naming the layer.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} exists already: choose another name")
        unknown = sorted(set(adapters) - set(self.peft_config))
        if unknown or not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"adapters={adapters} with weights={weights}: name one or more of {sorted(self.peft_config)}, and one "
                "weight for each"
            )
        if combination_type not in ("cat", "svd"):
            raise ValueError(
                f'combination_type={combination_type!r} is not the sum of the updates: use "cat" (exact) or "svd" with '
                "svd_rank"
            )
        for name in adapters:
            config = self.peft_config[name]
            if (config.structure, config.position, config.generator) != ("serial", "a", "dense") or config.has_residual:
                raise ValueError(
                    f'adapter {name!r} is not of structure="serial" at position="a", dense and without a residual, and '
                    "only such can be added between their outer factors: fold them and add LoRAs"
                )
        layers = {name: nora_layers(self.model, name) for name in adapters}
        first = layers[adapters[0]]
        for other in adapters[1:]:
            _check_same_basis(first, layers[other], adapters[0], other)
        ranks = {name: sum(layers[a][name].r[a] for a in adapters) for name in first}
        rank = max(ranks.values())
        if combination_type == "svd":
            rank = svd_rank or max(layers[a][name].r[a] for a in adapters for name in first)
        for name, layer in first.items():
            outer_r = layer.outer_rank(adapters[0])
            if rank > outer_r:
                raise ValueError(
                    f'rank {rank} of the sum exceeds outer_r={outer_r} at {name}: use combination_type="svd" with '
                    f"svd_rank of at most {outer_r}"
                )

        widths = {name: layer.outer_rank(adapters[0]) for name, layer in first.items()}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            r=rank,
            nora_alpha=None,
            scaling="alpha/r",
            rank_pattern={},
            alpha_pattern={},
            outer_r=min(widths.values()),
            outer_rank_pattern={name: width for name, width in widths.items() if width > min(widths.values())},
        )
        with ready_bases({name: layer.basis(adapters[0]) for name, layer in first.items()}):
            self.inject_adapter(self.model, adapter_name)
        for layer in first.values():
            parts = [(weight * layer.scaling[a], layer.inner(a)) for a, weight in zip(adapters, weights)]
            self._set_sum(layer, adapter_name, parts, combination_type)

    @staticmethod
    @torch.no_grad()
    def _set_sum(layer: NoraLinear, adapter_name: str, parts: list, combination_type: str) -> None:
        new_A, new_B = layer.inner(adapter_name)
        inner_A, inner_B = concatenated(parts)
        if combination_type == "svd":
            inner_A, inner_B = truncated((inner_A, inner_B), layer.outer(adapter_name), new_A.shape[0])
        new_A.zero_()  # a layer whose ranks add up to less than the widest keeps zeros in the rest
        new_B.zero_()
        new_A[: inner_A.shape[0]] = inner_A
        new_B[:, : inner_B.shape[1]] = inner_B

    # ------------------------------------------------------------------ batches that mix adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """``model(x, adapter_names=[...])``: one adapter per sample, "__base__" for none; for inference."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first, since mixed "
                "batches are for inference"
            )
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            raise ValueError(f"adapter_names={adapter_names!r} must be a list with one name for each sample")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}, and the model has "
                f"{', '.join(sorted(self.peft_config))}"
            )
        # Beam search repeats every sample, but an encoder has run before that.
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        before_beams = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in self.modules():
            if isinstance(module, (NoraLinear, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in before_beams else repeated
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ files, as PEFT reads and writes them

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The adapter's entries of the state dict, as a file holds them.

        One that still waits for its weights may be asked for its keys; a file of it is refused when it is loaded.

        Raises:
            ValueError: if the adapter is offloaded, or was made on the meta device, so that a file would hold nothing.
        """
        for layer in nora_layers(model, adapter_name).values():
            if adapter_name in layer.nora_outer_A:
                layer.check_adapter_is_here(adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Rebuild each layer's outer pair from the file's statistic and refuse the file if it isn't the saved one.

        Raises:
            ValueError: naming the layer whose base weight or outer pair differs, or whose fingerprint is missing. All
                layers are checked before the first is changed.
        """
        saved = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in state_dict.items()}
        loaded = {}
        for name, layer in nora_layers(model, adapter_name).items():
            held = tuple(f"{name}.nora_{trained}." for trained in layer.trained(adapter_name))
            if any(key.startswith(held) for key in saved) and not layer.is_on_meta(adapter_name):
                loaded[name] = layer
        for name, layer in loaded.items():
            layer.check_unmerged("loading")
            layer.check_base_is_here()
            for key, needed in (
                ("nora_fingerprint", True),
                ("nora_stats", config.needs_statistics),
                ("nora_start", config.has_residual),
            ):
                if needed and f"{name}.{key}" not in saved:
                    raise ValueError(
                        f"{name}: the weights come without {key}, and inner weights mean nothing in another basis: "
                        "save with PEFT's save_pretrained, or load a LoRA that fold_nora made of the adapter"
                    )
            check_base(name, layer.get_base_layer(), saved[f"{name}.nora_fingerprint"])

        def rebuilt(name: str) -> Basis | None:
            layer, expected = loaded[name], saved[f"{name}.nora_fingerprint"]
            if layer.pair_fits(adapter_name, expected):
                return None
            basis = layer.rebuilt_basis(adapter_name, expected, saved.get(f"{name}.nora_stats"))
            return basis.to(layer.base_weight.dtype)

        for name, basis in zip(loaded, in_parallel(rebuilt, loaded)):
            if basis is not None:
                loaded[name].set_basis(adapter_name, basis)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _choose_outer_init(model: nn.Module, config: NoraConfig) -> None:
    """Write into the config what ``outer_init=None`` means for this model.

    Raises:
        ValueError: if only some of the targeted modules were calibrated.
    """
    if config.outer_init is not None:
        return
    targets = find_targets(model, config)
    silent = [name for name, layer in targets.items() if attached_statistic(layer, config.awsvd_stat) is None]
    if config.awsvd_stat == "weight" or not silent:
        config.outer_init = "awsvd"
    elif len(silent) == len(targets):
        config.outer_init = "svd"
        warnings.warn(
            "outer_init is None and the model was not calibrated, so the outer factors are the plain SVD of its "
            'weights: call preprocess_nora(model, config, run_model) first for AwSVD, or set outer_init="svd"',
            stacklevel=2,
        )
    else:
        raise ValueError(
            f"outer_init is None, and {len(silent)} of {len(targets)} targeted modules were not calibrated, the first "
            f'{silent[0]}: call preprocess_nora(model, config, run_model) with this config, or set outer_init="svd"'
        )
    config.outer_init_was_chosen = True


def _check_same_basis(one: dict[str, NoraLinear], other: dict[str, NoraLinear], name: str, other_name: str) -> None:
    if set(one) != set(other):
        module = min(set(one) ^ set(other))
        raise ValueError(f"adapters {name!r} and {other_name!r} don't both adapt {module}: fold them and add LoRAs")
    for module, layer in one.items():
        if not layer.shares_basis(name, other_name):
            raise ValueError(
                f"adapters {name!r} and {other_name!r} have different outer factors at {module}, and inner weights "
                "can't be added across bases: fold them and add LoRAs"
            )


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": adapter_names}
