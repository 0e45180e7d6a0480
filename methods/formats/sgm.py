"""Paths of diffusers' UNet and those of Stability's code (SGM), which kohya, ComfyUI and A1111 use, both ways.

Sources: `make_unet_conversion_map` of sd-scripts' library/sdxl_model_util.py, which has SDXL's own layout; here the
layout is read from the UNet, so that one of other depth has the names that diffusers' loader gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(?P<half>down|up)_blocks\.(?P<i>\d+)\.(?P<kind>\w+)\.(?P<j>\d+)\.(?P<rest>.+)")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<j>\d+)\.(?P<rest>.+)")


class SgmNames:
    """The names of one UNet's layers.

    With n resnets in an upward block (``layers_per_block + 1``), layer j of downward block i is
    `input_blocks.{n i + j + 1}`, and of upward block i `output_blocks.{n i + j}`. Inside it resnets are 0 and
    transformers 1; an upsampler comes after what its block has of them.

    Args:
        paths: of all the UNet's layers.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        paths = list(paths)
        matches = [match for path in paths if (match := _BLOCK.fullmatch(path))]
        self.n = 1 + max((int(m["j"]) for m in matches if (m["half"], m["kind"]) == ("up", "resnets")), default=0)
        self.with_attention = {m["i"] for m in matches if (m["half"], m["kind"]) == ("up", "attentions")}
        self.names = {path: name for path in paths if (name := self._name(path)) is not None}
        self.paths = {name: path for path, name in self.names.items()}  # back again

    def _name(self, path: str) -> str | None:
        if path in _ENDS:
            return _ENDS[path]
        if match := _MIDDLE.fullmatch(path):
            index = 2 * int(match["j"]) + (match["kind"] == "attentions")
            return f"middle_block.{index}.{_inside(match['kind'], match['rest'])}"
        if not (match := _BLOCK.fullmatch(path)):
            return None
        i, j, kind, down = int(match["i"]), int(match["j"]), match["kind"], match["half"] == "down"
        if kind == "downsamplers":
            return f"input_blocks.{self.n * (i + 1)}.0.op"
        if kind == "upsamplers":
            place = 2 if match["i"] in self.with_attention else 1
            return f"output_blocks.{self.n * (i + 1) - 1}.{place}.{match['rest']}"
        block = f"input_blocks.{self.n * i + j + 1}" if down else f"output_blocks.{self.n * i + j}"
        return f"{block}.{int(kind == 'attentions')}.{_inside(kind, match['rest'])}"


def _inside(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
