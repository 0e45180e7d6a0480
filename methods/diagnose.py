"""How well NoRA's frozen factors suit a base, layer by layer; and what of a trained LoRA they could not have learned.

    python -m methods.diagnose --base assets/tiny-sdxl --outer_rank 24 --output_dir out/diagnosis
    python -m methods.diagnose --base BASE --outer_rank 128 --lora pytorch_lora_weights.safetensors --output_dir out/d

For each attention layer of the UNet, at the outer rank r:

- output error: ‖(W − B A) X‖ / ‖W X‖ on activations X of pictures that the base draws by itself and that the statistic
  was not measured on; for AwSVD, for the plain SVD, for AwSVD's middle and last directions, and for random rows A with
  the best B, W A⁺ (NoRA, arXiv 2408.10280, Figure 7, which has AwSVD about 10 % below SVD);
- energy: the share of ‖W S‖² in its r leading singular values;
- outside: of a LoRA's update ΔW, the share ‖ΔW − P_B ΔW P_A‖² / ‖ΔW‖² that is outside of every B X A, with P_B and P_A
  the projections on the columns of B and the rows of A; and at rank r', what the nearest B B' A' A of that rank misses.

Writes the table as diagnosis.json and a plot, diagnosis.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from methods.base_passes import SEED, GenericPrompts, encode_generic_prompts, run_own_pictures
from methods.base_statistic import base_in_float32
from methods.components import FOLDED_WEIGHTS
from methods.update import Update
from nora.functional import awsvd_scale, canonical_statistic, gaussian
from storage.files import write_atomic
from storage.text import expand_home, home_path

PARTS = ("AwSVD", "SVD", "middle", "last", "random")
OTHER_SEED = SEED + 1


class Seen(NamedTuple):
    """Of a layer's inputs x (n,) over all tokens: mean |x_j| (n,) and mean x xᵀ (n, n), float64."""

    mean_abs: torch.Tensor
    gram: torch.Tensor


class Sums:
    """The same over the tokens so far, of an input that several layers may have."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.gram: torch.Tensor | float = 0.0
        self.count = 0


class Diagnosis(NamedTuple):
    """One layer: output error by part, energy, and of a LoRA's update the shares outside; None without a LoRA."""

    layer: str
    m: int
    n: int
    outer_r: int
    errors: dict[str, float]
    energy: float
    outside: float | None
    missed: float | None


def right_directions(W: torch.Tensor, scale: torch.Tensor, r: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Part -> A (r, n) and R (n, r) with ``B = W R``, for r directions of ``W S``, or of W, or random ones; float64.

    Args:
        W: (m, n) float64.
        scale: diagonal of S (n,).
    """
    ones = torch.ones_like(scale)
    scaled, plain = (torch.linalg.svd(W * by, full_matrices=False)[2] for by in (scale, ones))  # (min(m, n), n)
    side = len(scaled)
    chosen = {
        "AwSVD": (scaled, 0, scale),
        "SVD": (plain, 0, ones),
        "middle": (scaled, (side - r) // 2, scale),
        "last": (scaled, side - r, scale),
    }
    pairs = {part: (Vt[at : at + r] / by, by[:, None] * Vt[at : at + r].T) for part, (Vt, at, by) in chosen.items()}
    A = gaussian(r, W.shape[1]).to(W)
    return pairs | {"random": (A, torch.linalg.pinv(A))}


def output_error(W: torch.Tensor, A: torch.Tensor, R: torch.Tensor, gram: torch.Tensor) -> float:
    """‖(W − W R A) X‖ / ‖W X‖ with gram ∝ X Xᵀ (n, n)."""
    missing = W - (W @ R) @ A
    return float((((missing @ gram) * missing).sum() / ((W @ gram) * W).sum()).clamp(min=0).sqrt())


def shares_outside(update: torch.Tensor, A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[float, float]:
    """Of ΔW (m, n): the share of its energy outside of every ``B X A``, and that missed by the best one of a rank."""
    left, right = torch.linalg.qr(B)[0], torch.linalg.qr(A.T)[0]  # (m, r), (n, r)
    total = float(update.square().sum())
    values = torch.linalg.svdvals(left.T @ update @ right).square()
    return 1 - float(values.sum()) / total, 1 - float(values[:rank].sum()) / total


def diagnose_layer(
    name: str, weight: torch.Tensor, seen: Seen, held_out: Seen, outer_r: int, rank: int, update: Update | None
) -> Diagnosis:
    """
    Args:
        seen: what the statistic is measured on; ``held_out``: what errors are.
    """
    W = weight.double()
    r = min(outer_r, *W.shape)
    scale = awsvd_scale(canonical_statistic(seen.mean_abs), 0.5)
    pairs = right_directions(W, scale, r)
    errors = {part: output_error(W, *pair, held_out.gram) for part, pair in pairs.items()}
    values = torch.linalg.svdvals(W * scale).square()
    outside = missed = None
    if update is not None:
        A, R = pairs["AwSVD"]
        outside, missed = shares_outside(update.weight().double(), A, W @ R, rank)
    m, n = W.shape
    return Diagnosis(name, m, n, r, errors, float(values[:r].sum() / values.sum()), outside, missed)


@torch.no_grad()
def look_at_inputs(
    unet: nn.Module, layers: Mapping[str, nn.Module], generic: GenericPrompts, scheduler: object, seed: int
) -> dict[str, Seen]:
    """What each layer sees while the base draws pictures by itself; layers with one input share what was computed."""
    sums: dict[str, Sums] = {}
    recent: tuple[torch.Tensor, Sums] | None = None

    def hook(name: str, x: torch.Tensor) -> None:
        nonlocal recent
        if recent is not None and recent[0] is x and sums.setdefault(name, recent[1]) is recent[1]:
            return  # to_k's and to_v's input is to_q's
        own = sums.setdefault(name, Sums())
        tokens = x.flatten(0, -2).double()
        own.total, own.gram = own.total + tokens.abs().sum(dim=0), own.gram + tokens.T @ tokens
        own.count += len(tokens)
        recent = x, own

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with base_in_float32(unet):
            run_own_pictures(unet, generic, scheduler, seed)
    finally:
        for handle in handles:
            handle.remove()
    means = {id(own): Seen(own.total / own.count, own.gram / own.count) for own in sums.values()}  # type: ignore[arg-type]
    return {name: means[id(own)] for name, own in sums.items()}


def table(found: Sequence[Diagnosis], rank: int) -> str:
    """Means over the layers, in Markdown."""
    rows = ["| | mean | worst layer |", "|---|---|---|"]

    def row(label: str, values: Sequence[float], worst: float) -> None:
        rows.append(f"| {label} | {sum(values) / len(values):.4f} | {worst:.4f} |")

    for part in PARTS:
        errors = [one.errors[part] for one in found]
        row(f"output error, {part}", errors, max(errors))
    ratios = [one.errors["AwSVD"] / one.errors["SVD"] for one in found]
    row("AwSVD's error / SVD's", ratios, max(ratios))
    row("energy captured", [one.energy for one in found], min(one.energy for one in found))
    if (outside := [one.outside for one in found if one.outside is not None]) and (
        missed := [one.missed for one in found if one.missed is not None]
    ):
        by_chance = [1 - one.outer_r**2 / (one.m * one.n) for one in found]
        row("a LoRA's update: outside", outside, max(outside))
        row(f"missed at rank {rank}", missed, max(missed))
        row("outside of random factors, by chance", by_chance, max(by_chance))
    return "\n".join(rows)


def plot(found: Sequence[Diagnosis], path: Path) -> None:
    """Output errors by layer, and the share of a LoRA's update outside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_update = any(one.outside is not None for one in found)
    figure, axes = pyplot.subplots(1 + has_update, 1, figsize=(9, 3 + 2.4 * has_update), squeeze=False, sharex=True)
    places = range(len(found))
    for part in PARTS:
        axes[0][0].plot(places, [one.errors[part] for one in found], label=part, linewidth=1.2)
    axes[0][0].set_ylabel("output error")
    axes[0][0].legend(ncols=len(PARTS), fontsize=8)
    if has_update:
        axes[1][0].bar(places, [one.outside for one in found], color="tab:gray")
        axes[1][0].set_ylabel("a LoRA's update\noutside")
    axes[-1][0].set_xlabel(f"the UNet's {len(found)} attention layers, outer rank {found[0].outer_r}")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, required=True, help="a folder or a Hub id")
    parser.add_argument("--lora", type=home_path, help="a run's folder, or its LoRA file")
    parser.add_argument("--outer_rank", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16, help="of the update, r'")
    parser.add_argument("--output_dir", type=home_path, required=True)
    args = parser.parse_args(argv)
    try:
        if args.outer_rank < 1 or args.rank < 1:
            raise ValueError("--outer_rank and --rank must be at least 1")
        print(diagnose(args.base, args.lora, args.outer_rank, args.rank, args.output_dir))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def diagnose(base: str, lora: Path | None, outer_r: int, rank: int, folder: Path) -> str:
    """Write diagnosis.json and diagnosis.png, and return the table.

    Raises:
        ValueError: if the base can't be loaded, or the LoRA isn't one of it.
    """
    from diffusers import StableDiffusionXLPipeline

    from methods.adapter import Places, target_layers
    from methods.reading import read_adapter

    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"--base {base} can't be loaded: {error}") from error
    layers = target_layers("unet", pipeline.unet, Places())
    updates = {}
    if lora is not None:
        components = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
        updates = read_adapter(lora / FOLDED_WEIGHTS if lora.is_dir() else lora, components).get("unet", {})
    generic = encode_generic_prompts(pipeline)
    seen = look_at_inputs(pipeline.unet, layers, generic, pipeline.scheduler, SEED)
    held_out = look_at_inputs(pipeline.unet, layers, generic, pipeline.scheduler, OTHER_SEED)
    found = [
        diagnose_layer(name, layer.weight.detach(), seen[name], held_out[name], outer_r, rank, updates.get(name))
        for name, layer in layers.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "diagnosis.json", json.dumps([one._asdict() for one in found], indent=1) + "\n")
    plot(found, folder / "diagnosis.png")
    return table(found, rank)


if __name__ == "__main__":
    main()
