"""Names of layers in kohya's files, against tables written by hand and SDXL's real modules, both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from inference.outline import sdxl_outline
from methods.components import COMPONENT_NAMES, TARGETS
from methods.files import write_kohya_file
from methods.formats.kohya import kohya_names
from methods.formats.layers import layer_names
from methods.formats.sgm import SgmNames
from methods.update import Update
from runs.tools_header import minimal_header

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def rank_one(sdxl, tmp_path_factory) -> Path:
    """A file of rank 1 for all attention layers of SDXL: 560 of the UNet, 48 and 128 of the text encoders."""
    updates: dict[str, dict[str, Update]] = {}
    for component, ends in TARGETS.items():
        for path, one in sdxl[component].named_modules():
            if path.endswith(ends):
                update = Update(torch.ones(one.out_features, 1), torch.ones(1, one.in_features))
                updates.setdefault(component, {})[path] = update
    path = tmp_path_factory.mktemp("rank-one") / "rank_one.safetensors"
    write_kohya_file(path, updates, sdxl, minimal_header("rank_one"), torch.float16)
    return path


@pytest.mark.parametrize(("tool", "variable"), [("sd-scripts", "SD_SCRIPTS"), ("comfyui", "COMFYUI")])
def test_the_tools_own_code_finds_every_layer(rank_one, tool, variable):
    checkout = os.environ.get(variable)
    if checkout is None:
        pytest.skip(f"{variable} names no checkout of {tool}")
    command = [sys.executable, str(ROOT / "tests" / "foreign_tools.py"), tool, checkout, str(rank_one)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"unet": 560, "text_encoder": 48, "text_encoder_2": 128}
