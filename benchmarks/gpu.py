"""Training steps of SDXL's UNet on one GPU, in at most eight minutes: time, memory, start-up, and what they say of us.

    python -m benchmarks.gpu --output out/gpu.json
    OMP_NUM_THREADS=1 python -m benchmarks.gpu --shape quarter --device cpu --seconds 300

The weights are random, of SDXL's own shapes, so nothing is downloaded. A cell is a precision, a method, a batch and a
way to compute; cells come in the order of their importance, one that runs out of memory or fails is reported as such,
and those that don't fit the time are named. Claims of this project are then confirmed or refuted. A step is forward,
backward, clipping and AdamW under autocast, on random latents; the frozen floor makes the gradients that an adapter
needs, and has none.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import contextlib
import datetime
import gc
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from benchmarks.sdxl_shape import SHAPES, build_unet, pixels
from methods.components import TARGETS
from nora import NoraConfig
from settings.command_line import quiet_libraries
from storage.files import write_atomic
from storage.text import first_line, home_path
from trainer.blocks import compile_blocks, keep_less

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FROZEN, LORA_4, LORA_16 = "frozen", "LoRA 4", "LoRA 16"
NORA, NORA_64_32, NORA_64_8 = "NoRA (128, 16)", "NoRA (64, 32)", "NoRA (64, 8)"
METHODS = (FROZEN, LORA_16, NORA, LORA_4, NORA_64_32, NORA_64_8)
COMPILATION = 90.0  # seconds that a compiled cell is planned to take
WARM_UP = 2  # steps that are not counted


class Cell(NamedTuple):
    """What is measured once."""

    dtype: str = "fp16"
    method: str = LORA_16
    batch: int = 1
    checkpointing: str = "none"  # of --selective_checkpointing, or "all": --gradient_checkpointing
    compiled: bool = False
    attention: str = "sdpa"

    def __str__(self) -> str:
        parts = [self.dtype, self.method, f"batch {self.batch}"]
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []
        parts += ["compiled"] if self.compiled else []
        return ", ".join(parts + ([self.attention] if self.attention != "sdpa" else []))


class Claim(NamedTuple):
    """A limit that docs/performance.md names for a figure, or for a ratio of two cells' figures, in its own words."""

    words: str  # of the document
    figure: str  # "seconds", "peak_mb" or "start_up"
    most: float
    of: Cell
    to: Cell | None = None  # None: the figure itself
    floor: Cell | None = None  # taken from both

    def verdict(self, results: Mapping[Cell, Mapping[str, Any]]) -> tuple[float | None, str]:
        """(value, confirmed, refuted or not measured)."""
        cells = [cell for cell in (self.of, self.to, self.floor) if cell is not None]
        figures = {cell: results.get(cell, {}).get(self.figure) for cell in cells}
        if None in figures.values():
            return None, "not measured"
        floor = figures[self.floor] if self.floor else 0.0
        value = figures[self.of] - floor
        if self.to:
            value /= figures[self.to] - floor
        return value, "confirmed" if value <= self.most else "refuted"


def planned() -> list[Cell]:
    """All cells, the most telling ones first within a precision; a change of precision costs seconds."""
    cells = [Cell(method=method) for method in METHODS]
    cells += [Cell(method=method, batch=4, checkpointing="all") for method in (FROZEN, LORA_16, NORA)]
    cells += [Cell(method=method, batch=4) for method in (LORA_16, NORA, FROZEN)]
    for checkpointing in ("activation", "feed_forward", "all"):
        cells += [Cell(method=method, checkpointing=checkpointing) for method in (NORA, LORA_16)]
    cells += [Cell(method=NORA, batch=4, checkpointing=name) for name in ("activation", "feed_forward")]
    cells += [Cell(method=method, compiled=True) for method in (NORA, LORA_16)]
    cells += [Cell(method=method, attention="xformers") for method in (LORA_16, NORA)]
    for dtype in ("bf16", "fp32"):
        cells += [Cell(dtype, method) for method in (LORA_16, NORA, FROZEN)]
    return cells


_CHECKPOINTED = Cell(method=NORA, batch=4, checkpointing="all")
CLAIMS = (
    Claim("a step of NoRA (128, 16) takes no longer than LoRA 16's", "seconds", 1.0, Cell(method=NORA), Cell()),
    Claim(
        "NoRA (128, 16) adds at most 0.60 of what LoRA 16 adds to a step",
        "seconds",
        0.6,
        Cell(method=NORA),
        Cell(),
        Cell(method=FROZEN),
    ),
    Claim(
        "at batch 4 NoRA (128, 16) needs at most 0.96 of LoRA 16's memory",
        "peak_mb",
        0.96,
        Cell(method=NORA, batch=4),
        Cell(batch=4),
    ),
    Claim(
        "and no more than LoRA 16 with gradient checkpointing",
        "peak_mb",
        1.0,
        _CHECKPOINTED,
        _CHECKPOINTED._replace(method=LORA_16),
    ),
    Claim(
        "`activation` costs at most 5 % of a step",
        "seconds",
        1.05,
        Cell(method=NORA, checkpointing="activation"),
        Cell(method=NORA),
    ),
    Claim(
        "`feed_forward` costs at most 25 % of a step",
        "seconds",
        1.25,
        Cell(method=NORA, checkpointing="feed_forward"),
        Cell(method=NORA),
    ),
    Claim(
        "and `feed_forward` at most three quarters of the memory at batch 4",
        "peak_mb",
        0.75,
        Cell(method=NORA, batch=4, checkpointing="feed_forward"),
        Cell(method=NORA, batch=4),
    ),
    Claim(
        "compiled blocks save at least 10 % of a step",
        "seconds",
        0.9,
        Cell(method=NORA, compiled=True),
        Cell(method=NORA),
    ),
    Claim("NoRA's factors of the whole UNet take at most 20 seconds", "start_up", 20.0, Cell(method=NORA)),
)


def on_cpu(cell: Cell) -> Cell:
    """Nobody trains in fp16 on a CPU."""
    return cell._replace(dtype="fp32") if cell.dtype == "fp16" else cell


# --- one cell ---------------------------------------------------------------------------------------------------------


def config_of(method: str) -> PeftConfig | None:
    targets = list(TARGETS["unet"])
    ranks = [int(number) for number in re.findall(r"\d+", method)]
    if method == FROZEN:
        return None
    if method.startswith("LoRA"):
        return LoraConfig(r=ranks[0], lora_alpha=ranks[0], target_modules=targets)
    outer_r, r = ranks
    return NoraConfig(r=r, outer_r=outer_r, target_modules=targets, outer_init="svd")


@contextlib.contextmanager
def prepared(unet: UNet2DConditionModel, cell: Cell) -> Iterator[float]:
    """The UNet as a cell wants it, and as it was afterwards; yields the seconds until it could train."""
    classes = {module: type(module) for module in unet.modules()}
    start = time.perf_counter()
    try:
        config = config_of(cell.method)
        if config is not None:
            unet.add_adapter(config)
            cast_training_params(unet, dtype=torch.float32)
        synchronize(unet.device)
        start_up = time.perf_counter() - start
        unet.train()
        if cell.attention == "xformers":
            unet.enable_xformers_memory_efficient_attention()
        if cell.checkpointing == "all":
            unet.enable_gradient_checkpointing()
        else:
            keep_less(unet, cell.checkpointing)
        if cell.compiled:
            compile_blocks({"unet": unet})
        yield start_up
    finally:
        take_off_adapters(unet)
        unet.disable_gradient_checkpointing()
        unet.set_attn_processor(AttnProcessor2_0())
        for module, kind in classes.items():
            module.__class__, module._compiled_call_impl = kind, None
        if cell.compiled:
            torch._dynamo.reset()
        unet.zero_grad()


def release(device: torch.device) -> None:
    """Give back what the cell before has held; after its exception is gone, whose traceback held it too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def take_off_adapters(unet: nn.Module) -> None:
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                parent._modules[name] = child.get_base_layer()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(unet):
            delattr(unet, name)


def make_inputs(unet: UNet2DConditionModel, cell: Cell, side: int) -> dict[str, Any]:
    config, options = unet.config, {"device": unet.device, "dtype": DTYPES[cell.dtype]}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": torch.randn(cell.batch, 4, side // 8, side // 8, **options),
        "timestep": torch.randint(1000, (cell.batch,), device=unet.device),
        "encoder_hidden_states": torch.randn(cell.batch, 77, config.cross_attention_dim, **options),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(cell.batch, pooled, **options),
            "time_ids": torch.full((cell.batch, 6), float(side), device=unet.device),
        },
    }


def measure(unet: UNet2DConditionModel, cell: Cell, side: int, steps: int, seconds: float = 10.0) -> dict[str, Any]:
    """A cell's figures: seconds of a step (median), of the start and of the first step, and the peak memory in MB.

    Args:
        side: of a picture, in pixels.
        steps: measured ones, fewer where they take more than the seconds.
    """
    device, half = unet.device, cell.dtype != "fp32"
    reset_peak(device)
    with prepared(unet, cell) as start_up:
        learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-4) if learning else None
        scaler = torch.amp.GradScaler(device.type, enabled=cell.dtype == "fp16" and device.type == "cuda")
        block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
        floor = block.register_forward_pre_hook(_needs_gradient) if optimizer is None else None
        inputs = make_inputs(unet, cell, side)
        taken: list[float] = []
        while len(taken) < WARM_UP + steps and (len(taken) < WARM_UP + 1 or sum(taken[WARM_UP:]) < seconds):
            start = clock(device)
            with torch.autocast(device.type, DTYPES[cell.dtype], enabled=half):
                prediction = unet(**inputs).sample
            scaler.scale(prediction.float().square().mean()).backward()
            if optimizer is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(learning, 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            taken.append(clock(device) - start)
        if floor is not None:
            floor.remove()
        found = {"seconds": statistics.median(taken[WARM_UP:]), "first_step": taken[0], "start_up": start_up}
        compiles = cell.compiled and all(
            module._compiled_call_impl is not None
            for module in unet.modules()
            if isinstance(module, BasicTransformerBlock)
        )
        del optimizer, prediction, learning, inputs
        return found | {"peak_mb": peak_mb(device), "compiles": compiles, "steps": len(taken) - WARM_UP}


def _needs_gradient(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    inputs[0].requires_grad_()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds: of the wall once a GPU is done, of the process's own work on a CPU, where others may run beside it."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident memory starts anew


def peak_mb(device: torch.device) -> float | None:
    """Megabytes since `reset_peak`; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    return None


# --- all of them ------------------------------------------------------------------------------------------------------


def run_cells(
    unet: UNet2DConditionModel, cells: Sequence[Cell], side: int, steps: int, budget: float
) -> tuple[dict[Cell, dict[str, Any]], list[Cell]]:
    """What the cells gave (figures, or "failed": why), and those that the budget of seconds left out."""
    start, longest = time.perf_counter(), 0.0
    results: dict[Cell, dict[str, Any]] = {}
    left_out = []
    for cell in cells:
        before = time.perf_counter()
        needed = max(longest, COMPILATION if cell.compiled else 0.0)
        if results and before - start + needed > budget:
            left_out.append(cell)
            continue
        release(unet.device)
        try:
            unet.to(DTYPES[cell.dtype])
            results[cell] = measure(unet, cell, side, steps)
        except torch.OutOfMemoryError:
            results[cell] = {"failed": "out of memory"}
        except Exception as error:  # a kernel that a card or a CPU doesn't have
            results[cell] = {"failed": first_line(error)}
        took = time.perf_counter() - before
        if not cell.compiled:
            longest = max(longest, took)
        print(f"{cell}: {results[cell].get('failed') or format_seconds(results[cell]['seconds'])} ({took:.0f} s)")
    return results, left_out


def format_seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"


def machine(device: torch.device) -> dict[str, Any]:
    """Card, driver, versions and date."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "card": platform.processor() or platform.machine(),
        "versions": {},
    }
    for package in ("torch", "diffusers", "peft", "transformers", "accelerate", "xformers", "triton"):
        with contextlib.suppress(PackageNotFoundError):
            found["versions"][package] = version(package)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    else:
        found["threads"] = torch.get_num_threads()
    return found


def table(results: Mapping[Cell, Mapping[str, Any]]) -> list[str]:
    """A row a cell; overhead is over the frozen base of the same batch, precision and way to compute."""
    lines = ["| cell | s a step | over the floor | peak, GB | start, s | first step, s |", "|---|---|---|---|---|---|"]
    for cell, found in results.items():
        if "failed" in found:
            lines.append(f"| {cell} | {found['failed']} | | | | |")
            continue
        floor = results.get(cell._replace(method=FROZEN), {}).get("seconds")
        over = f"{found['seconds'] / floor:.3f}" if floor else "–"
        peak = "–" if found["peak_mb"] is None else f"{found['peak_mb'] / 1e3:.2f}"
        times = f"{found['start_up']:.1f} | {found['first_step']:.1f}"
        name = f"{cell}, which failed" if cell.compiled and not found["compiles"] else cell
        lines.append(f"| {name} | {found['seconds']:.4f} | {over} | {peak} | {times} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="full")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu.")
    parser.add_argument("--seconds", type=float, default=440, help="No cell starts that would end after them.")
    parser.add_argument("--steps", type=int, default=8, help="Measured ones of a cell.")
    parser.add_argument("--only", help='Cells whose line in the table has this text, such as "batch 1".')
    parser.add_argument("--pixels", type=int, help="A picture's side. Default: the shape's own.")
    parser.add_argument("--output", type=home_path, help="A JSON file with everything.")
    args = parser.parse_args(argv)
    quiet_libraries()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that this PyTorch can use: add --shape quarter --device cpu")
    about, side = machine(device), args.pixels or pixels(args.shape)
    print(f"{about['card']}, {args.shape} shape, {side} × {side} pixels, {about['date']}: {about['versions']}")
    start = time.perf_counter()
    torch.manual_seed(0)
    cells, claims = planned(), list(CLAIMS)
    if device.type == "cpu":
        cells = list(dict.fromkeys(on_cpu(cell) for cell in cells if cell.attention == "sdpa"))
        claims = [
            claim._replace(**{name: on_cpu(cell) for name, cell in claim._asdict().items() if isinstance(cell, Cell)})
            for claim in claims
        ]
    cells = [cell for cell in cells if (args.only or "") in str(cell)]
    if not cells:
        parser.error(f"--only {args.only} is in no cell's line, such as {planned()[0]}")
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[cells[0].dtype])  # in fp32 the weights alone would fill a small card
    try:
        with device:
            unet = build_unet(args.shape).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    results, left_out = run_cells(unet, cells, side, args.steps, args.seconds)
    print("\n".join(["", *table(results), ""]))
    found = [claim._asdict() | dict(zip(("value", "verdict"), claim.verdict(results))) for claim in claims]
    for claim in found:
        shown = "" if claim["value"] is None else f" ({claim['value']:.3f}, at most {claim['most']:g})"
        print(f"{claim['verdict']}{shown}: {claim['words']}")
    for cell in left_out:
        print(f"left out for time: {cell}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if args.output:
        record = {
            "machine": about,
            "shape": args.shape,
            "pixels": side,
            "cells": [{"cell": cell._asdict()} | figures for cell, figures in results.items()],
            "claims": found,
            "left_out": [cell._asdict() for cell in left_out],
        }
        write_atomic(args.output, json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
