"""What NoRA was to cost, beside what it costs here: one table of figures, goals and peers of the same run.

    make bench          # some minutes and 4 GB
    make bench FULL=1   # with SDXL at its full size, 18 GB, and runs of 100 steps: about an hour on two cores

Each row comes from a benchmark of its own in a process of its own; docs/performance.md explains the figures. Measure on
idle cores.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import nora
from benchmarks import basis, block, full_size, loop_shape, processes, swap_adapter
from benchmarks.cards import unet_without_numbers
from benchmarks.gpu import LORA_16, NORA, config_of
from benchmarks.sdxl_shape import build_unet
from methods.base_passes import LABEL
from nora.model import nora_layers
from settings.command_line import quiet_libraries


class Figure(NamedTuple):
    """One row: a figure that should be at most its goal."""

    name: str
    peer: str  # what it is a ratio to, in the same run, or its unit
    goal: float


class Group(NamedTuple):
    """Rows that one measurement gives, in their order."""

    figures: list[Figure]
    measure: Callable[[], Sequence[float]]
    single_core: bool = False
    full: bool = False  # takes much memory or long


def block_overhead() -> tuple[float, float]:
    names = ("frozen", LORA_16, NORA)
    blocks = {name: one for name, one in block.variants(block.build_block()).items() if name in names}
    found = block.compare(blocks, block.make_inputs(), repeats=41)
    return (found[NORA][0] - 1) / (found[LORA_16][0] - 1), found[NORA][1]


def frozen_memory() -> tuple[float]:
    """MB of the frozen factors at outer rank 128 on SDXL's UNet in fp16."""
    unet = unet_without_numbers("full", NORA)
    held = [layer.nora_outer_A["default"] for layer in nora_layers(unet, "default").values()]
    return (sum(factor.nbytes + 4 * sum(factor.shape) for factor in held) / 1e6,)  # R's diagonals are in float32


def bases() -> tuple[float, float]:
    return basis.measure("full", 128)[1:3]


def inner_files() -> tuple[float, ...]:
    """MB of the inner-only files: SDXL's 560 layers at a quarter of their width, which these files don't know of."""
    sizes = []
    for outer_r, r in ((64, 8), (32, 4)):
        unet = build_unet("quarter").requires_grad_(False)
        unet.add_adapter(config_of(f"NoRA ({outer_r}, {r})"))
        with tempfile.TemporaryDirectory() as folder:
            nora.save_inner(
                path := Path(folder) / "inner.safetensors", {"unet": unet}, dtype=torch.float16, base_statistic=LABEL
            )
            sizes.append(path.stat().st_size / 1e6)
    return tuple(sizes)


def loading() -> tuple[float]:
    return (swap_adapter.compare("quarter")[swap_adapter.INNER],)


GROUPS = {
    "block": Group(
        [
            Figure("time over the frozen block of SDXL, NoRA (128, 16)", "LoRA 16's", 0.60),
            Figure("kept for the backward pass, NoRA (128, 16)", "the frozen block's", 1.035),
        ],
        block_overhead,
        single_core=True,
    ),
    "memory": Group([Figure("frozen factors at outer rank 128, SDXL's UNet, fp16", "MB", 190)], frozen_memory),
    "full": Group(
        [
            Figure("a step at SDXL's full size, NoRA (128, 16)", "LoRA 16's", 0.99),
            Figure("peak memory of that run", "LoRA 16's", 0.96),
        ],
        full_size.compare,
        single_core=True,
        full=True,
    ),
    "basis": Group(
        [
            Figure("bases of all 736 layers of SDXL, cold", "s", 40),
            Figure("the same for the next subject", "s", 5),
        ],
        bases,
    ),
    "files": Group(
        [
            Figure("inner-only file in fp16, (64, 8)", "MB", 1.2),
            Figure("inner-only file in fp16, (32, 4)", "MB", 0.35),
        ],
        inner_files,
    ),
    "processes": Group(
        [Figure("two processes at batch 2 and one at batch 4, updates", "largest difference", 1e-5)],
        lambda: (processes.difference(),),
    ),
    "loading": Group(
        [Figure("loading an inner-only file, cached", "load_lora_weights of the folded one", 1.5)],
        loading,
        single_core=True,
    ),
    "loop": Group(
        [Figure("whole run of 100 steps, quarter SDXL", "diffusers' loop shape", 0.75)],
        lambda: loop_shape.compare("quarter", steps=100, batch=1, repeats=3)[:1],
        full=True,
    ),
}


def run_group(name: str) -> list[float] | str:
    """The figures of a group, measured in a process of its own, or why there are none."""
    environment = dict(os.environ)
    if GROUPS[name].single_core:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "benchmarks", "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"stopped with status {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(name: str, found: Sequence[float] | str) -> list[str]:
    """Lines of the table."""
    lines = []
    for number, figure in enumerate(GROUPS[name].figures):
        if isinstance(found, str):
            shown, met = "–", f"failed: {found}"
        else:
            shown, met = f"{found[number]:.3g}", "yes" if found[number] <= figure.goal else "no"
        lines.append(f"| {figure.name} | {figure.peer} | ≤ {figure.goal:g} | {shown} | {met} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="The rows too that need 18 GB or many minutes.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="These alone.")
    parser.add_argument("--one", choices=list(GROUPS), help=argparse.SUPPRESS)  # in this process, for `run_group`
    args = parser.parse_args(argv)
    if args.one:
        quiet_libraries()
        print(json.dumps(list(GROUPS[args.one].measure())))
        return
    print("| figure | of, or in | goal | here | met |\n|---|---|---|---|---|", flush=True)
    for name in args.only or [name for name, group in GROUPS.items() if args.full or not group.full]:
        print("\n".join(rows(name, run_group(name))), flush=True)
    if not args.full and not args.only:
        print("\nRows at SDXL's full size and of whole runs: make bench FULL=1")


if __name__ == "__main__":
    main()
