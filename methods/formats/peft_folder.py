"""A folder of PEFT, of any method -> updates: PEFT builds its layers beside the base, and what they add is read off.

The layers stand on float32 copies, because some methods write to the base when they start; the update is taken against
the base itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from peft.tuners.adalora import SVDLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from methods.adalora import allocated_update
from methods.adapter import NAME, adapted_layers
from methods.formats.layers import Layer, base_layers, model_of, path_spellings
from methods.update import Update, measured_update
from nora import NoraLinear

PEFT_PREFIX = "base_model.model."
_STARTED_FROM_BASE = ("pissa", "olora")  # can be done again from the base alone
_STARTED_FROM_DATA = ("corda", "loftq", "lora_ga")  # can't
_CLASSES = {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder"}
_CLASSES["CLIPTextModelWithProjection"] = "text_encoder_2"
LINEARITY = 1e-3  # relative error at a random input, above which a layer is not linear


def read_peft_folder(
    folder: Path, part: str, tensors: Mapping[str, torch.Tensor], components: Mapping[str, nn.Module]
) -> tuple[str, dict[str, Update]]:
    """(component, module path -> update).

    Args:
        part: the component, or "" if the layers must say it.
        tensors: of adapter_model.safetensors.

    Raises:
        ValueError: as `reading.read_adapter`.
    """
    config = _config(folder)
    if not any(key.startswith("base_model.") for key in tensors):  # as diffusers names what it hands to PEFT
        tensors = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    component = part or _component(folder, config, tensors, components)
    if component not in components:
        raise ValueError(f"adapter {folder} belongs to another base: this pipeline has no {component}")
    layers = _layers(folder, config, component, tensors, components[component])
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model, starts = _build(folder, config, layers, tensors)
            return component, _updates(folder, model, starts, layers)
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise ValueError(f"adapter {folder}: {error}") from error
    except Exception as error:  # whatever PEFT raises on a configuration or file that it can't use
        raise ValueError(f"adapter {folder}: PEFT can't build its {_kind(config)} ({_short(error)})") from error


def _config(folder: Path) -> PeftConfig:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(f"adapter {folder} has a configuration that PEFT can't read ({_short(error)})") from error
    kind = _kind(config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)) or not hasattr(config, "target_modules"):
        raise ValueError(f"adapter {folder} is of {kind}, which adds nothing to a layer's weight: it can't be loaded")
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices"):
        if value := getattr(config, name, None):
            raise ValueError(f"adapter {folder} has {name}={value}, which no LoRA layer can hold: leave it out")
    start = str(getattr(config, "init_lora_weights", True)).lower()
    if start.startswith(_STARTED_FROM_DATA):
        raise ValueError(
            f"adapter {folder} was started by {start}, on a base that can't be computed again: convert it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if hasattr(config, "init_lora_weights") and not start.startswith(_STARTED_FROM_BASE):
        config.init_lora_weights = True  # the numbers come from the file
    config.inference_mode = True
    return config


def _component(
    folder: Path, config: PeftConfig, tensors: Mapping[str, Any], components: Mapping[str, nn.Module]
) -> str:
    """The component whose layers these are; of two that fit, which the configuration or the folder's name says."""
    missed = {}
    for component, model in components.items():
        layers = _by_spelling(component, model)
        missed[component] = sum(_path(key, layers) is None for key in tensors if key.startswith(PEFT_PREFIX))
    fits = [component for component in missed if missed[component] == min(missed.values())]
    said = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    for name in (_CLASSES.get(str(said)), folder.name):
        if name in fits:
            return name
    # transformers dropped `text_model` in the first text encoder alone
    exact = [c for c in fits if all(_path(key, base_layers(components[c])) for key in tensors)]
    return (exact or fits or ["unet"])[0]


def _by_spelling(component: str, model: nn.Module) -> dict[str, nn.Module]:
    return {one: layer for path, layer in base_layers(model).items() for one in path_spellings(component, path)}


def _path(key: str, layers: Mapping[str, Any]) -> str | None:
    """The layer that a key of PEFT's belongs to, as the key spells it."""
    path = key.removeprefix(PEFT_PREFIX)
    while path:
        path = path.rpartition(".")[0]
        if path in layers:
            return path
    return None


def _layers(
    folder: Path, config: PeftConfig, component: str, tensors: Mapping[str, Any], model: nn.Module
) -> dict[str, Layer]:
    """Path as the file spells it -> layer, for each layer that the file is for.

    Those are the layers that it has tensors of; where layers share what is trained, those that its configuration names.
    """
    own = base_layers(model)
    by_spelling = {one: Layer(component, path, own[path]) for path in own for one in path_spellings(component, path)}
    found: dict[str, Layer] = {}
    for key in tensors:
        if not key.startswith(PEFT_PREFIX):
            continue  # shared by all layers, as VeRA's projections are
        path = _path(key, by_spelling)
        if path is None:
            raise ValueError(
                f"adapter {folder} belongs to another base: this one has no layer for {key} in its {component}; use "
                "the base it was trained on"
            )
        layer = by_spelling[path]
        if not isinstance(layer.module, (nn.Linear, nn.Conv2d)):
            raise ValueError(
                f"adapter {folder} changes {layer.name}, a {type(layer.module).__name__} ({_kind(config)}): adapters "
                "of linear layers and convolutions alone can be loaded"
            )
        found[path] = layer
    shared = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].uses_shared_state
    if not found and not (tensors and shared and config.target_modules):
        raise ValueError(f"adapter {folder} has nothing for any layer: its file is empty or of another kind")
    if config.target_modules in (None, "all-linear"):
        config.target_modules = list(found)
    taken = {layer.path for layer in found.values()}
    leveled = any(path.startswith("text_model.") for path in found or own)
    for path, module in own.items():
        spellings = path_spellings(component, path)
        spelling = next((one for one in spellings if one.startswith("text_model.") == leveled), path)
        wanted = isinstance(module, (nn.Linear, nn.Conv2d)) and path not in taken
        if not wanted or not BaseTuner._check_target_module_exists(config, spelling):
            continue
        if not shared:
            raise ValueError(
                f"adapter {folder} lacks the weights of {component}.{path}, which its configuration names: its file is "
                "incomplete, or it belongs to another base"
            )
        found[spelling] = by_spelling[spelling]
    order = {path: index for index, path in enumerate(own)}  # in which some methods draw what they share
    return dict(sorted(found.items(), key=lambda item: order[item[1].path]))


def _build(
    folder: Path, config: PeftConfig, layers: Mapping[str, Layer], tensors: Mapping[str, torch.Tensor]
) -> tuple[nn.Module, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The tuner's layers with the file's numbers, and what PiSSA and OLoRA took from the base: path -> (B₀, A₀)."""
    bare = model_of({path: plain_copy(layer.module) for path, layer in layers.items()})
    wrapped = PeftModel(bare, config, NAME)
    starts = {}
    if str(getattr(config, "init_lora_weights", "")).startswith(_STARTED_FROM_BASE):
        for path, layer in adapted_layers(bare).items():
            starts[path] = tuple(side[NAME].weight.detach().clone() for side in (layer.lora_B, layer.lora_A))
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # what all layers share may be there once, above them
    above = {key: tensors.get(f"base_model.{key.rpartition('.')[2]}") for key in set(wanted) - set(tensors)}
    tensors = {**tensors, **{key: tensor for key, tensor in above.items() if tensor is not None}}
    for key in sorted(set(wanted) ^ set(tensors)):
        what = "has no place for" if key in tensors else "needs"
        raise ValueError(f"adapter {folder}: {_kind(config)} with its configuration {what} {key}")
    for key, tensor in wanted.items():
        if tensor.shape != tensors[key].shape:
            raise ValueError(
                f"adapter {folder} belongs to another base: {key} is {tuple(tensors[key].shape)} in the file and "
                f"{tuple(tensor.shape)} for this base; use the base it was trained on"
            )
    set_peft_model_state_dict(wrapped, dict(tensors), NAME)
    return wrapped.eval().get_base_model(), starts


@torch.no_grad()
def _updates(
    folder: Path,
    model: nn.Module,
    starts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    layers: Mapping[str, Layer],
) -> dict[str, Update]:
    adapted = adapted_layers(model)
    if set(adapted) != set(layers):
        one = min(set(adapted) ^ set(layers))
        raise ValueError(f"adapter {folder} can't be read layer by layer: PEFT adapts {one} in another way")
    updates = {}
    for path, layer in adapted.items():
        update = _known_factors(layer, starts.get(path), layers[path].module.weight.dtype)
        if update is None:
            base = plain_copy(layers[path].module)
            update = measured_update(layer, base)
            _check_linear(folder, layers[path], layer, base, update)
        updates[layers[path].path] = update
    return updates


def _known_factors(
    layer: BaseTunerLayer, start: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype
) -> Update | None:
    """The factors of methods that have them; None for any other, which is measured.

    Args:
        dtype: the base's, in which a live NoRA layer holds its outer factors.
    """
    if isinstance(layer, NoraLinear):
        for factors in (layer.nora_outer_A, layer.nora_outer_B):
            if NAME in factors:
                factors[NAME] = factors[NAME].to(dtype).float()
        down, up = layer.fold(NAME)
        return Update(up, down)
    if isinstance(layer, SVDLinear):
        return allocated_update(layer)
    if not isinstance(layer, (lora.Linear, lora.Conv2d)) or layer.use_dora.get(NAME) or NAME in layer.lora_variant:
        return None
    A, B, s = layer.lora_A[NAME].weight, layer.lora_B[NAME], layer.scaling[NAME]
    up, down = s * B.weight, A
    if start is not None:  # the base lost s B₀ A₀
        up, down = torch.cat([up, -s * start[0]], 1), torch.cat([down, start[1]], 0)
    return Update(up, down, None if B.bias is None else s * B.bias)


def _check_linear(folder: Path, place: Layer, layer: nn.Module, base: nn.Module, update: Update) -> None:
    x = torch.randn(2, *base.weight.shape[1:], generator=torch.Generator().manual_seed(0))
    expected = base(x).flatten(1) + x.flatten(1) @ update.weight().flatten(1).T
    if update.bias is not None:
        expected = expected + update.bias
    if not torch.linalg.norm(layer(x).flatten(1) - expected) <= LINEARITY * torch.linalg.norm(expected):
        raise ValueError(
            f"adapter {folder} makes {place.name} depend on more than a matrix times its input, which no LoRA "
            "layer can hold"
        )


def plain_copy(layer: nn.Module) -> nn.Module:
    """The layer in float32 on the CPU; of a convolution its kernel at one place, without padding."""
    weight, bias = layer.weight.detach(), layer.bias
    if isinstance(layer, nn.Linear):
        copy: nn.Module = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    else:
        copy = nn.Conv2d(*weight.shape[1::-1], layer.kernel_size, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            own = value.detach()
            # a base may be its shapes alone, which is all that LoRA's own factors need
            own = torch.zeros(own.shape) if own.is_meta else own.to("cpu", torch.float32, copy=True)
            setattr(copy, name, nn.Parameter(own, requires_grad=False))
    return copy


def _kind(config: PeftConfig) -> str:
    return getattr(config.peft_type, "value", str(config.peft_type))


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
