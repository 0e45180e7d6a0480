"""NoRA's inner factors out of an update as it acts: the nearest ``s B B' A' A`` of a base's own A and B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from diffusers import StableDiffusionXLPipeline
from peft import PeftConfig
from torch import nn

from inference.adapter_files import read_run_record, recorded_config
from inference.base_statistics import base_statistics
from methods.adapter import NAME, Places, make_adapter
from methods.adapter_file import AdapterFile
from methods.arithmetic import Layers, added, squared_norm
from methods.base_passes import LABEL
from methods.basis_cache import basis_cache
from methods.components import adapter_components
from methods.reading import Updates
from methods.update import Update
from nora import NoraConfig, NoraLinear, preprocess_nora, save_inner
from nora.combine import truncated
from nora.model import nora_layers
from settings.method import MethodOptions


def nora_configs(file: AdapterFile, updates: Layers) -> dict[str, NoraConfig]:
    """Component -> the NoRA that an adapter was trained as, from its PEFT configuration or its run's record.

    Raises:
        ValueError: if neither says so.
    """
    found: dict[str, NoraConfig] = {}
    for part, folder in file.parts.items():
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, NoraConfig):
            found[part or next(iter(updates))] = config
    if found:
        return found
    flags, method = recorded_config(file.path), read_run_record(file.path).get("method")
    known = {name: value for name, value in flags.items() if name in MethodOptions.model_fields}
    options = MethodOptions(**known) if method == "nora" else None
    if options is None:
        raise ValueError(
            f"adapter {file.path} can't be made inner-only: neither a run.json beside it nor a PEFT configuration says "
            "that it is a NoRA, and of which outer rank"
        )
    return options_configs(options, updates)


def options_configs(options: MethodOptions, components: Layers | Mapping[str, nn.Module]) -> dict[str, NoraConfig]:
    """Component -> configuration of a NoRA of these options."""
    places = Places(options.targets, options.ranks())
    adapter = make_adapter("nora", options.arguments(), places=places)
    return {component: cast(NoraConfig, adapter.config(component)) for component in components}


@torch.no_grad()
@basis_cache()
def write_inner(
    path: Path, updates: Layers, pipeline: StableDiffusionXLPipeline, configs: Mapping[str, NoraConfig]
) -> tuple[Updates, dict[tuple[str, str], float]]:
    """Put NoRA layers on the base, give them the nearest inner factors, and write the inner-only file.

    Args:
        pipeline: the base, with weights; the layers stay on it.

    Returns:
        what the layers then add, and (component, module path) -> ``‖ΔW − s B B' A' A‖ / ‖ΔW‖``, 0 without an update.

    Raises:
        ValueError: for a layer that these configurations don't adapt, or a cell without two inner factors.
    """
    models = {component: getattr(pipeline, component) for component in configs}
    prefixes = adapter_components(models)
    statistics, measured = base_statistics(pipeline), False
    live: Updates = {}
    missed: dict[tuple[str, str], float] = {}
    # all is measured before the first layer goes in
    for prefix, model in prefixes.items():
        config = configs[prefix.removesuffix(".text_model")]
        if (config.structure, config.position) != ("serial", "a"):
            raise ValueError(
                f"NoRA of structure {config.structure} and position {config.position} has no two inner factors that "
                "could be solved for: only serial, a has"
            )
        if config.needs_statistics:
            measured = True
            preprocess_nora(model, config, stats=statistics(LABEL, prefix, model, config))
    for component, model in models.items():
        model.add_adapter(configs[component], adapter_name=NAME)
        layers = nora_layers(model, NAME)
        if other := sorted(set(updates.get(component, {})) - set(layers)):
            raise ValueError(f"{component}.{other[0]} is changed, and this NoRA does not adapt it")
        for name, layer in layers.items():
            update = updates.get(component, {}).get(name)
            now = live.setdefault(component, {})[name] = _solve(layer, update)
            missed[component, name] = _missed(now, update)
    save_inner(path, prefixes, NAME, base_statistic=LABEL if measured else None)
    return live, missed


def _missed(found: Update, update: Update | None) -> float:
    if update is None or (whole := squared_norm(update)) == 0:
        return 0.0
    return (squared_norm(added([(1.0, found), (-1.0, update._replace(bias=None))])) / whole) ** 0.5


def _solve(layer: NoraLinear, update: Update | None) -> Update:
    """``B' A'`` nearest to ``B⁺ ΔW A⁺ / s``, whose product with A and B is the projection of ΔW on their spans."""
    trained = layer.trained(NAME)
    if update is None:
        for module in trained.values():
            module.weight.data.zero_()
    else:
        outer = layer.outer(NAME)
        A, B = outer.A.double().cpu(), outer.B.double().cpu()  # (r, n), (m, r)
        inner_B = torch.linalg.lstsq(B, update.up.double()).solution / layer.own_scaling[NAME]  # (r, k)
        inner_A = torch.linalg.lstsq(A.T, update.down.double().T).solution.T  # (k, r)
        rank = len(trained["inner_A"].weight)
        for name, factor in zip(("inner_A", "inner_B"), truncated((inner_A, inner_B), outer, rank)):
            trained[name].weight.data = factor.to(trained[name].weight)
    down, up = layer.fold(NAME)
    return Update(up, down)
