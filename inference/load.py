"""Adapters on and off a pipeline.

Every check that can be made on a file's header is made before the pipeline is touched, and a load that fails leaves
the pipeline as it was.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import PeftConfig, PeftType, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

import nora
from inference.adapter_files import AdapterFile, check_lora_fits, inspect_adapter
from inference.tokens import has_new_word, load_new_word, remove_new_words
from methods.basis_cache import basis_cache
from methods.components import COMPONENT_NAMES, FOLDED_WEIGHTS, INNER_WEIGHTS, adapter_components


@basis_cache()
def load_adapter(
    pipeline: StableDiffusionXLPipeline, path: str | Path, scale: float = 1.0, name: str | None = None
) -> str:
    """Load a NoRA or LoRA adapter onto the pipeline, beside those already there, and return its name.

    Args:
        path: a run folder, its folded file, its inner-only file, any LoRA file of diffusers or kohya, or a PEFT folder.
        scale: factor on the adapter's update; 0 gives the base, 1 what was trained.
        name: for `set_adapter_scale` and `unload_adapters`; letters, digits, "-" and "_". None: from the path.

    Raises:
        ValueError: not an adapter, an adapter of another base, or a name in use. The pipeline is then as before.
    """
    file = inspect_adapter(path)
    name = _default_name(path) if name is None else name
    components = adapter_components(pipeline)
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(f'adapter name "{name}" must be made of letters, digits, "-" and "_"')
    _check_scale(scale)
    names = loaded_adapters(pipeline)
    if name in names:
        raise ValueError(
            f'an adapter "{name}" is already loaded (loaded: {", ".join(names)}): pass another name, '
            f'or call unload_adapters(pipeline, "{name}") first'
        )
    _check_fits(pipeline, file, components)
    active = {prefix: _active_adapters(module) for prefix, module in components.items()}
    try:
        if file.kind == "inner":
            prefixes = nora.inner_prefixes(file.path)
            nora.load_inner(file.path, {prefix: components[prefix] for prefix in prefixes}, adapter_name=name)
        elif file.kind == "peft":
            for part, folder in file.parts.items():
                _load_peft(getattr(pipeline, part), folder, name)
        else:  # diffusers reads kohya's spelling too
            pipeline.load_lora_weights(file.path.parent, weight_name=file.path.name, adapter_name=name)
        if file.new_word is not None:
            load_new_word(pipeline, file.new_word, name)
    except BaseException:
        unload_adapters(pipeline, name)
        _activate(components, active)
        raise
    _activate(components, {prefix: [*names, name] for prefix, names in active.items()})
    set_adapter_scale(pipeline, name, scale)
    return name


def swap_adapter(pipeline: StableDiffusionXLPipeline, path: str | Path, name: str) -> None:
    """Put another adapter in the place of the one that is loaded under ``name``, at its scale.

    Where the layers and ranks are the same, which they are between runs of one configuration, only weights are copied,
    and a swap costs what its file costs to read; otherwise one is taken off and the other put on. Merged weights are
    unmerged first.

    Args:
        path: as for `load_adapter`.

    Raises:
        ValueError: as `load_adapter`, or no adapter of that name is loaded; the adapter that was loaded is then still
            there, or off if the new one's file broke while it was read.
    """
    file = inspect_adapter(path)
    scale = _adapter_scale(pipeline, name)
    _check_fits(pipeline, file, adapter_components(pipeline))
    if not _copy_weights(pipeline, file, name):
        unload_adapters(pipeline, name)
        load_adapter(pipeline, path, scale, name)


def _copy_weights(pipeline: StableDiffusionXLPipeline, file: AdapterFile, name: str) -> bool:
    """Copy a plain LoRA's weights into the loaded one's; False, with nothing done, where more differs than they."""
    new_words = file.new_word is not None or has_new_word(pipeline, name)
    if file.kind != "folded" or "lora_adapter_metadata" in file.metadata or new_words or _merged(pipeline):
        return False
    live = {}
    for prefix, module in adapter_components(pipeline).items():
        config = getattr(module, "peft_config", {}).get(name)
        if config is None:
            continue
        plain = config.peft_type == PeftType.LORA and not (config.use_dora or config.use_rslora or config.alpha_pattern)
        if not plain or config.lora_alpha != config.r or config.rank_pattern:
            return False
        for layer_name, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                live[f"{prefix}.{layer_name}.lora_A.weight"] = layer.lora_A[name].weight
                live[f"{prefix}.{layer_name}.lora_B.weight"] = layer.lora_B[name].weight
    # files differ in whether they spell transformers' old `text_model` level
    spelled = {_without_level(key): key for key in file.shapes}
    live = {_without_level(key): weight for key, weight in live.items()}
    if {key: tuple(weight.shape) for key, weight in live.items()} != {
        key: file.shapes[spelled[key]] for key in spelled
    }:
        return False
    weights = load_file(file.path)
    with torch.no_grad():
        for key, weight in live.items():
            weight.copy_(weights[spelled[key]])
    return True


def _without_level(key: str) -> str:
    return re.sub(r"^(text_encoder(_2)?)\.text_model\.", r"\1.", key)


def _check_fits(pipeline: StableDiffusionXLPipeline, file: AdapterFile, components: dict[str, nn.Module]) -> None:
    """Refuse another base's adapter, as far as that can be seen without touching the pipeline."""
    if file.kind == "folded":
        check_lora_fits(file.path, file.shapes, components)
    elif file.kind == "kohya":
        # the names say nothing of the layer until diffusers has translated them, which it does in two steps
        weights, _ = pipeline.lora_state_dict(str(file.path), unet_config=pipeline.unet.config)
        text = {key: weight for key, weight in weights.items() if key.startswith("text_encoder")}
        unet = {key: weight for key, weight in weights.items() if key not in text}
        weights = convert_unet_state_dict_to_peft(unet) | (convert_state_dict_to_peft(text) if text else {})
        check_lora_fits(file.path, {key: tuple(weight.shape) for key, weight in weights.items()}, components)
    elif file.kind == "inner":
        if absent := [prefix for prefix in nora.inner_prefixes(file.path) if prefix not in components]:
            raise ValueError(f"adapter {file.path} belongs to another base: this pipeline has no {', '.join(absent)}")
    elif all("lora_A" in key or "lora_B" in key for key in file.shapes):
        check_lora_fits(file.path, file.shapes, components)


def _load_peft(model: nn.Module, folder: Path, name: str) -> None:
    """Put a PEFT adapter of any method into one component."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    if not hasattr(model, "text_model"):  # a level that transformers 5 dropped, see adapter_components
        weights = {key.replace("base_model.model.text_model.", "base_model.model."): w for key, w in weights.items()}
    weights = {key.removeprefix("base_model.model."): weight for key, weight in weights.items()}
    model.add_adapter(config, adapter_name=name)
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    if result.unexpected_keys:
        raise ValueError(
            f"adapter {folder} belongs to another base: this one has no place for {result.unexpected_keys[0]}; "
            "use the base it was trained on"
        )


def loaded_adapters(pipeline: StableDiffusionXLPipeline) -> list[str]:
    """Names of the adapters on any part of the pipeline, in the order they were loaded."""
    components = adapter_components(pipeline).values()
    return list(dict.fromkeys(name for module in components for name in getattr(module, "peft_config", None) or {}))


def adapted_components(pipeline: StableDiffusionXLPipeline) -> list[str]:
    """Names of the parts that carry an adapter."""
    parts = {name: getattr(pipeline, name, None) for name in COMPONENT_NAMES}
    return [name for name, module in parts.items() if module is not None and _tuner_layers(module)]


def set_adapter_scale(pipeline: StableDiffusionXLPipeline, name: str, scale: float) -> None:
    """Scale one adapter's update in every part, whatever the other adapters' scales are."""
    _check_scale(scale)
    for layer in _layers_of(pipeline, name):
        layer.set_scale(name, float(scale))


def _adapter_scale(pipeline: StableDiffusionXLPipeline, name: str) -> float:
    """What `set_adapter_scale` set; PEFT's layers keep only its product with their own alpha / r."""
    layer = next(layer for layer in _layers_of(pipeline, name) if name in layer.scaling)
    product = layer.scaling[name]
    layer.set_scale(name, 1.0)
    own = layer.scaling[name]
    layer.scaling[name] = product
    return product / own


def _layers_of(pipeline: StableDiffusionXLPipeline, name: str) -> list[BaseTunerLayer]:
    if name not in loaded_adapters(pipeline):
        raise ValueError(f'no adapter "{name}" is loaded (loaded: {", ".join(loaded_adapters(pipeline)) or "none"})')
    return [layer for module in adapter_components(pipeline).values() for layer in _tuner_layers(module)]


def _merged(pipeline: StableDiffusionXLPipeline) -> bool:
    return any(layer.merged for module in adapter_components(pipeline).values() for layer in _tuner_layers(module))


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


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _active_adapters(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in _tuner_layers(module) for name in layer.active_adapters))


def _activate(components: dict[str, nn.Module], names: dict[str, list[str]]) -> None:
    for prefix, module in components.items():
        for layer in _tuner_layers(module):
            layer.set_adapter(names[prefix], inference_mode=True)
