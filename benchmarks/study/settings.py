"""What the study compares: groups of settings, the first of a group being what the others are compared with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from methods.adapter import Places
from methods.budget import Layer, base_outline, layers_of, nearest, trained_count
from methods.registry import METHODS, resolve

SMALL_BASE_RATE = 10  # over the rate that SDXL is trained with: LoRA's 1e-3 here, its 1e-4 there
RATE_FACTORS = (1 / 3, 1.0, 3.0, 9.0)
# LoRA's rank of each budget of trained parameters; a half is half of what rank 1 trains.
BUDGETS = (0.5, 4, 16)
EXPORTED_RANK = 16
LORA_RANKS = (1, 4, 16)  # where these are not told apart, nor are methods
# NoRA's neighbours: each group varies one choice, as the paper's table of that number does, but for the preset paper
# (its start too) and the middle and last directions (of plain SVD).
NEIGHBOURS: dict[str, Mapping[str, Sequence[str]]] = {
    "NoRA: outer and inner rank": {
        f"NoRA ({outer}, {inner})": (f"rank={inner}", *([f"outer_rank={outer}"] if outer != 8 * inner else []))
        for outer, inner in ((64, 8), (64, 16), (64, 4), (32, 8), (32, 4), (16, 8), (128, 16))
    }
    | {"NoRA (64, 32), normal: the preset paper": ("outer_rank=64", "rank=32", "inner_init=normal")},
    "NoRA: outer factors (Table 4)": {
        "AwSVD": (),
        "AwSVD, gamma 1": ("awsvd_gamma=1",),
        "AwSVD, the subject's statistic": ("statistic=subject",),
        "SVD": ("outer_init=svd",),
        "random": ("outer_init=random",),
        "SVD, middle directions": ("outer_init=svd", "outer_part=middle"),
        "SVD, last directions": ("outer_init=svd", "outer_part=last"),
    },
    "NoRA: inner factors (Table 5)": {
        "matched": (),
        "normal": ("inner_init=normal",),
        "uniform and zero": ("inner_init=zero_uniform",),
        "diag": ("inner_init=diag",),
    },
    "NoRA: structure and position (Tables 6, 7)": {
        f"{structure} {position}": (f"structure={structure}", f"position={position}", *ranks)
        for structure, position, *ranks in (
            ("serial", "a"),
            ("adapter", "a", "rank=32"),  # R is r x r, and trains as much as serial a at (64, 8)
            ("parallel", "a"),
            ("serial", "b"),
            ("adapter", "b", "rank=64"),  # trains m x m, whatever the frozen pair's rank
            ("parallel", "b"),
            ("serial", "ab"),
        )
    },
    "NoRA: side of the singular values (Table 8)": {
        "B": (),
        "A": ("sigma_side=A",),
        "both": ("sigma_side=both",),
    },
}
# Accuracies in percent that the paper has for a group's rows: the mean of GSM8K and MATH with Mistral-7B in Tables 4 to
# 7, of five data sets with CLIP at 4 and 16 shots in Tables 8 and 9. Its AwSVD has the task's own statistic.
PAPER: dict[str, tuple[str, Mapping[str, str]]] = {
    "NoRA: outer factors (Table 4)": (
        "the paper's Table 4",
        {"AwSVD, the subject's statistic": "44.3", "SVD": "44.0", "random": "41.8"},
    ),
    "NoRA: inner factors (Table 5)": (
        "the paper's Table 5",
        {"normal": "44.3", "diag": "43.9", "uniform and zero": "43.2"},
    ),
    "NoRA: structure and position (Tables 6, 7)": (
        "the paper's Tables 6, 7; 9",
        {
            "serial a": "44.3; 80.2, 85.7",
            "adapter a": "43.0; 77.8, 84.3",
            "parallel a": "41.9; 77.7, 83.1",
            "serial b": "43.3",
            "serial ab": "43.8",
        },
    ),
    "NoRA: side of the singular values (Table 8)": (
        "the paper's Table 8",
        {"B": "79.4, 85.3", "A": "79.9, 85.1", "both": "79.6, 85.1"},
    ),
}


@dataclass(frozen=True)
class Setting:
    """A method with its options; `rates` are the learning rates that are tried first."""

    method: str
    args: tuple[str, ...]
    rates: tuple[float, ...]

    @property
    def key(self) -> str:
        """Names it in files."""
        return " ".join([self.method, *self.args])


Groups = dict[str, dict[str, Setting]]  # group -> name of a row -> setting


def setting(method: str, args: Sequence[str]) -> Setting:
    """What says a default is left out, so that one setting has one key in every group."""
    defaults = resolve(method, [], {})
    own = {name: value for name, value in resolve(method, args, {}).items() if value != defaults[name]}
    return Setting(method, tuple(sorted(as_args(own))), rates_of(method))


def rates_of(method: str) -> tuple[float, ...]:
    """Four rates around what the method's source trains with, moved to a small base; LoRA's where it names none."""
    own = [float(number) for number in re.findall(r"\d+e-\d+", METHODS[method].rates or "")] or [1e-4]
    centre = (own[0] * own[-1]) ** 0.5 * SMALL_BASE_RATE
    return tuple(float(f"{centre * factor:.1e}") for factor in RATE_FACTORS)


def attention_layers(base: str) -> list[Layer]:
    """What the study adapts: the attention layers of a base's UNet, by shape.

    Raises:
        ValueError: if the base has no configuration.
    """
    return layers_of(base_outline(base, ["unet"]), Places("attention"))


def groups_of(layers: Sequence[Layer]) -> Groups:
    """All groups for a base's layers, whose shapes say which settings meet a budget."""
    groups: Groups = {}
    for rank in BUDGETS:
        budget = rank * sum(layer.number * (layer.m + layer.n) for layer in layers)
        own = at_budget(layers, budget)
        groups[f"trained parameters ≤ {budget:,.0f}, LoRA's of rank {rank:g}"] = own
    groups[f"rank {EXPORTED_RANK} of the exported LoRA"] = at_rank(EXPORTED_RANK)
    groups["LoRA: rank"] = {f"rank {rank}": setting("lora", [f"rank={rank}"]) for rank in LORA_RANKS}
    for name, rows in NEIGHBOURS.items():
        groups[name] = {row: setting("nora", (*args, *with_ranks(args))) for row, args in rows.items()}
    return groups


def with_ranks(args: Sequence[str]) -> tuple[str, ...]:
    """NoRA's rank where the row doesn't say it: (64, 8), which every layer of the embedded base can hold."""
    return () if any(one.startswith("rank=") for one in args) else ("rank=8",)


def at_budget(layers: Sequence[Layer], budget: float) -> dict[str, Setting]:
    """Each method's largest setting within the budget, where it has one; LoRA, or NoRA below its rank 1, first."""
    found = {}
    for name, method in METHODS.items():
        if (nearby := nearest(method, layers, lambda one: one.parameters, budget)) is not None:
            found[f"{method.title}, {nearby.said}"] = setting(name, as_args(nearby.chosen))
    first = next((row for row, one in found.items() if one.method == "lora"), None)
    return {row: found[row] for row in sorted(found, key=lambda row: row != first)}


def at_rank(rank: int) -> dict[str, Setting]:
    """Each method whose export is a LoRA of just that rank."""
    found = {}
    for name in ("lora", "nora", "rslora", "loraplus", "moslora", "mica", "lora-fa"):
        found[METHODS[name].title] = setting(name, as_args({"rank": rank}))
    return found


def as_args(options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in options.items())


def trained_parameters(one: Setting, layers: Sequence[Layer]) -> int:
    """Of a setting in all layers."""
    given = resolve(one.method, list(one.args), {})
    return sum(layer.number * trained_count(one.method, given, layer.m, layer.n) for layer in layers)


def rank_said(one: Setting, layers: Sequence[Layer]) -> str | None:
    """The rank, and NoRA's outer one, each with its share of the layers' smaller sides; None where a method has none.

    On a small base a rank is a larger share than on SDXL, whose sides are 640 and 1280.
    """
    given = resolve(one.method, list(one.args), {})
    if not METHODS[one.method].low_rank and one.method != "dora":
        return None
    sides = [min(layer.m, layer.n) for layer in layers]
    rank = given["target_rank" if "target_rank" in given else "rank"]
    said = with_share(rank, sides)
    if one.method in ("nora", "nola-nora") and given.get("structure") != "adapter":
        said += f" in {with_share(given['outer_rank'] or 8 * rank, sides)}"
    return said


def with_share(rank: int, sides: Sequence[int]) -> str:
    """Such as "16 (10–17 %)"."""
    least, most = (round(100 * min(1, rank / side)) for side in (max(sides), min(sides)))
    return f"{rank} ({least}–{most} %)" if least != most else f"{rank} ({least} %)"
