"""The table of methods, made from the code: ``python -m methods > docs/methods.md``."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from methods.adapter import Passes, make_adapter
from methods.options import Method
from methods.registry import METHODS, resolve

# (out, in) of the attention layers of SDXL's UNet -> how many there are; in all 560.
SDXL_LAYERS = {(1280, 1280): 360, (1280, 2048): 120, (640, 640): 60, (640, 2048): 20}
HEAD = """\
# Adapter methods

`python -m methods > docs/methods.md` makes this page from the registry (`methods/registry.py`); a test compares them.
`--method NAME` trains a method, `--method_args key=value …` sets its options, and `--method NAME --method_args help`
lists these with their defaults.

**Trained** are the parameters in the 560 attention layers of SDXL's UNet at the method's default options. Every method
starts at the base model; `tests/test_methods.py` takes each row through training, saving, loading on a fresh base,
scaling, stacking, swapping, merging and taking off.

**Files**: PEFT is a folder of PEFT's own; LoRA is a file that any tool reads, exact because the update is a pair of
factors; *LoRA* is its nearest one of a rank that you name, written on request (`--convert_to_lora RANK`) and named
approximate, with its error in the header.

**Scale, merge, stack**: `inference` puts every file on a pipeline as what it adds to each layer, ΔW. So the scale is a
factor on ΔW for every method (½ is half of it, 0 is the base to the bit); taking an adapter off leaves the base's bits.
"""


def files(method: Method) -> str:
    """The adapter files of a run, in short."""
    parts = ["PEFT"]
    if method.low_rank:
        parts.append("LoRA")
    if method.name == "dora":
        parts.append("LoRA with magnitudes (diffusers reads it)")
    if method.adapter == "methods.nora:Nora":
        parts.append("inner factors alone")
    return ", ".join(parts if method.low_rank else [*parts, "*LoRA*"])


def trained_parameters(name: str) -> int:
    """Parameters that a method trains in SDXL's UNet at its defaults, counted in one layer of each shape."""
    total = 0
    for (m, n), count in SDXL_LAYERS.items():
        torch.manual_seed(0)
        layers = nn.ModuleDict({"attention": nn.ModuleDict({"to_q": nn.Linear(n, m, bias=False)})})
        layer = layers["attention"]["to_q"]
        adapter = make_adapter(name, resolve(name, [], {}))
        run = partial(run_passes, layer)
        adapter.inject("unet", layers, Passes(run, partial(run, 1), "", ""))
        total += count * sum(p.numel() for p in layers.parameters() if p.requires_grad)
    return total


def run_passes(layer: nn.Linear, passes: int) -> None:
    """A calibration, for methods that have one."""
    layer(torch.randn(1, 4, layer.in_features))


def page() -> str:
    """The whole page, in Markdown."""
    columns = "method", "`--method`", "source", "adapted layer", "trained", "files", "text encoders"
    rows: list[tuple[str, ...]] = [(*columns, "scale", "merge", "stack", "can't")]
    rows.append(("---",) * len(rows[0]))
    for name, method in METHODS.items():
        text = f"no: {method.no_text_encoders}" if method.no_text_encoders else "yes"
        row = (method.title, f"`{name}`", method.source, method.formula, f"{trained_parameters(name):,}")
        limits = "; ".join(method.limits) or "–"
        rows.append((*row, files(method), text, "on ΔW", "yes", "yes", limits))
    return HEAD + "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
