"""What a run will hold, from shapes alone and before anything is loaded, and the cheapest settings that fit a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from dreambooth.encode import cut_picture
from dreambooth.prepare import Pictures
from methods.adapter import Adapter, target_layers
from methods.budget import Layer, Setting, setting
from methods.memory import (
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    CudaAutocast,
    recomputed_bytes,
    saved_activation_bytes,
)
from settings.learning import HardwareOptions
from settings.method import TextOptions
from trainer.blocks import keep_less
from trainer.memory import size
from trainer.models import trained_names

GIB = 2**30
RESERVED = 1.5 * GIB  # for CUDA itself, for workspaces and for the allocator's gaps
# From the cheapest on: each costs more time and leaves less in memory. The times are of docs/performance.md (a block
# on a CPU, beside none); encodings are cached in any case.
LADDER: tuple[tuple[Mapping[str, Any], str], ...] = (
    ({}, "nothing more is needed"),
    ({"selective_checkpointing": "activation"}, "about 1.1 times as long"),
    ({"selective_checkpointing": "feed_forward"}, "about 1.3 times as long"),
    ({"gradient_checkpointing": True}, "about 1.5 to 1.8 times as long"),
    ({"gradient_checkpointing": True, "quantize_base": "int8"}, "about 2.6 times as long"),
)


class Need(NamedTuple):
    """Bytes of a run."""

    weights: int  # of the models that learn: the base's, and what an adapter holds frozen
    learning: int  # what is trained, its gradients and two moments
    activations: int  # what is kept for the backward pass

    @property
    def total(self) -> int:
        return self.weights + self.learning + self.activations

    @property
    def said(self) -> str:
        return (
            f"{size(self.total)} ({size(self.weights)} weights, {size(self.learning)} learning, "
            f"{size(self.activations)} activations)"
        )


class RunShape(NamedTuple):
    """What memory depends on beside the settings that are chosen here."""

    models: Mapping[str, nn.Module]  # that learn, on the meta device
    adapted: list[str]  # which of them have the adapter's layers; others learn new words
    adapter: Adapter
    batch_size: int  # samples of a forward pass
    latents: tuple[int, int]  # (h, w) of the largest
    tokens: int
    dtype: torch.dtype  # of the frozen base


def run_shape(
    outline: StableDiffusionXLPipeline,
    text: TextOptions,
    adapter: Adapter,
    pictures: Pictures,
    batch_size: int,
    dtype: torch.dtype,
) -> RunShape:
    """Of a base's outline and pictures.

    Args:
        batch_size: samples of a forward pass.
    """
    shapes = [cut_picture(picture, pictures.settings).shape for picture in pictures.instance]
    height, width = max(shapes, key=lambda shape: shape[0] * shape[1])
    scale = outline.vae_scale_factor
    models = {name: getattr(outline, name) for name in trained_names(text)}
    adapted = [name for name in models if name == "unet" or text.train_text_encoder]
    tokens = outline.tokenizer.model_max_length
    return RunShape(models, adapted, adapter, batch_size, (height // scale, width // scale), tokens, dtype)


def adapter_settings(shape: RunShape) -> list[Setting]:
    """What the method takes, of the layers of each rank."""
    args, places = shape.adapter.args, shape.adapter.places
    groups: dict[int | None, Counter[tuple[int, ...]]] = {}
    for component in shape.adapted:
        for path, layer in target_layers(component, shape.models[component], places).items():
            groups.setdefault(places.rank(path, args.get("rank")), Counter())[tuple(layer.weight.shape)] += 1
    return [
        setting(
            shape.adapter.method,
            args if rank is None else args | {"rank": rank},
            [Layer(m, n, count) for (m, n), count in counts.items()],
        )
        for rank, counts in groups.items()
    ]


def need(shape: RunShape, hardware: HardwareOptions) -> Need:
    """What a run holds under these settings, on tensors without storage.

    What is kept is that of LoRA of rank 1 at the same layers: any method that keeps its layers' inputs keeps that much.
    """
    found, each = adapter_settings(shape), shape.dtype.itemsize
    weights = sum(p.numel() * each for model in shape.models.values() for p in model.parameters())
    weights += sum(one.frozen_numbers for one in found) * each
    if hardware.quantize_base == "int8":
        linear = [m for model in shape.models.values() for m in model.modules() if isinstance(m, nn.Linear)]
        weights -= sum(module.weight.numel() * (each - 1) for module in linear)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(shape.models["unet"].config)
    unet.requires_grad_(False).to(shape.dtype)
    unet.add_adapter(LoraConfig(r=1, target_modules=shape.adapter.places.targets("unet")))
    unet.to_empty(device="cpu").train()  # never touched, so never taken
    keep_less(unet, hardware.selective_checkpointing)
    if hardware.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    with CudaAutocast():
        kept = saved_activation_bytes(unet, shape.batch_size, shape.latents, shape.tokens)
    if hardware.gradient_checkpointing:
        kept += recomputed_bytes(unet, shape.batch_size, shape.latents)
    parameters = sum(one.parameters for one in found)
    return Need(weights, parameters * (4 + GRADIENT_BYTES + OPTIMIZER_BYTES), kept)


def candidates(hardware: HardwareOptions, may_quantize: bool = True) -> Iterator[tuple[HardwareOptions, str]]:
    """The settings to try and their price, from the cheapest on; what is given stays as it is.

    Args:
        may_quantize: the base is whole and torchao's 8 bits can hold it.
    """
    seen = []
    for step, price in LADDER:
        if "quantize_base" in step and not may_quantize:
            continue
        names = ("gradient_checkpointing", "selective_checkpointing", "quantize_base")
        defaults = {name: HardwareOptions.model_fields[name].default for name in names}
        given = {name: value for name in names if (value := getattr(hardware, name)) != defaults[name]}
        chosen = hardware.replace(**step | given)
        chosen = chosen.replace(quantize_base=chosen.quantize_base or "none")
        if chosen.gradient_checkpointing and chosen.selective_checkpointing == "feed_forward":
            continue
        if chosen not in seen:
            seen.append(chosen)
            yield chosen, price


def card_budget(hardware: HardwareOptions, device: torch.device) -> tuple[str, float] | None:
    """The card that a run is to fit, in words, and the bytes that it has for the run; None where there is none."""
    if hardware.vram not in (None, "auto"):
        absent = "" if device.type == "cuda" else ", though no GPU is here,"
        return f"a card of {hardware.vram} GB{absent}", int(hardware.vram) * GIB - RESERVED
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)}, of which {size(free)} are free,", free - RESERVED


def fit_card(
    hardware: HardwareOptions, shape: RunShape, device: torch.device, may_quantize: bool = True
) -> tuple[HardwareOptions, str | None]:
    """The settings for a card, and one line that says them and why; without ``--vram`` they stay as they are.

    Returns None for the line where there is no card to fit.

    Args:
        may_quantize: as for `candidates`.
    """
    asked = hardware.vram is not None
    whole = hardware.replace(quantize_base=hardware.quantize_base or "none")
    card = card_budget(hardware, device)
    if card is None:
        return whole, "vram: no GPU is here, so --vram auto sets nothing" if asked else None
    name, budget = card
    (first, _), *dearer = candidates(hardware, may_quantize)
    chosen, least = first, need(shape, first)
    now = least
    line = f"memory: about {now.said} for samples of {shape.batch_size}; {name} leaves {size(max(0, int(budget)))}"
    if now.total <= budget:
        return first, f"{line}: it fits" + (", so --vram sets nothing" if asked else "")
    for chosen, price in dearer:
        least = need(shape, chosen)
        if least.total <= budget:
            flags = changed_flags(first, chosen)
            if asked:
                return chosen, f"{line}: --vram sets {flags} ({size(least.total)}, {price})"
            return whole, f"{line}, which will not do: add {flags} ({size(least.total)}, {price})"
    flags = changed_flags(first, chosen)
    way_out = "lower --resolution" + (", or --train_batch_size" if shape.batch_size > 1 else "")
    line += f", which will not do, and {size(least.total)} with {flags or 'what is given'} will not either: {way_out}"
    return (chosen if asked else whole), line


def changed_flags(before: HardwareOptions, after: HardwareOptions) -> str:
    """What a command line must say to have the one instead of the other."""
    changed = {name: value for name, value in after if getattr(before, name) != value}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
