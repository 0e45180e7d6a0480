"""What the ways to keep less for the backward pass save and cost in a whole UNet with NoRA (128, 16), fp32 on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpointing --shape quarter --repeats 5

One UNet takes turns; medians of the process's CPU time are compared. benchmarks.block has the same for a single block.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from diffusers import UNet2DConditionModel

from benchmarks.cards import CHECKPOINTING, TOKENS
from benchmarks.gpu import NORA, Cell, config_of, make_inputs
from benchmarks.sdxl_shape import SHAPES, build_unet, pixels
from methods.memory import saved_activation_bytes
from trainer.blocks import keep_less


@contextlib.contextmanager
def keeping_less(unet: UNet2DConditionModel, way: str) -> Iterator[None]:
    """The UNet as `--selective_checkpointing` makes it, or `--gradient_checkpointing` for "all", and as before."""
    classes = {module: type(module) for module in unet.modules()}
    if way == "all":
        unet.enable_gradient_checkpointing()
    else:
        keep_less(unet, way)
    yield
    unet.disable_gradient_checkpointing()
    for module, kind in classes.items():
        module.__class__ = kind


def compare(unet: UNet2DConditionModel, side: int, batch: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Way -> (time, kept bytes) as multiples of those where all is kept."""
    inputs = make_inputs(unet, Cell("fp32", NORA, batch), side)
    seconds: dict[str, list[float]] = {way: [] for way in CHECKPOINTING}
    kept = {}
    for way in CHECKPOINTING:
        with keeping_less(unet, way):
            kept[way] = saved_activation_bytes(unet, batch, (side // 8, side // 8), TOKENS)
    for repeat in range(repeats + 1):
        for way in CHECKPOINTING:
            with keeping_less(unet, way):
                start = time.process_time()
                unet(**inputs).sample.square().mean().backward()
                if repeat:  # the first is for warming up
                    seconds[way].append(time.process_time() - start)
            unet.zero_grad()
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {way: (medians[way] / medians["none"], kept[way] / kept["none"]) for way in CHECKPOINTING}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="quarter")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pixels", type=int, help="A picture's side. Default: the shape's own.")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    unet = build_unet(args.shape).requires_grad_(False)
    unet.add_adapter(config_of(NORA))
    found = compare(unet.train(), args.pixels or pixels(args.shape), args.batch, args.repeats)
    print("| checkpointing | time | kept |\n|---|---|---|")
    for way, (seconds, kept) in found.items():
        print(f"| {way} | {seconds:.3f} | {kept:.3f} |")


if __name__ == "__main__":
    main()
