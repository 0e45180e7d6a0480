"""An adapter's files: a LoRA file where the update is a pair of factors, PEFT folders, and what is near them."""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from methods.adapter import NAME, Adapter, adapted_layers
from methods.components import COMPONENT_NAMES, EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS, adapter_components
from methods.formats.kohya import kohya_tensors
from methods.update import Update
from storage.files import cut_bytes, replacing_folder, write_atomic
from storage.tensors import write_safetensors

KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"  # as runs of before named their `tools_file`
PEFT_FOLDER = "peft"


def approximate_file(rank: int | str) -> str:
    """Name of the nearest LoRA of a rank, for an update that is no pair of factors."""
    return f"approximate_lora_rank{rank}.safetensors"


def has_lora_file(adapter: Adapter) -> bool:
    """Whether a LoRA file holds the update exactly; DoRA's has magnitudes beside the factors."""
    return adapter.method.low_rank or adapter.method.name == "dora"


def save_files(adapter: Adapter, folder: Path, *, peft: bool = True) -> list[str]:
    """Write the adapter's files, each whole or not there; returns their names.

    Args:
        peft: also PEFT folders; written anyway where there is no LoRA file.
    """
    names = []
    if has_lora_file(adapter):
        write_diffusers_file(lora_tensors(adapter), folder / FOLDED_WEIGHTS)
        names.append(FOLDED_WEIGHTS)
    names += adapter.save_more(folder)
    if peft or not has_lora_file(adapter):
        for component in adapter.models:
            target = folder / PEFT_FOLDER / component
            with replacing_folder(target) as fresh:
                adapter.save_peft(component, fresh)
            names += [str(file.relative_to(folder)) for file in sorted(target.iterdir())]
    return names


def tools_file(folder: Path) -> str:
    """Name of a run's file for drawing programs, which show it: that of the run's folder, such as cat.safetensors."""
    spelled = re.sub("[\ud800-\udfff]", "_", folder.resolve().name)  # bytes that are no text, and no header's either
    name = cut_bytes(spelled.lstrip("."), 200) or "lora"
    taken = (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS, EMBEDDINGS)
    own = f"{name}.safetensors" not in taken and not name.startswith("approximate_lora_rank")
    return f"{name}.safetensors" if own else f"{name}_kohya.safetensors"


def write_kohya_file(
    path: Path,
    updates: Mapping[str, Mapping[str, Update]],
    models: Mapping[str, nn.Module],
    header: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """With the hash of the tensors by which A1111, Forge and Civitai know a file (its bytes after the header).

    Args:
        updates: component -> module path -> update.
        header: the network's dimension and the hash are added.
    """
    tensors = kohya_tensors(updates, models, dtype)
    rank = round(next(float(one) for key, one in tensors.items() if key.endswith(".alpha")))
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    own = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank), "sshs_model_hash": digest}
    write_safetensors(path, tensors, {**header, **own, "modelspec.hash_sha256": f"0x{digest}"})


def save_kohya(adapter: Adapter, path: Path, header: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write the update, which is a pair of factors, for drawing programs (see `formats.kohya`).

    Args:
        header: what they show of it; the network's dimension is added.
    """
    updates = {component: dict(adapter.updates(component)) for component in adapter.models}
    write_kohya_file(path, updates, adapter.models, header, dtype)


def lora_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter as LoRA with alpha = rank, any scale being in lora_B; keys as in diffusers' files."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, model in adapter_components(adapter.models).items():
        if adapter.method.low_rank:
            tensors |= factor_tensors(prefix, dict(adapter.updates(prefix.removesuffix(".text_model"))))
        else:  # DoRA
            scales = {name: layer.scaling[NAME] for name, layer in adapted_layers(model).items()}
            for key, weight in get_peft_model_state_dict(model).items():
                name, is_B, _ = key.partition(".lora_B.")
                tensors[f"{prefix}.{key}"] = weight.float() * (scales[name] if is_B else 1)
    return tensors


def factor_tensors(prefix: str, updates: Mapping[str, Update]) -> dict[str, torch.Tensor]:
    """``….lora_A.weight`` (r, n) and ``….lora_B.weight`` (m, r) of each layer, and ``….lora_B.bias`` where there is."""
    tensors: dict[str, torch.Tensor] = {}
    for name, update in updates.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = update.down
        tensors[f"{prefix}.{name}.lora_B.weight"] = update.up
        if update.bias is not None:
            tensors[f"{prefix}.{name}.lora_B.bias"] = update.bias
    return tensors


def write_diffusers_file(lora: Mapping[str, torch.Tensor], path: Path) -> None:
    """Through diffusers' own writer, so that the file is what its trainers write."""
    by_component: dict[str, dict[str, torch.Tensor]] = {name: {} for name in COMPONENT_NAMES}
    for key, weight in lora.items():
        component, _, rest = key.partition(".")
        by_component[component][rest] = weight
    with tempfile.TemporaryDirectory() as fresh:
        StableDiffusionXLPipeline.save_lora_weights(
            fresh, weight_name=path.name, **{f"{name}_lora_layers": layers for name, layers in by_component.items()}
        )
        write_atomic(path, (Path(fresh) / path.name).read_bytes())


@torch.no_grad()
def save_approximation(adapter: Adapter, rank: int, folder: Path) -> tuple[str, float]:
    """Write the LoRA of a rank that is nearest to the adapter's update, with its error in the header.

    By a truncated SVD of each layer's ΔW (Eckart and Young). PEFT's `convert_to_lora` knows neither OFT nor HRA and
    leaves DoRA's magnitudes out without a word, so that it is not used.

    Returns:
        the file's name, and ``‖ΔW − LoRA‖_F / ‖ΔW‖_F`` over all layers.
    """
    tensors, missed, whole = {}, 0.0, 0.0
    for prefix in adapter_components(adapter.models):
        for name, update in adapter.updates(prefix.removesuffix(".text_model")):
            U, sigma, Vt = torch.linalg.svd(update.weight(), full_matrices=False)
            tensors[f"{prefix}.{name}.lora_A.weight"] = Vt[:rank]
            tensors[f"{prefix}.{name}.lora_B.weight"] = U[:, :rank] * sigma[:rank]
            missed += float(sigma[rank:].double().square().sum())
            whole += float(sigma.double().square().sum())
    error = math.sqrt(missed / whole) if whole else 0.0
    header = {"format": "pt", "approximates": adapter.method.name, "relative_error": f"{error:.4g}"}
    write_safetensors(folder / approximate_file(rank), tensors, header)
    return approximate_file(rank), error
