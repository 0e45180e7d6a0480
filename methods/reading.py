"""An adapter of any kind -> what it adds to each layer, with nothing touched.

Everything is checked here: every key of a file is applied or the file is refused, shapes fit the base, values are
finite. Nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from methods.adapter_file import AdapterFile, inspect_adapter
from methods.components import adapter_components
from methods.formats.lora_file import read_lora_file
from methods.formats.peft_folder import read_peft_folder
from methods.update import Update
from nora import inner_prefixes, read_inner
from nora.files import BaseStatistics

Updates = dict[str, dict[str, Update]]  # component -> module path -> update


def read_adapter(
    path: str | Path, components: Mapping[str, nn.Module], base_statistics: BaseStatistics | None = None
) -> Updates:
    """Component -> module path -> the update in float32 on the CPU.

    Args:
        path: as for `adapter_file.inspect_adapter`.
        components: unet, text_encoder, text_encoder_2 -> module. Adapters that are on them already make no difference:
            the base layers beneath count.
        base_statistics: as for `nora.read_inner`, for a file that leaves them out.

    Raises:
        ValueError: not an adapter, one of another base, a damaged one, or one that no LoRA layer can hold.
    """
    return read_file(inspect_adapter(path), components, base_statistics)


def read_file(
    file: AdapterFile, components: Mapping[str, nn.Module], base_statistics: BaseStatistics | None = None
) -> Updates:
    """`read_adapter` of what `inspect_adapter` found."""
    if file.kind == "peft":
        updates: Updates = {}
        for part, folder in file.parts.items():
            tensors = _load(folder / SAFETENSORS_WEIGHTS_NAME)
            component, found = read_peft_folder(folder, part, tensors, components)
            updates[component] = found
    elif file.kind == "inner":
        _load(file.path)
        updates = _read_inner(file.path, components, base_statistics)
    else:
        updates = read_lora_file(file.path, _load(file.path), file.metadata, components)
    for component, found in updates.items():
        for name, update in found.items():
            if not update.is_finite():
                raise ValueError(f"adapter {file.path} makes values that are not finite in {component}.{name}")
    return updates


def _load(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path)
    for key, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(f"adapter {path} has values in {key} that are not finite: the file is damaged")
    return tensors


def _read_inner(path: Path, components: Mapping[str, nn.Module], base_statistics: BaseStatistics | None) -> Updates:
    """NoRA's inner factors, with the outer pair that they were trained between."""
    models = adapter_components(components)
    prefixes = inner_prefixes(path)
    if absent := [prefix for prefix in prefixes if prefix not in models]:
        raise ValueError(f"adapter {path} belongs to another base: this pipeline has no {', '.join(absent)}")
    folded = read_inner(path, {prefix: models[prefix] for prefix in prefixes}, base_statistics)
    return {
        prefix.removesuffix(".text_model"): {name: Update(up, down) for name, (down, up) in layers.items()}
        for prefix, layers in folded.items()
    }
