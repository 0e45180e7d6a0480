"""What cards of 8 to 32 GB can train, computed from SDXL's shapes: no GPU, no download, nothing allocated.

    python -m benchmarks.cards

Counted are the UNet's weights, the adapter's with gradients and AdamW's moments, what autograd keeps, and under
gradient checkpointing one block that is computed again; encoders and autoencoder are freed before. Left over must be
RESERVED for CUDA itself, for workspaces and for the allocator's gaps. `--quantize_base int8` is not in the table.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params

from benchmarks.gpu import LORA_16, NORA, config_of
from benchmarks.sdxl_shape import build_unet
from methods.memory import (
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    CudaAutocast,
    recomputed_bytes,
    saved_activation_bytes,
)
from nora.functional import FINGERPRINT_SHAPE
from nora.model import nora_layers
from trainer.blocks import keep_less

CARDS = (8, 12, 16, 24, 32)
GIB = 2**30
RESERVED = 1.5 * GIB
TOKENS = 77
CHECKPOINTING = ("none", "activation", "feed_forward", "all")
SIDES, BATCHES = (1024, 768, 512), (1, 2, 4)


class Need(NamedTuple):
    """Bytes of a run."""

    weights: int  # of the frozen base and the adapter's frozen factors
    learning: int  # trained parameters, gradients and moments
    activations: int  # of a picture


def unet_without_numbers(name: str, method: str, dtype: torch.dtype = torch.float16) -> UNet2DConditionModel:
    """The UNet of a shape with an adapter, in memory that is never touched."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = build_unet(name).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    if config := config_of(method):
        unet.add_adapter(config)
        cast_training_params(unet, dtype=torch.float32)
    unet.to_empty(device="cpu")
    for layer in nora_layers(unet, "default").values():  # one without a fingerprint has no factors yet
        layer.nora_fingerprint["default"] = torch.empty(FINGERPRINT_SHAPE)
    return unet.train()


def need(unet: UNet2DConditionModel, side: int, checkpointing: str) -> Need:
    """What a run of single pictures with this side takes on a GPU; the UNet keeps less from then on."""
    parameters = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    frozen = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()) if not tensor.requires_grad)
    if checkpointing == "all":
        unet.enable_gradient_checkpointing()
    else:
        keep_less(unet, checkpointing)
    with CudaAutocast():
        activations = saved_activation_bytes(unet, 1, (side // 8, side // 8), TOKENS)
    if checkpointing == "all":
        activations += recomputed_bytes(unet, 1, (side // 8, side // 8))
    return Need(frozen, parameters * (4 + GRADIENT_BYTES + OPTIMIZER_BYTES), activations)


def row(side: int, batch: int, checkpointing: str, nora: Need, lora: Need) -> str:
    """GB in all with either method, and the smallest card that holds NoRA; what is kept grows with the batch."""
    totals = [found.weights + found.learning + batch * found.activations for found in (nora, lora)]
    card = next((f"{size} GB" for size in CARDS if totals[0] + RESERVED <= size * GIB), "none of these")
    return f"| {side}, {batch} | {checkpointing} | {totals[0] / 1e9:.1f} | {totals[1] / 1e9:.1f} | {card} |"


def table(name: str = "full", sides: Sequence[int] = SIDES, batches: Sequence[int] = BATCHES) -> list[str]:
    found = {
        (side, checkpointing): [
            need(unet_without_numbers(name, method), side, checkpointing) for method in (NORA, LORA_16)
        ]
        for side in sides
        for checkpointing in CHECKPOINTING
    }
    rows = [
        row(side, batch, checkpointing, *found[side, checkpointing])
        for side in sides
        for batch in batches
        for checkpointing in CHECKPOINTING
    ]
    return [
        "| pixels, batch | checkpointing | NoRA (128, 16), GB | LoRA 16, GB | smallest card |",
        "|---|---|---|---|---|",
        *rows,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
