"""Names of layers in kohya's files, against tables written by hand and SDXL's real modules, both ways."""

import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from inference.outline import sdxl_outline
from methods.components import COMPONENT_NAMES
from methods.formats.kohya import kohya_names, kohya_tensors
from methods.formats.layers import layer_names
from methods.formats.sgm import SgmNames
from methods.update import Update

ROOT = Path(__file__).parent.parent
SD_SCRIPTS = os.environ.get("SD_SCRIPTS")  # a checkout of kohya-ss/sd-scripts
COMFYUI = os.environ.get("COMFYUI")  # and of Comfy-Org/ComfyUI
# SDXL's transformers: Stability's block -> (diffusers' path, depth), from sd_xl_base.yaml and docs/files.md.
TRANSFORMERS = {
    "input_blocks_4_1": ("down_blocks.1.attentions.0", 2),
    "input_blocks_5_1": ("down_blocks.1.attentions.1", 2),
    "input_blocks_7_1": ("down_blocks.2.attentions.0", 10),
    "input_blocks_8_1": ("down_blocks.2.attentions.1", 10),
    "middle_block_1": ("mid_block.attentions.0", 10),
    "output_blocks_0_1": ("up_blocks.0.attentions.0", 10),
    "output_blocks_1_1": ("up_blocks.0.attentions.1", 10),
    "output_blocks_2_1": ("up_blocks.0.attentions.2", 10),
    "output_blocks_3_1": ("up_blocks.1.attentions.0", 2),
    "output_blocks_4_1": ("up_blocks.1.attentions.1", 2),
    "output_blocks_5_1": ("up_blocks.1.attentions.2", 2),
}
ATTENTION = [f"{attn}.{side}" for attn in ("attn1", "attn2") for side in ("to_q", "to_k", "to_v", "to_out.0")]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


@pytest.fixture(scope="module")
def sdxl() -> dict[str, nn.Module]:
    return sdxl_outline()


def table() -> dict[str, str]:
    """Path -> kohya's name of what sd-scripts' default LoRA adapts in the UNet, from the table above."""
    names = {}
    for block, (path, depth) in TRANSFORMERS.items():
        inside = [f"transformer_blocks.{i}.{rest}" for i in range(depth) for rest in ATTENTION + FEED_FORWARD]
        for rest in (*inside, "proj_in", "proj_out"):
            names[f"{path}.{rest}"] = f"lora_unet_{block}_{rest.replace('.', '_')}"
    return names


def test_sdxl_s_722_adapted_layers_of_the_unet(sdxl):
    expected = table()
    counts = {
        end: sum(path.endswith(tuple(ends)) for path in expected)
        for end, ends in {"attention": ATTENTION, "ff": FEED_FORWARD, "proj": ("proj_in", "proj_out")}.items()
    }
    assert counts == {"attention": 560, "ff": 140, "proj": 22} and len(expected) == 722
    modules, names = dict(sdxl["unet"].named_modules()), kohya_names("unet", sdxl["unet"])
    linear = {path for path, one in modules.items() if isinstance(one, nn.Linear) and "transformer_blocks" in path}
    assert linear == {path for path in expected if "transformer_blocks" in path}, "the table has all of them"
    assert {path: names[path] for path in expected} == expected


def test_every_layer_has_one_name_and_the_way_back(sdxl):
    for component in COMPONENT_NAMES:
        names = kohya_names(component, sdxl[component])
        assert len(set(names.values())) == len(names)
        known = layer_names({component: sdxl[component]})
        assert all(known[name].path == path for path, name in names.items())
    layers = [path for path, one in sdxl["unet"].named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    sgm = SgmNames(layers)
    assert set(sgm.names) == set(layers) and {sgm.paths[name]: name for name in sgm.names.values()} == sgm.names


def test_sdxl_s_264_layers_of_the_text_encoders(sdxl):
    inside = [f"self_attn.{side}_proj" for side in "qkv"] + ["self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    for component, prefix, depth in (("text_encoder", "lora_te1", 12), ("text_encoder_2", "lora_te2", 32)):
        wanted = {
            f"{prefix}_text_model_encoder_layers_{i}_{rest.replace('.', '_')}" for i in range(depth) for rest in inside
        }
        found = {
            name
            for path, name in kohya_names(component, sdxl[component]).items()
            if "encoder.layers" in path and "norm" not in path
        }
        assert found == wanted and len(wanted) == 6 * depth


def test_the_embedded_base_of_other_depth():
    """One resnet in a downward block, two levels with transformers: names as diffusers' loader takes them."""
    config = UNet2DConditionModel.load_config(ROOT / "assets" / "tiny-sdxl" / "unet")
    with torch.device("meta"):
        names = kohya_names("unet", UNet2DConditionModel.from_config(config))
    for path, name in {
        "down_blocks.1.attentions.0.proj_in": "input_blocks_3_1_proj_in",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_4_0_op",
        "down_blocks.2.resnets.0.conv1": "input_blocks_5_0_in_layers_2",
        "up_blocks.0.attentions.1.proj_out": "output_blocks_1_1_proj_out",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_3_2_conv",
        "up_blocks.2.resnets.1.conv2": "output_blocks_5_0_out_layers_3",
    }.items():
        assert names[path] == f"lora_unet_{name}"


# --- the tools' own code ----------------------------------------------------------------------------------------------


def rank_one(sdxl) -> dict[str, torch.Tensor]:
    """A kohya file of SDXL's 560 attention layers and all of the text encoders', of rank 1."""
    updates: dict[str, dict[str, Update]] = {}
    for component, ends in (("unet", tuple(ATTENTION)), *((name, ("proj",)) for name in COMPONENT_NAMES[1:])):
        for path, one in sdxl[component].named_modules():
            if (
                isinstance(one, nn.Linear)
                and path.endswith(ends)
                and "transformer_blocks" in path + ".encoder"
                or (isinstance(one, nn.Linear) and component != "unet" and ".self_attn." in path)
            ):
                update = Update(torch.ones(one.out_features, 1), torch.ones(1, one.in_features))
                updates.setdefault(component, {})[path] = update
    return kohya_tensors(updates, sdxl)


@pytest.mark.skipif(SD_SCRIPTS is None, reason="SD_SCRIPTS names no checkout of kohya-ss/sd-scripts")
def test_sd_scripts_own_map_and_unet(sdxl, monkeypatch):
    """Its conversion map, and the modules of its UNet, by which sdxl_merge_lora.py finds what to merge into."""
    monkeypatch.syspath_prepend(SD_SCRIPTS)
    from library.sdxl_model_util import make_unet_conversion_map
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from networks.lora import LoRANetwork

    theirs = {diffusers: sgm for sgm, diffusers in make_unet_conversion_map().items()}
    names = kohya_names("unet", sdxl["unet"])
    ours = {path.replace(".", "_"): name for path, name in names.items()}
    checked = 0
    for path, name in theirs.items():
        layers = {one: sgm for one, sgm in ours.items() if one.startswith(path.replace(".", "_"))}
        for one, sgm in layers.items():
            assert sgm.startswith(f"lora_unet_{name.replace('.', '_')}"), (one, sgm, name)
            checked += 1
    assert checked >= len(names)
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel()
    kinds = LoRANetwork.UNET_TARGET_REPLACE_MODULE + LoRANetwork.UNET_TARGET_REPLACE_MODULE_CONV2D_3X3
    found = {
        f"lora_unet_{name}_{child}".replace(".", "_")
        for name, module in unet.named_modules()
        if type(module).__name__ in kinds
        for child, one in module.named_modules()
        if type(one).__name__ in ("Linear", "Conv2d")
    }
    written = {key.partition(".")[0] for key in rank_one(sdxl) if key.startswith("lora_unet_")}
    assert len(written) == 560 and written <= found


@pytest.mark.skipif(COMFYUI is None, reason="COMFYUI names no checkout of Comfy-Org/ComfyUI")
def test_comfyui_s_own_map_takes_every_key(sdxl, monkeypatch):
    monkeypatch.syspath_prepend(COMFYUI)
    monkeypatch.setattr(sys, "argv", ["main.py", "--cpu"])
    from comfy.weight_adapter.lora import LoRAAdapter

    tensors = rank_one(sdxl)
    loaded: set[str] = set()
    for name in {key.partition(".")[0] for key in tensors}:
        alpha = float(tensors[f"{name}.alpha"])
        assert LoRAAdapter.load(name, tensors, alpha, None, loaded) is not None
    assert {key for key in tensors if not key.endswith(".alpha")} == {k for k in loaded if not k.endswith(".alpha")}
