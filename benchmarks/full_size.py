"""A training step of SDXL's whole UNet, 256 x 256 pixels, batch 1, fp32: NoRA's time and peak memory, of LoRA's.

    OMP_NUM_THREADS=1 python -m benchmarks.full_size                   # 17 GB, about 10 minutes

Times take turns on one UNet. Memory is that of a process of its own for each: in one the second would also hold what
the first one's allocator did not give back.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel

import nora
from benchmarks.gpu import LORA_16, NORA, Cell, measure
from benchmarks.sdxl_shape import SHAPES, build_unet

SIDE = 256  # of a picture, in pixels


def compare(shape: str = "full", methods: Sequence[str] = (LORA_16, NORA), rounds: int = 3) -> tuple[float, float]:
    """The second method's seconds of a step (median of the rounds' ratios) and peak memory, of the first one's."""
    each = list(dict.fromkeys(methods))
    peaks = dict(zip(each, in_own_process(partial(peak_alone, shape), each)))
    unet = build_unet(shape).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, nora.use_basis_cache(nora.BasisCache(Path(folder))):
        turns = [[step_seconds(unet, method) for method in methods] for _ in range(rounds)]
    return statistics.median(second / first for first, second in turns), peaks[methods[1]] / peaks[methods[0]]


def in_own_process(measure: Callable[[str], float], items: Sequence[str]) -> list[float]:
    """Each item in a process that ends with it, one after another."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(measure, items))


def peak_alone(shape: str, method: str) -> float:
    return measure(build_unet(shape).requires_grad_(False), Cell("fp32", method), SIDE, steps=1)["peak_mb"]


def step_seconds(unet: UNet2DConditionModel, method: str) -> float:
    return measure(unet, Cell("fp32", method), SIDE, steps=3, seconds=math.inf)["seconds"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--methods", nargs=2, default=(LORA_16, NORA), help="as benchmarks.gpu names them")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    seconds, memory = compare(args.shape, args.methods, args.rounds)
    print(f"{args.methods[1]} of {args.methods[0]}: time {seconds:.3f}, peak memory {memory:.3f}")


if __name__ == "__main__":
    main()
