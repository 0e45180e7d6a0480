"""Adapters on and off a pipeline.

There is one kind of them here: LoRA layers of PEFT that hold `Update`s, whatever method made them. The base's weights
are never touched, so scale 0 and taking an adapter off are the base to the bit. A file is read and checked to the end
before the pipeline is touched, and a load that fails leaves the pipeline as it was.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from inference.adapter_files import AdapterFile, inspect_adapter, read_run_record
from inference.base_statistics import base_statistics
from inference.prediction import Prediction, prediction_of
from inference.tokens import add_new_word, check_new_word, has_new_word, read_new_word, remove_new_words
from methods.basis_cache import basis_cache
from methods.components import COMPONENT_NAMES, FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.formats.layers import base_layers
from methods.reading import Updates, read_file
from methods.update import Update


@basis_cache()
def load_adapter(
    pipeline: StableDiffusionXLPipeline, path: str | Path, scale: float = 1.0, name: str | None = None
) -> str:
    """Load an adapter of any method onto the pipeline, beside those already there, and return its name.

    Args:
        path: a run folder, one of its files, any file of LoRA, LoCon, DoRA, LoHa or LoKr in the names of diffusers,
            kohya, LyCORIS or ComfyUI, or a PEFT folder of any method.
        scale: factor on the adapter's update; 0 gives the base, 1 what was trained.
        name: for `set_adapter_scale` and `unload_adapters`; letters, digits, "-" and "_". None: from the path.

    Raises:
        ValueError: not an adapter, an adapter of another base, or a name in use. The pipeline is then as before.
    """
    file = inspect_adapter(path)
    name = _default_name(path) if name is None else name
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(f'adapter name "{name}" must be made of letters, digits, "-" and "_"')
    _check_scale(scale)
    names = loaded_adapters(pipeline)
    if name in names:
        raise ValueError(
            f'an adapter "{name}" is already loaded (loaded: {", ".join(names)}): pass another name, '
            f'or call unload_adapters(pipeline, "{name}") first'
        )
    read = _read(pipeline, file)
    if _merged(pipeline):
        raise ValueError(
            f"adapter {file.path} can't be loaded while others are merged, because merged layers would leave it out: "
            "call pipeline.unfuse_lora first, or load it before merging"
        )
    _put_on(pipeline, read, name, scale)
    return name


def swap_adapter(pipeline: StableDiffusionXLPipeline, path: str | Path, name: str) -> None:
    """Put another adapter in the place of the one that is loaded under ``name``, at its scale.

    Where the layers and ranks are the same, which they are between runs of one configuration, only weights are copied,
    and a swap costs what its file costs to read; otherwise one is taken off and the other put on. Merged weights are
    unmerged first.

    Args:
        path: as for `load_adapter`.

    Raises:
        ValueError: as `load_adapter`, or no adapter of that name is loaded; the pipeline is then as before.
    """
    file = inspect_adapter(path)
    scale = _adapter_scale(pipeline, name)
    read = _read(pipeline, file, in_place_of=name)
    if not _copy_weights(pipeline, read, name):
        unload_adapters(pipeline, name)
        _put_on(pipeline, read, name, scale)


class _Read(NamedTuple):
    """An adapter that fits the pipeline, in the dtypes and on the devices of its layers."""

    updates: Updates
    new_word: tuple[str, dict[str, torch.Tensor]] | None


def _read(pipeline: StableDiffusionXLPipeline, file: AdapterFile, in_place_of: str | None = None) -> _Read:
    components = _components(pipeline)
    _warn_of_other_prediction(pipeline, file)
    updates = read_file(file, components, base_statistics(pipeline))
    new_word = read_new_word(file.new_word) if file.new_word is not None else None
    if new_word is not None:
        check_new_word(pipeline, *new_word, in_place_of=in_place_of)
    for component, found in updates.items():
        layers, dtype = base_layers(components[component]), components[component].dtype  # which walks the model
        for path, update in found.items():
            found[path] = placed = _place(update, layers[path].weight, dtype)
            if not placed.is_finite():
                raise ValueError(f"adapter {file.path} is too large for {placed.up.dtype} in {component}.{path}")
    return _Read(updates, new_word)


def _warn_of_other_prediction(pipeline: StableDiffusionXLPipeline, file: AdapterFile) -> None:
    """Say where an adapter was trained for noise and is drawn on a base of velocity, or the other way round."""
    trained_for = read_run_record(file.path).get("prediction_type")
    predicts = prediction_of(pipeline.scheduler)
    if isinstance(trained_for, str) and trained_for != predicts.kind:
        print(
            f"warning: adapter {file.path} was trained on a base that predicts {Prediction(trained_for, False).said}, "
            f"and this one predicts {predicts.said}: pictures will be off; see --prediction_type if that is not meant",
            file=sys.stderr,
        )


def _place(update: Update, weight: torch.Tensor, dtype: torch.dtype) -> Update:
    """The update where its layer is, and as precise: factors of one size, so that neither leaves float16's range."""
    if weight.device.type == "meta":
        raise ValueError("the base's weights are offloaded: load adapters before enable_sequential_cpu_offload")
    if dtype == torch.float16:
        update = update.balanced()
    return Update(*(None if one is None else one.to(weight.device, dtype).contiguous() for one in update))


def _put_on(pipeline: StableDiffusionXLPipeline, read: _Read, name: str, scale: float) -> None:
    components = _components(pipeline)
    active = {component: _active_adapters(module) for component, module in components.items()}
    try:
        for component, updates in read.updates.items():
            _inject(components[component], updates, name)
        if read.new_word is not None:
            add_new_word(pipeline, *read.new_word, name)
    except BaseException:
        unload_adapters(pipeline, name)
        _activate(components, active)
        raise
    _activate(components, {component: [*names, name] for component, names in active.items()})
    set_adapter_scale(pipeline, name, scale)


def _inject(model: nn.Module, updates: Mapping[str, Update], name: str) -> None:
    """Plain LoRA layers with alpha = rank at exactly these modules."""
    by_rank: dict[int, list[str]] = {}
    for path, update in updates.items():
        by_rank.setdefault(update.rank, []).append(path)
    common = Counter({rank: len(paths) for rank, paths in by_rank.items()}).most_common(1)[0][0]
    # PEFT tries each pattern on each layer, so one for all layers of a rank
    others = {_exactly(paths): rank for rank, paths in by_rank.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_exactly(updates),
        inference_mode=True,
        init_lora_weights=False,  # they come below
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are several adapters, which is meant
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)  # on the meta device: nothing is drawn
    model._hf_peft_config_loaded = True  # diffusers and transformers ask for it before they touch an adapter
    for path, (up, down, bias) in updates.items():
        layer = model.get_submodule(path)
        layer.lora_A[name].weight = nn.Parameter(down, requires_grad=False)
        layer.lora_B[name].weight = nn.Parameter(up, requires_grad=False)
        if bias is not None:
            layer.lora_B[name].bias = nn.Parameter(bias, requires_grad=False)
            layer.lora_bias[name] = True


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"


@torch.no_grad()
def _copy_weights(pipeline: StableDiffusionXLPipeline, read: _Read, name: str) -> bool:
    """Copy the updates into the loaded ones; False, with nothing done, where more differs than numbers."""
    if read.new_word is not None or has_new_word(pipeline, name) or _merged(pipeline):
        return False
    live = {
        (component, path): layer
        for component, module in _components(pipeline).items()
        for path, layer in module.named_modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
    }
    new = {(component, path): update for component, found in read.updates.items() for path, update in found.items()}
    if live.keys() != new.keys() or not all(_holds(live[place], name, new[place]) for place in live):
        return False
    for place, update in new.items():
        live[place].lora_A[name].weight.copy_(update.down)
        live[place].lora_B[name].weight.copy_(update.up)
    return True


def _holds(layer: LoraLayer, name: str, update: Update) -> bool:
    """Whether the layer becomes the update by its two factors alone."""
    plain = not (layer.use_dora.get(name) or layer.use_rslora.get(name) or layer.lora_bias.get(name))
    return (
        plain
        and update.bias is None
        and layer.lora_alpha[name] == layer.r[name]
        and layer.lora_A[name].weight.shape == update.down.shape
    )


def loaded_adapters(pipeline: StableDiffusionXLPipeline) -> list[str]:
    """Names of the adapters on any part of the pipeline, in the order they were loaded."""
    components = _components(pipeline).values()
    return list(dict.fromkeys(name for module in components for name in getattr(module, "peft_config", None) or {}))


def adapted_components(pipeline: StableDiffusionXLPipeline) -> list[str]:
    """Names of the parts that carry an adapter."""
    return [name for name, module in _components(pipeline).items() if _tuner_layers(module)]


def set_adapter_scale(pipeline: StableDiffusionXLPipeline, name: str, scale: float) -> None:
    """Scale one adapter's update in every part, whatever the other adapters' scales are.

    Raises:
        ValueError: no adapter of that name is loaded, or it is merged, so that its scale is in the weights already.
    """
    _check_scale(scale)
    layers = _layers_of(pipeline, name)
    if any(name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f'adapter "{name}" is merged, and its scale is in the weights: call pipeline.unfuse_lora first, or set the '
            "scale before merging"
        )
    for layer in layers:
        layer.set_scale(name, float(scale))


def _adapter_scale(pipeline: StableDiffusionXLPipeline, name: str) -> float:
    """What `set_adapter_scale` set; PEFT's layers keep only its product with their own alpha / r."""
    layer = next(layer for layer in _layers_of(pipeline, name) if name in layer.scaling)
    product = layer.scaling[name]
    layer.set_scale(name, 1.0)
    own = layer.scaling[name]
    layer.scaling[name] = product
    return product / own


def _layers_of(pipeline: StableDiffusionXLPipeline, name: str) -> list[Any]:
    if name not in loaded_adapters(pipeline):
        raise ValueError(f'no adapter "{name}" is loaded (loaded: {", ".join(loaded_adapters(pipeline)) or "none"})')
    return [layer for module in _components(pipeline).values() for layer in _tuner_layers(module)]


def _merged(pipeline: StableDiffusionXLPipeline) -> bool:
    return any(layer.merged for module in _components(pipeline).values() for layer in _tuner_layers(module))


def unload_adapters(pipeline: StableDiffusionXLPipeline, name: str | None = None) -> None:
    """Take one adapter, or all of them, off the pipeline, with their new words.

    With the last one gone, the base's own layers are back.
    """
    if _merged(pipeline):
        pipeline.unfuse_lora(components=list(COMPONENT_NAMES))
    if name is not None:
        pipeline.delete_adapters(name)
        remove_new_words(pipeline, name)
    if name is None or not loaded_adapters(pipeline):
        pipeline.unload_lora_weights()
        remove_new_words(pipeline)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number; 1 is the adapter as trained")


def _default_name(path: str | Path) -> str:
    """From the run folder's name, or the file's; prefixed so that it is no part of any parameter's name.

    transformers looks for an adapter's name inside parameter names when it loads one, and "out" is inside "out_proj".
    """
    path = Path(path).resolve()
    stem = path.stem if path.is_file() else path.name
    if path.name in (FOLDED_WEIGHTS, INNER_WEIGHTS):
        stem = path.parent.name
    return "adapter_" + (re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "0")


def _components(pipeline: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    parts = {name: getattr(pipeline, name, None) for name in COMPONENT_NAMES}
    return {name: module for name, module in parts.items() if module is not None}


def _tuner_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _active_adapters(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in _tuner_layers(module) for name in layer.active_adapters))


def _activate(components: Mapping[str, nn.Module], names: Mapping[str, list[str]]) -> None:
    for component, module in components.items():
        for layer in _tuner_layers(module):
            layer.set_adapter(names[component], inference_mode=True)
