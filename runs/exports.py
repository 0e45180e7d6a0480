"""A trained adapter as files, each read back and compared with the live one before the run calls itself done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from inference.tokens import ENCODERS
from methods.components import COMPONENT_NAMES, EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS, adapter_components
from nora import NoraLinear, fold_nora, save_inner
from nora.model import nora_layers
from settings.training import TrainConfig
from storage.files import replacing_folder, write_atomic, write_safetensors
from trainer.methods import save_trained
from trainer.optimizer import Average

KOHYA_WEIGHTS = "pytorch_lora_weights_kohya.safetensors"
PEFT_FOLDER = "peft"
ADAPTER = "default"
TOLERANCE = 1e-5  # relative; files hold what is live in fp32, and differ by how a product is rounded


def save_adapter(config: TrainConfig, trained: Mapping[str, nn.Module], folder: Path) -> list[str]:
    """Write every file that the flags ask for, each whole or not there; returns their names.

    Args:
        trained: component name -> model with the adapter inside.
    """
    lora = folded_lora(trained)  # diffusers' keys -> weights
    write_diffusers_file(lora, folder / FOLDED_WEIGHTS)
    names = [FOLDED_WEIGHTS]
    if config.method == "nora":
        layers = {name: model for name, model in trained.items() if nora_layers(model, ADAPTER)}
        save_inner(folder / INNER_WEIGHTS, adapter_components(layers))
        names.append(INNER_WEIGHTS)
    if config.train_text_encoder_ti:
        write_safetensors(folder / EMBEDDINGS, new_embeddings(trained), {"word": config.token_abstraction})
        names.append(EMBEDDINGS)
    if config.output_kohya_format:
        write_safetensors(folder / KOHYA_WEIGHTS, convert_state_dict_to_kohya(lora))
        names.append(KOHYA_WEIGHTS)
    if config.output_peft_format:
        names += save_peft_folders(trained, folder)
    return names


def folded_lora(trained: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """The adapters as plain LoRA with alpha = rank, any scale being in lora_B; keys as in diffusers' files."""
    lora = {}
    for prefix, model in adapter_components(trained).items():
        if nora_layers(model, ADAPTER):
            weights = fold_nora(model)
        else:
            weights = get_peft_model_state_dict(model)
            for name, layer in model.named_modules():
                if isinstance(layer, LoraLayer) and layer.scaling.get(ADAPTER, 1) != 1:
                    weights[f"{name}.lora_B.weight"] = weights[f"{name}.lora_B.weight"] * layer.scaling[ADAPTER]
        lora |= {f"{prefix}.{key}": weight.float() for key, weight in weights.items() if "lora_" in key}
    return lora


def new_embeddings(trained: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """(tokens, d) of the words that each text encoder learned, by diffusers' names for the two."""
    embeddings = {}
    for key, (encoder, _) in ENCODERS.items():
        state = get_peft_model_state_dict(trained[encoder], save_embedding_layers=False)
        embeddings[key] = next(value for name, value in state.items() if "trainable_tokens_delta" in name).float()
    return embeddings


def write_diffusers_file(lora: Mapping[str, torch.Tensor], path: Path) -> None:
    """Through diffusers' own writer, so that the file is what its trainers write."""
    by_component = {name: {} for name in COMPONENT_NAMES}
    for key, weight in lora.items():
        component, _, rest = key.partition(".")
        by_component[component][rest] = weight
    with tempfile.TemporaryDirectory() as fresh:
        StableDiffusionXLPipeline.save_lora_weights(
            fresh, weight_name=path.name, **{f"{name}_lora_layers": layers for name, layers in by_component.items()}
        )
        write_atomic(path, (Path(fresh) / path.name).read_bytes())


def save_peft_folders(trained: Mapping[str, nn.Module], folder: Path) -> list[str]:
    """``peft/{component}``: adapter_config.json and adapter_model.safetensors, for PEFT's from_pretrained."""
    names = []
    for component, model in trained.items():
        target = folder / PEFT_FOLDER / component
        state = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(model).items()}
        with replacing_folder(target) as fresh:
            write_safetensors(fresh / SAFETENSORS_WEIGHTS_NAME, state, {"format": "pt"})
            model.peft_config[ADAPTER].save_pretrained(fresh)
        names += [str(file.relative_to(folder)) for file in sorted(target.iterdir())]
    return names


# --- reading back -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_files(config: TrainConfig, trained: Mapping[str, nn.Module], folder: Path) -> None:
    """Read every file back and compare each layer's ΔW with the live one.

    Raises:
        ValueError: naming the file and the layer that differ.
    """
    live = live_factors(trained)
    found = {FOLDED_WEIGHTS: diffusers_factors(load_file(folder / FOLDED_WEIGHTS))}
    if config.method == "nora":
        found[INNER_WEIGHTS] = inner_factors(trained, folder / INNER_WEIGHTS)
    if config.output_kohya_format:
        found[KOHYA_WEIGHTS] = kohya_factors(load_file(folder / KOHYA_WEIGHTS), live)
    if config.output_peft_format:
        for component, model in trained.items():
            file = folder / PEFT_FOLDER / component / SAFETENSORS_WEIGHTS_NAME
            check_same(file, load_file(file), get_peft_model_state_dict(model))
    for name, layers in found.items():
        if missing := sorted(set(live) ^ set(layers)):
            raise ValueError(f"{folder / name} and the adapter in memory differ in {missing[0]}: the file is not whole")
    for layer, (up, down) in live.items():
        expected = up @ down  # one layer's at a time: all of SDXL's would be 4 GB
        size = float(expected.norm())
        for name, layers in found.items():
            other_up, other_down = layers[layer]
            error = float((other_up @ other_down - expected).norm()) / max(size, 1e-12)
            if size > 0 and not error <= TOLERANCE:
                raise ValueError(
                    f"{folder / name} read back differs from the adapter in memory by {error:.1e} at {layer}"
                )


# ΔW of a layer as two factors (m, r) and (r, n), float32 on the CPU.
Factors = tuple[torch.Tensor, torch.Tensor]


def live_factors(trained: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """ΔW of every adapted layer by its name in diffusers' files."""
    factors = {}
    for prefix, model in adapter_components(trained).items():
        for name, layer in model.named_modules():
            if isinstance(layer, NoraLinear):
                lora_A, lora_B = layer.fold(ADAPTER)
                factors[f"{prefix}.{name}"] = lora_B, lora_A
            elif isinstance(layer, LoraLayer):
                lora_A, lora_B = (side[ADAPTER].weight.float().cpu() for side in (layer.lora_A, layer.lora_B))
                factors[f"{prefix}.{name}"] = layer.scaling[ADAPTER] * lora_B, lora_A
    return factors


def diffusers_factors(lora: Mapping[str, torch.Tensor]) -> dict[str, Factors]:
    """ΔW = B A of a plain LoRA's layers."""
    layers = [key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")]
    return {layer: (lora[f"{layer}.lora_B.weight"].float(), lora[f"{layer}.lora_A.weight"].float()) for layer in layers}


def kohya_factors(lora: Mapping[str, torch.Tensor], layers: Iterable[str]) -> dict[str, Factors]:
    """ΔW = alpha / rank · up down of the layers that are in the file under kohya's names."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    factors = {}
    for layer in layers:
        component, _, rest = layer.partition(".")
        key = f"{prefixes[component]}_{rest.replace('.', '_')}"
        if f"{key}.alpha" in lora:
            down, up = lora[f"{key}.lora_down.weight"].float(), lora[f"{key}.lora_up.weight"].float()
            factors[layer] = lora[f"{key}.alpha"] / len(down) * up, down
    return factors


def inner_factors(trained: Mapping[str, nn.Module], path: Path) -> dict[str, Factors]:
    """ΔW of an inner-only file, with the live layers' outer factors."""
    factors = {}
    with safe_open(path, framework="pt") as file:
        for prefix, model in adapter_components(trained).items():
            for name, layer in nora_layers(model, ADAPTER).items():
                key, outer = f"{prefix}.{name}", layer.outer(ADAPTER)
                inner_A, inner_B = (file.get_tensor(f"{key}.lora_{side}.weight").float() for side in "AB")
                outer_A, outer_B = outer.A.float().cpu(), outer.B.float().cpu()
                scale = layer.nora_alpha[ADAPTER] / layer.r[ADAPTER]
                factors[key] = scale * (outer_B @ inner_B), inner_A @ outer_A
    return factors


def check_same(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        other = found.get(f"base_model.model.{key}")
        if other is None or not torch.equal(other, value.detach().cpu()):
            raise ValueError(f"{path} read back differs from the adapter in memory at {key}")


def save_components(
    config: TrainConfig,
    accelerator: Accelerator,
    trained: Mapping[str, nn.Module],
    average: Average,
    models: list[nn.Module],
    weights: list[dict[str, torch.Tensor]],
    folder: str,
) -> None:
    """What a checkpoint holds of the models: the adapter alone, exact and as the files that inference reads."""
    weights.clear()  # what accelerate would save: the whole base
    if accelerator.is_main_process:
        save_trained(trained, Path(folder))
        with average.applied():
            save_adapter(replace(config, output_kohya_format=False, output_peft_format=False), trained, Path(folder))
