"""Updates in the names and tensors of kohya's sd-scripts with Stability's block names, which every tool reads whole.

docs/files.md has which tool reads what.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from methods.arithmetic import conditioned, rounded
from methods.formats.layers import KOHYA_PREFIXES, base_layers
from methods.formats.sgm import SgmNames
from methods.update import Update


def kohya_names(component: str, model: nn.Module) -> dict[str, str]:
    """Module path -> name of a layer, such as ``lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q``.

    Layers that Stability's code has otherwise are left out.
    """
    layers, prefix = base_layers(model), KOHYA_PREFIXES[component]
    if component == "unet":
        return {path: f"{prefix}_{name.replace('.', '_')}" for path, name in SgmNames(layers).names.items()}
    # files have the level that transformers 5 dropped inside CLIPTextModel; text_projection lies above it
    lacks_level = not hasattr(model, "text_model")
    return {path: f"{prefix}_{'text_model_' if lacks_level else ''}{path.replace('.', '_')}" for path in layers}


def kohya_tensors(
    updates: Mapping[str, Mapping[str, Update]],
    components: Mapping[str, nn.Module],
    dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """``….lora_down.weight`` (r, n), ``….lora_up.weight`` (m, r) and ``….alpha`` () of each layer, all alphas the same.

    Every reader multiplies by alpha / rank; but of several alphas in one file diffusers takes the commonest for all, so
    that alpha is the largest rank and what that changes is made up for in lora_up.

    Args:
        updates: component -> module path -> update.
        components: with those layers.

    Raises:
        ValueError: for a layer or a change of a bias that such files don't hold, or numbers too large for the dtype.
    """
    largest = max(update.rank for layers in updates.values() for update in layers.values())
    tensors: dict[str, torch.Tensor] = {}
    for component, layers in updates.items():
        names = kohya_names(component, components[component])
        for path, update in layers.items():
            if path not in names:
                raise ValueError(f"{component}.{path} has no name in Stability's code, and so none in kohya's files")
            if update.bias is not None:
                raise ValueError(f"{component}.{path} has a change of its bias, which kohya's LoRA files don't hold")
            if dtype != torch.float32:
                update = conditioned(update)
            try:
                update = rounded(update._replace(up=update.up * (update.rank / largest)), dtype)
            except ValueError as error:
                raise ValueError(f"{component}.{path} {error}") from error
            tensors[f"{names[path]}.lora_down.weight"] = update.down
            tensors[f"{names[path]}.lora_up.weight"] = update.up
            tensors[f"{names[path]}.alpha"] = torch.tensor(float(largest))  # bf16 would round one above 256
    return tensors
