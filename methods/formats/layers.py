"""The base's layers by every name that adapter files give them: a table made from the base, nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from methods.formats.sgm import SgmNames

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
COMFY_PREFIXES = {
    "text_encoder": "text_encoders.clip_l.transformer",
    "text_encoder_2": "text_encoders.clip_g.transformer",
}
_ATTENTION = re.compile(r"(?P<block>.+\.attn\d+)\.(?P<side>to_[qkv]|to_out)(\.0)?")
_TEXT_ATTENTION = re.compile(r"(?P<block>.+\.self_attn)\.(?P<side>[qkv]|out)_proj")


class Layer(NamedTuple):
    """A layer of the base, without any adapter on it."""

    component: str
    path: str
    module: nn.Module

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}"


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> layer with a weight of its own; adapters on it are seen through."""
    found: dict[str, nn.Module] = {}
    adapted = None  # the adapted layer that the walk is inside of
    for path, module in model.named_modules():
        if adapted is not None and path.startswith(f"{adapted}."):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted, found[path] = path, module.get_base_layer()
        elif module._parameters.get("weight") is not None:
            found[path] = module
    return found


def layer_names(components: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Every name that a file may give to a layer of these components -> the layer."""
    names: dict[str, Layer] = {}
    for component, model in components.items():
        layers = base_layers(model)
        sgm = SgmNames(layers).names if component == "unet" else {}
        for path, module in layers.items():
            layer = Layer(component, path, module)
            for name in _names(component, path):
                names[name] = layer
            for name in _sgm_spellings(sgm.get(path)):
                names[name] = layer
    return names


def path_spellings(component: str, path: str) -> list[str]:
    """The path, and for text encoders also without or with `text_model`: versions of transformers differ in it."""
    if component == "unet":
        return [path]
    return [path, path.removeprefix("text_model.") if path.startswith("text_model.") else f"text_model.{path}"]


def _names(component: str, path: str) -> Iterator[str]:
    for spelling in path_spellings(component, path):
        yield f"{component}.{spelling}"  # diffusers
        yield f"{KOHYA_PREFIXES[component]}_{spelling.replace('.', '_')}"  # kohya, LyCORIS
        if component == "unet":
            yield spelling  # diffusers' script of 2023
            yield f"lycoris_{spelling.replace('.', '_')}"  # LyCORIS around a UNet
        else:
            yield f"{COMFY_PREFIXES[component]}.{spelling}"
        for old in _old_attention(spelling):
            yield f"{component}.{old}"
            if component == "unet":
                yield old


def _old_attention(path: str) -> list[str]:
    """An attention layer as diffusers spelled it before PEFT; the adapters were processors then."""
    if match := _ATTENTION.fullmatch(path):
        return [f"{match['block']}.processor.{match['side']}", f"{match['block']}.{match['side']}"]
    if match := _TEXT_ATTENTION.fullmatch(path):
        return [f"{match['block']}.to_{match['side']}"]
    return []


def _sgm_spellings(name: str | None) -> list[str]:
    if name is None:
        return []
    return [f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}"]


def model_of(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A bare model with these layers at these paths."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, last = path.split(".")
        parent = root
        for name in parents:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent._modules[name]
        parent.add_module(last, layer)
    return root
