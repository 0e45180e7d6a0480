"""Updates of any origin -> adapter files of a format, the other way round than `reading`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from methods.arithmetic import Layers, conditioned, rounded
from methods.components import adapter_components
from methods.files import factor_tensors, write_diffusers_file, write_kohya_file
from methods.peft_folder import write_lora_folder
from methods.update import Update

FORMATS = ("diffusers", "kohya", "peft")  # those that any LoRA can be written in


def write_adapter(
    path: Path,
    form: str,
    updates: Layers,
    components: Mapping[str, nn.Module],
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Write a file, or for "peft" a folder with one of PEFT's for each component.

    Args:
        form: one of FORMATS.
        components: of the base, with those layers.
        header: of kohya's file.
        dtype: of the numbers.

    Raises:
        ValueError: for an update that the format can't hold.
    """
    if form == "kohya":
        write_kohya_file(path, updates, components, header, dtype)
        return
    cast = {
        component: {name: _cast(f"{component}.{name}", update, dtype) for name, update in layers.items()}
        for component, layers in updates.items()
    }
    if form == "diffusers":
        prefixes = {prefix.removesuffix(".text_model"): prefix for prefix in adapter_components(components)}
        tensors = [factor_tensors(prefixes[component], layers) for component, layers in cast.items()]
        write_diffusers_file({key: one for some in tensors for key, one in some.items()}, path)
        return
    for component, layers in cast.items():
        if biased := next((name for name, update in layers.items() if update.bias is not None), None):
            raise ValueError(f"{component}.{biased} has a change of its bias, which PEFT's folders don't hold here")
        write_lora_folder(path / component, layers)


def _cast(name: str, update: Update, dtype: torch.dtype) -> Update:
    if dtype == torch.float32:
        return update
    try:
        return rounded(conditioned(update), dtype)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
