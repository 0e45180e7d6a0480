"""A base in one file, as people share it: what its header tells, and weights in 8 bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from storage.tensors import read_safetensors_header

SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"  # of a file that comes without configurations
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
# How single files spell the parts of SDXL
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST_ENCODER, SECOND_ENCODER = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINERS_ENCODER = "conditioner.embedders.0.model."
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors that say what the UNet predicts
_ADAPTER = re.compile(r"[._](lora_(up|down|A|B|mid)|lora[.](up|down)|hada_w|lokr_w|oft_blocks|dora_scale)")
_OTHER_INPUTS = {9: "an inpainting model", 8: "a model that edits pictures"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALE, _WEIGHT = ".scale_weight", ".weight"
# Beside scaled weights: what a computation in 8 bits would need, and the mark of such a file.
_OF_SCALED = re.compile(r"(^|\.)(scale_input|scaled_fp8)$")


class Markers(NamedTuple):
    """What keys of a single file say of its UNet."""

    velocity: bool
    zero_snr: bool


def check_single_file(path: Path) -> None:
    """Raise ValueError unless a file's header is that of a whole SDXL base; no weights are read."""
    _, shapes = read_safetensors_header(path, "base")
    needed = "a whole SDXL checkpoint is needed"
    if any(_ADAPTER.search(key) for key in shapes):
        raise ValueError(f"base {path} holds an adapter, no UNet ({UNET}…): {needed}, and adapters go on top of it")
    if any(key.startswith("cond_stage_model.") for key in shapes):
        version = 2 if any(key.startswith("cond_stage_model.model.") for key in shapes) else 1
        raise ValueError(f"base {path} is of Stable Diffusion {version}: {needed}")
    if not any(key.startswith(UNET) for key in shapes):
        raise ValueError(f"base {path} holds no UNet ({UNET}…): {needed}")
    second = any(key.startswith(SECOND_ENCODER) for key in shapes)
    if not second and any(key.startswith(REFINERS_ENCODER) for key in shapes):
        raise ValueError(
            f"base {path} is SDXL's refiner, which goes on with what a base drew: name a base, and this one with "
            "--refiner where pictures are drawn"
        )
    conv_in = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if conv_in is None or len(conv_in) != 4 or f"{UNET}label_emb.0.0.weight" not in shapes:
        raise ValueError(f"base {path} holds a UNet of another family, without SDXL's label_emb: {needed}")
    conv_out = shapes.get(f"{UNET}out.2.weight", [4])
    if conv_in[1] != conv_out[0]:  # what it takes beside the latents is a mask or a picture
        kind = _OTHER_INPUTS.get(conv_in[1], "another model")
        raise ValueError(
            f"base {path} is {kind}, whose UNet has {conv_in[1]} input channels for {conv_out[0]} output channels: a "
            "text-to-image UNet has as many"
        )
    parts = {FIRST_ENCODER: "first text encoder", SECOND_ENCODER: "second text encoder", VAE: "autoencoder"}
    if missing := [said for part, said in parts.items() if not any(key.startswith(part) for key in shapes)]:
        raise ValueError(f"base {path} lacks its {' and its '.join(missing)}: {needed}")
    if "edm_vpred.sigma_max" in shapes:
        raise ValueError(f"base {path} predicts velocity at EDM's noise levels, which is not known here: {needed}")
    _check_numbers(path)


def _check_numbers(path: Path) -> None:
    """Refuse weights that are not plain numbers: of 8 bits with a scale at most."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 -- not a mapping
            dtype = file.get_slice(key).get_dtype()
            if key.endswith(".comfy_quant") or (
                key.startswith(UNET) and key.endswith(_WEIGHT) and dtype not in _FLOATS
            ):
                raise ValueError(
                    f"base {path} is quantised in a way that is not read here ({key} is {dtype}): name a file in "
                    "fp16, bf16, fp32 or fp8"
                )


def read_markers(path: Path) -> Markers | None:
    """What the keys of a single file say of its UNet; None where it has none of them."""
    _, shapes = read_safetensors_header(path, "base")
    if not {VELOCITY, ZERO_SNR} & shapes.keys():
        return None
    return Markers(VELOCITY in shapes, VELOCITY in shapes and ZERO_SNR in shapes)


def is_eight_bit(path: Path) -> bool:
    """Whether a single file has weights in 8 bits, with scales or without."""
    with safe_open(path, framework="pt") as file:
        return any(
            key.endswith(_SCALE) or file.get_slice(key).get_dtype().startswith("F8")
            for key in file.keys()  # noqa: SIM118 -- not a mapping
        )


def dequantised(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a file in 8 bits as plain numbers: W, or W · scale where there is one (a product in float32).

    Args:
        dtype: of the result.

    Raises:
        ValueError: for a scale that fits no weight.
    """
    state = load_file(path)
    scales = {key.removesuffix(_SCALE) + _WEIGHT: state.pop(key) for key in list(state) if key.endswith(_SCALE)}
    for name in [key for key in state if _OF_SCALED.search(key)]:
        del state[name]
    for name, scale in scales.items():
        weight = state.get(name)
        rows = scale.numel() if weight is None else len(weight)
        if weight is None or scale.numel() not in (1, rows):
            raise ValueError(f"base {path} has a scale of shape {tuple(scale.shape)} that fits no weight {name}")
        scale = scale.float().reshape(-1, *[1] * (weight.dim() - 1))  # one, or one a row
        state[name] = (weight.float() * scale).to(dtype)
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            state[name] = tensor.to(dtype)
    return state


def load_eight_bit(
    path: Path,
    dtype: torch.dtype,
    config: str | None,
    leave_out: set[str],
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> dict[str, nn.Module]:
    """The models of a file in 8 bits, in plain numbers: diffusers would take scaled weights as they are.

    Args:
        config: folder or Hub id of the configurations; None: SDXL's.
        leave_out: parts that are not wanted.
    """
    state = dequantised(path, dtype)
    source = config or SDXL_CONFIG
    options: dict[str, Any] = {"config": source, "local_files_only": local_files_only}
    models: dict[str, nn.Module] = {}
    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        if name not in leave_out:
            models[name] = cls.from_single_file(
                state, subfolder=name, torch_dtype=dtype, cache_dir=cache_dir, **options
            )
    for name, encoder in ENCODERS.items():
        if name not in leave_out:
            models[name] = create_diffusers_clip_model_from_ldm(
                encoder, state, subfolder=name, torch_dtype=dtype, **options
            )
    return models
