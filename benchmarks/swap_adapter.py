"""Swapping adapters on a pipeline in memory: ours, folded and inner-only, against diffusers' own loading of a LoRA.

    python -m benchmarks.swap_adapter --base assets/tiny-sdxl --repeats 7
    python -m benchmarks.swap_adapter --base quarter --repeats 5

A NoRA adapter with random weights is written once as the diffusers file (a LoRA of the same rank) and as the inner-only
file. `swap_adapter` copies weights into the layers that are there; the others take off what is on the pipeline and put
one file on. They take turns, medians of the process's CPU time are compared. An inner-only file also needs its outer
factors, from the cache on disk.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

import nora
from benchmarks.sdxl_shape import ASSETS, BASE_HELP, base_folder
from inference.base import load_pipeline
from inference.load import load_adapter, swap_adapter, unload_adapters
from inference.sampling import generate_images
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS, TARGETS
from settings.command_line import quiet_libraries, run_command
from storage.tensors import write_safetensors
from storage.text import expand_home

STOCK, INNER = "diffusers, LoRA", "inner-only, by load_adapter"


def write_adapter(pipeline: StableDiffusionXLPipeline, folder: Path, rank: int, outer_rank: int) -> None:
    """A NoRA of the UNet with random inner factors, calibrated on one picture: both of its files."""
    unet = pipeline.unet
    config = nora.NoraConfig(r=rank, outer_r=outer_rank, target_modules=list(TARGETS["unet"]))
    draw = {"num_inference_steps": 1, "progress": False, "output_type": "latent"}
    nora.preprocess_nora(unet, config, lambda *_: list(generate_images(pipeline, ["a cat"], [0], **draw)))
    unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    nora.save_inner(folder / INNER_WEIGHTS, {"unet": unet})
    write_safetensors(folder / FOLDED_WEIGHTS, {f"unet.{key}": weight for key, weight in nora.fold_nora(unet).items()})


def compare(base: str, rank: int = 16, outer_rank: int = 64, repeats: int = 7) -> dict[str, float]:
    """Way to swap -> median time over diffusers' own."""
    with tempfile.TemporaryDirectory() as name, base_folder(base) as base:
        folder = Path(name)
        os.environ["NORA_CACHE_DIR"] = str(folder / "cache")
        write_adapter(load_pipeline(base), folder, rank, outer_rank)
        pipeline = load_pipeline(base)

        def anew(load: Callable[[], object]) -> Callable[[], None]:
            def swap() -> None:
                unload_adapters(pipeline)
                load()

            return swap

        folded, inner = folder / FOLDED_WEIGHTS, folder / INNER_WEIGHTS
        ways: dict[str, Callable[[], None]] = {
            STOCK: anew(lambda: pipeline.load_lora_weights(folder, weight_name=FOLDED_WEIGHTS)),
            "folded, by load_adapter": anew(lambda: load_adapter(pipeline, folded, name="mine")),
            "folded, by swap_adapter": lambda: swap_adapter(pipeline, folded, "mine"),
            INNER: anew(lambda: load_adapter(pipeline, inner)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, swap in ways.items():
                started = time.process_time()
                swap()
                if repeat:  # the first round warms up
                    seconds[way].append(time.process_time() - started)
        unload_adapters(pipeline)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    return {way: median / medians[STOCK] for way, median in medians.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default=str(ASSETS / "tiny-sdxl"), help=BASE_HELP)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--outer_rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    quiet_libraries()
    ratios = compare(args.base, args.rank, args.outer_rank, args.repeats)
    print("| swap | CPU time, ratio |\n|---|---|")
    for way, ratio in ratios.items():
        print(f"| {way} | {ratio:.2f} |")


if __name__ == "__main__":
    run_command(main)
