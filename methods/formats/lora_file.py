"""A file of layers, in the names and tensors of diffusers, PEFT, kohya, LyCORIS or ComfyUI -> updates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from methods.formats.formulas import layer_update
from methods.formats.keys import refused_kind, split_key, what_it_is
from methods.formats.layers import Layer, layer_names, path_spellings
from methods.update import Update

LORA_METADATA = "lora_adapter_metadata"  # diffusers' header: each component's LoraConfig, flat
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts whose factors are relative to a changed base


def read_lora_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], components: Mapping[str, nn.Module]
) -> dict[str, dict[str, Update]]:
    """Component -> module path -> update; every key is applied.

    Args:
        path: what messages call the adapter.

    Raises:
        ValueError: as `reading.read_adapter`.
    """
    names = layer_names(components)
    found: dict[str, tuple[Layer, dict[str, torch.Tensor], dict[str, str]]] = {}
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            raise ValueError(f"adapter {path}: {_unknown_key(key, tensors)}")
        layer = names.get(split[0])
        if layer is None:
            raise ValueError(f"adapter {path} {_unknown_layer(split[0], tensors, names, components)}")
        if not isinstance(layer.module, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"adapter {path} changes {layer.name}, a {type(layer.module).__name__}: adapters of linear layers and "
                "convolutions alone can be loaded"
            )
        _, parts, keys = found.setdefault(layer.name, (layer, {}, {}))
        if split[1] in parts:
            raise ValueError(f"adapter {path} has {keys[split[1]]} and {key}, which are the same layer's: keep one")
        parts[split[1]], keys[split[1]] = tensor, key
    scalings = _Scalings(path, metadata)
    updates: dict[str, dict[str, Update]] = {}
    for layer, parts, keys in found.values():
        scaling = scalings.of(layer, parts.pop("alpha", None))
        parts = {name: tensor.float() for name, tensor in parts.items()}
        try:
            update = layer_update(parts, layer.module.weight, scaling)
        except ValueError as error:
            raise ValueError(f"adapter {path} {str(error).format(layer=_name(keys))}") from error
        except (RuntimeError, IndexError) as error:  # shapes that no product takes
            raise ValueError(f"adapter {path}: the tensors of {_name(keys)} don't fit each other") from error
        if parts:
            raise ValueError(f"adapter {path}: {keys[min(parts)]} has no place beside the layer's other tensors")
        if update.bias is not None and layer.module.bias is None:
            raise ValueError(f"adapter {path} has a bias for {_name(keys)}, which has none in this base")
        updates.setdefault(layer.component, {})[layer.path] = update
    return updates


def _name(keys: Mapping[str, str]) -> str:
    """The layer as the file calls it."""
    key = next(iter(keys.values()))
    parts = split_key(key)
    return parts[0] if parts else key


class _Scalings:
    """alpha / rank of each layer: from the tensor beside it, else from diffusers' header, else 1."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        if LORA_METADATA not in metadata:
            return
        try:
            flat = json.loads(metadata[LORA_METADATA])
            for name, value in flat.items():
                component, _, option = name.partition(".")
                self.header.setdefault(component, {})[option] = value
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"adapter {path} has a {LORA_METADATA} in its header that can't be read") from error
        for config in self.header.values():
            start = str(config.get("init_lora_weights")).lower()
            if start.startswith(_CHANGES_BASE):
                raise ValueError(
                    f"adapter {path} was made by {start}, relative to a base that it changed: save it as PEFT's "
                    "folder, which is loaded, or convert it to a LoRA first"
                )

    def of(self, layer: Layer, alpha: torch.Tensor | None) -> Callable[[int], float]:
        config = self.header.get(layer.component)
        if alpha is not None and alpha.numel() != 1:
            raise ValueError(f"adapter {self.path} has an alpha of shape {tuple(alpha.shape)} for {layer.name}")
        if alpha is None:
            spellings = path_spellings(layer.component, layer.path)
            return (lambda rank: _configured(config, spellings, rank)) if config else (lambda rank: 1.0)
        value = alpha.item()
        return lambda rank: value / rank


def _configured(config: Mapping[str, Any], spellings: Sequence[str], rank: int) -> float:
    """As PEFT's LoRA layers have it."""
    patterns = config.get("alpha_pattern") or {}
    matches = [patterns[key] for one in spellings if (key := get_pattern_key(patterns, one)) in patterns]
    alpha = matches[0] if matches else config.get("lora_alpha", rank)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _unknown_key(key: str, keys: Mapping[str, Any]) -> str:
    if (kind := refused_kind(key)) is not None:
        return f"{key} is of {kind}, which is not read from such files: convert it to a LoRA first"
    if (kind := what_it_is(keys)) is not None:
        return f"it is {kind}"
    return f"{key} is not a key of a LoRA, LoHa, LoKr or full difference in names that are known here"


def _unknown_layer(
    name: str, keys: Mapping[str, Any], names: Mapping[str, Layer], components: Mapping[str, nn.Module]
) -> str:
    if (kind := what_it_is(keys)) is not None:
        return f"is {kind}"
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix) and component not in components:
            return f"belongs to another base: this pipeline has no {component}"
    if not any((split := split_key(key)) and split[0] in names for key in keys):
        return (
            f"has none of the layers of this base (its first is {name}): it belongs to another base, or names its "
            "layers in a way that is not known here"
        )
    return f"belongs to another base: this one has no layer {name}; use the base it was trained on"


_COMPONENTS = {  # the longer prefix first
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "unet.": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_unet_": "unet",
}
