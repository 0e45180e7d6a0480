"""Which layers of SDXL other programs' own code finds in a LoRA file: `python foreign_tools.py TOOL CHECKOUT FILE`.

Prints component -> number of layers, as JSON. Models are on the device "meta". Packages of theirs that are not here are
empty; no function that is called uses them. A process of its own: their modules have names such as `library`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from inference.outline import sdxl_outline
from methods.formats.sgm import SgmNames

NOT_USED = ("cv2", "einops", "imagesize", "toml", "voluptuous", "torchvision", "torchsde", "av", "aiohttp", "kornia")
NOT_USED += ("spandrel", "bitsandbytes", "ftfy")


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed, with nothing in them."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in NOT_USED else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


def sd_scripts(checkout: str, file: str) -> dict[str, int]:
    """networks/sdxl_merge_lora.py: modules whose weight it replaces by the merged one."""
    sys.path[:0] = [checkout, f"{checkout}/networks"]
    import library

    # of a thousand imports it takes one function, of headers
    library.train_util = sys.modules["library.train_util"] = types.SimpleNamespace(
        load_metadata_from_safetensors=lambda file: {}
    )
    import sdxl_merge_lora
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    read = sdxl_merge_lora.load_state_dict

    def read_to_meta(file, dtype):
        tensors, metadata = read(file, dtype)
        return {key: tensor.to("meta") for key, tensor in tensors.items()}, metadata

    sdxl_merge_lora.load_state_dict = read_to_meta
    with torch.device("meta"):
        unet = SdxlUNet2DConditionModel()
    models = sdxl_outline()
    first = nn.Module()
    first.text_model = models["text_encoder"]  # a level that transformers 5 has dropped
    models |= {"text_encoder": first, "unet": unet}
    layers = {
        name: [one for one in model.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        for name, model in models.items()
    }
    before = {name: [one.weight for one in some] for name, some in layers.items()}
    sdxl_merge_lora.merge_to_sd_model(first, models["text_encoder_2"], unet, [file], [1.0], [], torch.float16)
    return {
        name: sum(one.weight is not weight for one, weight in zip(some, before[name])) for name, some in layers.items()
    }


def comfyui(checkout: str, file: str) -> dict[str, int]:
    """comfy/lora.py: weights that load_lora makes patches for."""
    sys.path.insert(0, checkout)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base

    models = sdxl_outline()
    names = SgmNames(name for name, one in models["unet"].named_modules() if "weight" in one._parameters)
    depths = {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10, **depths}

    class Model(comfy.model_base.SDXL):
        def __init__(self):
            nn.Module.__init__(self)
            self.model_config = types.SimpleNamespace(unet_config=config)

        def state_dict(self):
            return {f"diffusion_model.{name}.weight": 0 for name in names.paths}

    class Clip:
        def state_dict(self):
            inside = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
            paths = [(part, name) for part, model in inside.items() for name, _ in models[model].named_parameters()]
            level = ("text_model.", "text_projection")
            return {f"{part}.transformer.{'' if n.startswith(level) else 'text_model.'}{n}": 0 for part, n in paths}

    keys = comfy.lora.model_lora_keys_clip(Clip(), comfy.lora.model_lora_keys_unet(Model(), {}))
    found = comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(file)), keys, log_missing=False)
    places = [str(key[0] if isinstance(key, tuple) else key) for key in found]
    starts = {"unet": "diffusion_model.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
    return {name: sum(place.startswith(start) for place in places) for name, start in starts.items()}


if __name__ == "__main__":
    tool, checkout, file = sys.argv[1:]
    sys.argv = sys.argv[:1]
    NOT_USED = tuple(name for name in NOT_USED if importlib.util.find_spec(name) is None)
    sys.meta_path.append(Empty())
    print(json.dumps({"sd-scripts": sd_scripts, "comfyui": comfyui}[tool](checkout, file)))
