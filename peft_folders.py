"""Adapters of PEFT's own methods, by their configuration and weights.

The method's layers are built around copies of the base's, so that nothing which a method does to weights (PiSSA and
OLoRA overwrite them) touches the base; what they add to the base is then read off them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields

import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model, set_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from methods.formats.forms import SUFFIXES, check_complete, layer_update, split_key
from methods.formats.names import BaseLayer, component_layers, spelled_paths
from methods.update import Update, measured_update

PREFIX = "base_model.model."
_SHARED = "base_model."  # what layers have in common, such as VeRA's projections
_ADAPTER = "default"
# What may be set in a LoRA's configuration without its update being another than alpha / r · B A.
_PLAIN_FIELDS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "lora_ga")  # none touches the base


def peft_updates(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], component: str, model: nn.Module
) -> dict[str, Update]:
    """What an adapter of PEFT's adds to the layers of one component, by module path.

    Args:
        config: the adapter's.
        tensors: its weights, by the keys of `get_peft_model_state_dict`.
        component: the prefix of the component's keys, see `adapter_components`.
        model: the component; not changed, and what other adapters have put there is passed over.

    Raises:
        ValueError: a key that belongs to no layer, weights that don't fit, a method whose update is no fixed matrix;
            the message begins after the adapter's name.
    """
    layers = {path: layer for layer in component_layers(component, model) for path in spelled_paths(layer)}
    tensors = {key if _is_shared(key) else key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    owners = {key: _owner(key, layers) for key in tensors}
    for key, path in owners.items():
        if path is None and not _is_shared(key):
            raise ValueError(
                f"belongs to another base: this one has no layer for {component}.{key}; use the base it was trained on"
            )
    targets = {path: layer for path, layer in layers.items() if path in set(owners.values())}  # in the base's order
    for path, layer in targets.items():
        if not isinstance(layer.base(), (nn.Linear, nn.Conv2d)):
            kind = type(layer.base()).__name__
            raise ValueError(f"trains {layer.key}, a {kind}, and only linear and convolution layers can carry adapters")
    if not targets:
        raise ValueError("holds no weights for any layer")
    if len({layer.path for layer in targets.values()}) < len(targets):
        raise ValueError("names a layer twice, with and without text_model: the file is damaged")
    if is_plain_lora(config):
        return _plain_updates(config, tensors, owners, targets)
    return _measured_updates(config, tensors, targets)


def has_layers(keys: Iterable[str], component: str, model: nn.Module) -> bool:
    """Whether each key that belongs to a layer belongs to one of this component."""
    layers = {path: layer for layer in component_layers(component, model) for path in spelled_paths(layer)}
    return all(_is_shared(key) or _owner(key.removeprefix(PREFIX), layers) for key in keys)


def is_plain_lora(config: PeftConfig) -> bool:
    """Whether each layer's update is alpha / r · B A."""
    if config.peft_type != PeftType.LORA or config.init_lora_weights not in _PLAIN_STARTS:
        return False
    plain = LoraConfig()
    return all(
        not getattr(config, one.name) or getattr(config, one.name) == getattr(plain, one.name)
        for one in fields(config)
        if one.name not in _PLAIN_FIELDS
    )


def _is_shared(key: str) -> bool:
    return key.startswith(_SHARED) and not key.startswith(PREFIX)


def _owner(key: str, layers: Mapping[str, BaseLayer]) -> str | None:
    """The path, as the key spells it, of the layer that a key belongs to."""
    path = key
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return path or None


def _plain_updates(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    owners: Mapping[str, str],
    targets: Mapping[str, BaseLayer],
) -> dict[str, Update]:
    grouped: dict[str, dict[str, torch.Tensor]] = {path: {} for path in targets}
    for key, tensor in tensors.items():
        path, suffix = split_key(key) or ("", "")
        if path != owners[key] or SUFFIXES[suffix] not in ("down", "up"):
            raise ValueError(f"has {key}, which its configuration does not speak of: the file is damaged")
        grouped[path][suffix] = tensor
    updates = {}
    for path, found in grouped.items():
        layer = targets[path]
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
        forms = {SUFFIXES[suffix]: tensor for suffix, tensor in found.items()}
        try:
            check_complete(found)
            rank = len(forms["down"])
            forms["alpha"] = torch.tensor(alpha * (rank**0.5 if config.use_rslora else 1.0))
            updates[layer.path] = layer_update(forms, layer.base().weight, False)
        except ValueError as error:
            raise ValueError(f"{layer.key} {error}") from error
    return updates


@torch.no_grad()
def _measured_updates(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, BaseLayer]
) -> dict[str, Update]:
    copies = {path: _float_copy(layer.base()) for path, layer in targets.items()}
    scratch = nn.Module()
    for path, layer in copies.items():
        _add_module(scratch, path, _float_copy(layer))
    _load(config, tensors, scratch)
    updates = {}
    for path, target in targets.items():
        layer, base = scratch.get_submodule(path), copies.pop(path)
        try:
            updates[target.path] = _update(layer, base)
        except Exception as error:  # a method's own code, of any kind
            raise ValueError(f"can't be evaluated by PEFT at {target.key}: {_first_line(error)}") from error
        if updates[target.path] is None:
            raise ValueError(
                f"is of the method {_method(config)}, whose effect at {target.key} is no fixed change of the layer's "
                "weights, and only those are read here"
            )
    return updates


def _load(config: PeftConfig, tensors: Mapping[str, torch.Tensor], scratch: nn.Module) -> None:
    """Build the method's layers inside the module and give them the weights."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(f"is of the method {_method(config)}, which is for language models")
    config.inference_mode, config.task_type = True, None
    state = {key if _is_shared(key) else PREFIX + key: tensor.float() for key, tensor in tensors.items()}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # for methods whose start is random and stays in the layer, such as pissa_niter_4
            model = get_peft_model(scratch, config, _ADAPTER).eval()
            own = {name for name, _ in model.named_parameters() if f".{_ADAPTER}" in name}
            result = set_peft_model_state_dict(model, state, _ADAPTER)
    except Exception as error:  # a method's own code, of any kind
        wrong = re.search(rf"size mismatch for {re.escape(PREFIX)}(\S+?)(\.{_ADAPTER})?(\.weight)?:", str(error))
        if wrong:
            raise ValueError(f"does not fit this base at {wrong[1]}: use the base it was trained on") from error
        raise ValueError(f"can't be loaded by PEFT as {_method(config)}: {_first_line(error)}") from error
    if result.unexpected_keys:
        raise ValueError(f"has {result.unexpected_keys[0]}, which is nothing of the method {_method(config)}")
    if missing := sorted(own.intersection(result.missing_keys)):
        raise ValueError(f"lacks {missing[0].replace(f'.{_ADAPTER}', '')}: the file is incomplete")


def _update(layer: nn.Module, base: nn.Module) -> Update | None:
    """What the layer adds to the base's; None if that is no matrix."""
    if isinstance(layer, AdaLoraLayer):
        A, B, E = (getattr(layer, f"lora_{letter}")[_ADAPTER] for letter in "ABE")  # (r, n), (m, r), (r, 1)
        return Update(B * layer.scaling[_ADAPTER] / (layer.ranknum[_ADAPTER] + 1e-5), A * E)
    if isinstance(base, nn.Conv2d):
        layer.merge()
        merged = layer.get_base_layer()
        bias = None if base.bias is None or merged.bias.equal(base.bias) else merged.bias - base.bias
        return Update.dense(merged.weight - base.weight, bias)
    update = measured_update(layer, base)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, base.in_features, generator=generator).to(base.weight)
    effect, offset = layer(x) - base(x), 0 if update.bias is None else update.bias
    linear = x @ update.weight().T + offset
    size = max(float(effect.abs().max()), float(base(x).abs().max()))
    return update if float((effect - linear).abs().max()) <= 1e-3 * size or not update.is_finite() else None


def _float_copy(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """A float32 copy, without hooks."""
    bias, weight = layer.bias is not None, layer.weight
    if isinstance(layer, nn.Linear):
        copy = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    else:
        sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        copy = nn.Conv2d(layer.in_channels, layer.out_channels, *sizes, bias, layer.padding_mode, device="meta")
    copy.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False)
    if bias:
        copy.bias = nn.Parameter(layer.bias.detach().to(torch.float32, copy=True), requires_grad=False)
    return copy


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, nn.Module())
        root = getattr(root, folder)
    root.add_module(name, module)


def _method(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}, {(str(error).splitlines() or [''])[0][:200]}"
