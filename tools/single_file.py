"""A base's folder as one file, as single-file checkpoints of SDXL spell it, with the keys of v-prediction bases.

    python -m tools.single_file assets/tiny-sdxl out/velocity.safetensors --v_pred --ztsnr --dtype fp16

Names are those of Stability's generative-models, and of OpenCLIP in the second text encoder: the inverse of what
diffusers makes of such a file, from the same table where diffusers has one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import load_file

from inference.base import check_base
from inference.single_file import FIRST_ENCODER, SECOND_ENCODER, UNET, VAE, VELOCITY, ZERO_SNR
from methods.formats.sgm import SgmNames
from settings.command_line import run_command
from storage.tensors import write_safetensors

Tensors = dict[str, torch.Tensor]
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def unet_names(names: list[str]) -> dict[str, str]:
    """diffusers' name -> that of the file, of every tensor of a UNet."""
    layers = {name: name.rpartition(".") for name in names}
    spelled = SgmNames({layer for layer, _, _ in layers.values()}).names
    return {name: f"{spelled[layer]}.{kind}" for name, (layer, _, kind) in layers.items()}


def vae_names(names: list[str]) -> dict[str, str]:
    """diffusers' name -> that of the file, of every tensor of an autoencoder."""
    plain = DIFFUSERS_TO_LDM_MAPPING["vae"]
    levels = 1 + max(int(match[1]) for name in names if (match := re.search(r"up_blocks\.(\d+)", name)))
    spelled = {}
    for name in names:
        new = plain.get(name, name).replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", new)
        if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", new):
            new = f"{found[1]}mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
        spelled[name] = new
    return spelled


def open_clip(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The second text encoder's tensors as OpenCLIP has them: q, k and v in one, the projection transposed."""
    found: Tensors = {}
    for new, old in {old: new for new, old in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].items()}.items():
        if old in state:
            found[new] = state[old].T if new == "text_projection" else state[old]
    for name, tensor in state.items():
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            continue
        block, part, kind = layer.groups()
        place = f"transformer.resblocks.{block}"
        if part == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            found[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif part in OPENCLIP:
            found[f"{place}.{OPENCLIP[part]}.{kind}"] = tensor
    return found


def checkpoint(folder: Path) -> Tensors:
    """Every tensor of a base's folder, by its name in a single file."""
    parts = {
        name: {
            key: tensor
            for file in sorted((folder / name).glob("*.safetensors"))
            for key, tensor in load_file(file).items()
        }
        for name in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    names = unet_names(list(parts["unet"]))
    state = {UNET + names[key]: tensor for key, tensor in parts["unet"].items()}
    names = vae_names(list(parts["vae"]))
    state |= {VAE + names[key]: tensor for key, tensor in parts["vae"].items()}
    for key, tensor in parts["text_encoder"].items():
        state[f"{FIRST_ENCODER}text_model.{key.removeprefix('text_model.')}"] = tensor
    return state | {SECOND_ENCODER + key: tensor for key, tensor in open_clip(parts["text_encoder_2"]).items()}


def scaled(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The UNet's linear layers in fp8, each with the scale that its largest weight needs, as ComfyUI writes them."""
    found, most = dict(state), torch.finfo(torch.float8_e4m3fn).max
    for name, weight in state.items():
        if name.startswith(UNET) and name.endswith(".weight") and weight.dim() == 2:
            scale = weight.float().abs().max() / most
            found[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    return found | {f"{UNET}scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}


def check_folder(folder: Path) -> None:
    """Raise ValueError unless it is that of a whole base."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name that of a base, with its unet, vae and text encoders")
    check_base(folder)


def write_single_file(
    folder: Path, file: Path, *, v_pred: bool = False, ztsnr: bool = False, dtype: str | None = None
) -> None:
    """Write a base's folder as one file.

    Args:
        v_pred, ztsnr: add the key.
        dtype: of DTYPES, or scaled_fp8; None: as it is. fp8 is of the UNet alone.

    Raises:
        ValueError: if the folder holds no whole base.
    """
    check_folder(folder)
    state = checkpoint(folder)
    if dtype == "scaled_fp8":
        state = scaled(state)
    elif dtype is not None:
        state = {
            key: tensor.to(DTYPES[dtype]) if dtype != "fp8" or key.startswith(UNET) else tensor
            for key, tensor in state.items()
        }
    state |= {key: torch.empty(0) for key, wanted in ((VELOCITY, v_pred), (ZERO_SNR, ztsnr)) if wanted}
    write_safetensors(file, state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--v_pred", action="store_true", help="add the key that says velocity is predicted")
    parser.add_argument("--ztsnr", action="store_true", help="and the one of zero terminal SNR")
    parser.add_argument("--dtype", choices=[*DTYPES, "scaled_fp8"])
    args = parser.parse_args()
    write_single_file(args.folder, args.file, v_pred=args.v_pred, ztsnr=args.ztsnr, dtype=args.dtype)


if __name__ == "__main__":
    run_command(main)
