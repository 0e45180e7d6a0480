"""An adapter out of the difference of two bases: `python -m inference.adapters extract`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from inference.adapter_work import TOLERANCES, placed, report, stored_dtype, write_checked
from inference.base import load_pipeline
from inference.base_statistics import base_statistics
from inference.nora_factors import options_configs, write_inner
from methods.adapter import Places, target_layers
from methods.arithmetic import compressed, squared_norm
from methods.components import COMPONENT_NAMES
from methods.formats.layers import base_layers
from methods.reading import Updates, read_adapter
from methods.update import Update
from runs.tools_header import minimal_header
from settings.adapters import ExtractConfig
from settings.method import MethodOptions


def extract(config: ExtractConfig) -> None:
    """Write what makes one base the other, as near as a rank allows; says how near that is.

    Raises:
        ValueError: for bases of different shape, or that don't differ in these layers.
    """
    inner = config.to == "inner"
    base = load_pipeline(config.base, torch.float32 if inner else stored_dtype(config.base), "cpu")
    tuned = load_pipeline(config.tuned, stored_dtype(config.tuned), "cpu")
    places, path = Places(config.targets), Path(config.output)
    whole = sum(_difference(config, base, tuned, component) for component in COMPONENT_NAMES)
    if whole == 0:
        raise ValueError(f"--tuned {config.tuned} is --base {config.base}: there is no difference to extract")
    updates, kept, within = _updates(config, base, tuned, places)
    if not updates:
        raise ValueError(f"--targets {config.targets}: the bases do not differ in these layers; name others")
    if inner:
        kept = _write_inner(config, path, updates, base)
    print(f"energy kept: {kept / within:.4%} of these layers' difference, {kept / whole:.4%} of all that differs")
    if not inner:
        parts = {name: getattr(base, name) for name in COMPONENT_NAMES}
        header = minimal_header(path.stem) | {"ss_training_comment": "extracted from the difference of two bases"}
        write_checked(parts, updates, path, str(config.to), config.written_dtype, header)


def _difference(
    config: ExtractConfig, base: StableDiffusionXLPipeline, tuned: StableDiffusionXLPipeline, component: str
) -> float:
    """``‖θ' − θ‖²`` of all of a component's parameters."""
    before, after = (dict(getattr(one, component).named_parameters()) for one in (base, tuned))
    other = next((name for name in before if name not in after or after[name].shape != before[name].shape), None)
    if other is not None or len(before) != len(after):
        raise ValueError(
            f"--tuned {config.tuned} is built otherwise than --base {config.base}, at {component}.{other}: name two "
            "bases of one shape"
        )
    return sum(float((after[name].float() - one.float()).double().square().sum()) for name, one in before.items())


@torch.no_grad()
def _updates(
    config: ExtractConfig, base: StableDiffusionXLPipeline, tuned: StableDiffusionXLPipeline, places: Places
) -> tuple[Updates, float, float]:
    """The differing layers' updates, of the asked rank or whole for NoRA; ‖·‖² of what they hold and of ΔW."""
    updates: Updates = {}
    kept = whole = 0.0
    rank, energy = (None, None) if config.to == "inner" else (config.rank, config.energy)
    for component in COMPONENT_NAMES:
        model: nn.Module = getattr(base, component)
        others = base_layers(getattr(tuned, component))
        try:
            layers = target_layers(component, model, places)
        except ValueError:
            if component == "unet":
                raise
            continue  # an expression for the UNet's layers
        for path, layer in layers.items():
            delta = others[path].weight.detach().float() - layer.weight.detach().float()
            if not bool(delta.any()):
                continue
            found = compressed(Update.dense(delta), rank, energy)
            updates.setdefault(component, {})[path] = found.update
            kept, whole = kept + found.kept, whole + found.whole
    return updates, kept, whole


def _write_inner(config: ExtractConfig, path: Path, updates: Updates, base: StableDiffusionXLPipeline) -> float:
    """Write the nearest NoRA's inner factors; returns ``Σ ‖s B B' A' A‖²``."""
    options = MethodOptions(method="nora", rank=config.rank, outer_rank=config.outer_rank, targets=config.targets)
    components = {name: getattr(base, name) for name in updates}
    with placed(path, folder=False) as fresh:
        live, _ = write_inner(fresh, updates, base, options_configs(options, components))
        report(path, read_adapter(fresh, components, base_statistics(base)), live, TOLERANCES[torch.float32])
    return sum(squared_norm(update) for layers in live.values() for update in layers.values())
