"""What each method can do within a budget: the settings that come nearest to it from below, from a base's shapes alone.

    python -m methods.budget --base stabilityai/stable-diffusion-xl-base-1.0 --params 2.3M
    python -m methods.budget --base assets/tiny-sdxl --file 200KB --text_encoders
    python -m methods.budget --base BASE --memory 12GB --resolution 1024 --batch 1 --dtype fp16

Only the base's configurations are read. Files are counted without their headers and NoRA's fingerprints of 60 bytes a
layer. Memory is that of training the UNet (see `methods.memory`): weights, what is trained with AdamW's two moments,
and what autograd keeps.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from methods.adapter import Places, target_layers
from methods.components import COMPONENT_NAMES
from methods.options import Method
from methods.registry import METHODS, resolve
from storage.text import expand_home

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LARGEST = 4096  # of any rank that is tried
# The option that makes a method larger or smaller, where it is not the rank; and what it can be.
SIZES: dict[str, tuple[str, Sequence[int]]] = {
    "adalora": ("init_rank", range(2, LARGEST + 1)),
    "fourierft": ("n_frequency", range(1, 100_001)),
    "lokr": ("rank", range(1, 65)),  # from half of a factor's side on it is whole, and no rank changes it
    "hra": ("rank", range(2, LARGEST + 1, 2)),
    "nola": ("coefficients", range(1, 100_001)),
    "nola-nora": ("coefficients", range(1, 100_001)),
    "oft": ("block_size", [2**power for power in range(1, 13)]),
}
UNEVEN = ("lokr", "randlora")  # a step of the rank may take more or less: every value is tried


class Layer(NamedTuple):
    """A linear layer's outputs, inputs, and how many there are."""

    m: int
    n: int
    number: int


class Setting(NamedTuple):
    """What a method takes at one setting, over all layers."""

    said: str
    parameters: int
    file_numbers: int  # in the smallest file that is the whole adapter
    frozen_numbers: int  # beside the base, as NoRA's A
    chosen: Mapping[str, Any] = MappingProxyType({})  # the options that `nearest` sets


def trained_count(method: str, args: Mapping[str, Any], m: int, n: int) -> int:
    """Parameters that a method trains in a layer of m outputs and n inputs."""
    r: Any = args.get("rank")
    if method in ("lora", "rslora", "loraplus", "pissa", "olora", "dylora"):
        return r * (m + n)
    if method == "lokr":
        return _lokr_count(args, m, n)
    if method == "randlora":
        return math.ceil(min(m, n) / r) * (r + min(m, n))
    if method == "oft":
        block = args["block_size"]
        return (1 if args["block_share"] else n // block) * block * (block - 1) // 2
    if method == "nora":
        return 2 * r * (args["outer_rank"] or min(8 * r, m, n))
    return {
        "lora-xs": lambda: r * r,
        "nola": lambda: 2 * args["coefficients"],
        "nola-nora": lambda: 2 * args["coefficients"],
        "dora": lambda: r * (m + n) + m,
        "moslora": lambda: r * (m + n) + r * r,
        "mica": lambda: r * n,
        "lora-fa": lambda: r * m,
        "vera": lambda: m + r,
        "adalora": lambda: args["init_rank"] * (m + n + 1),
        "loha": lambda: 2 * r * (m + n),
        "hra": lambda: n * r,
        "fourierft": lambda: args["n_frequency"],
    }[method]()


def _lokr_count(args: Mapping[str, Any], m: int, n: int) -> int:
    from peft.tuners.lokr.layer import factorization

    (in_m, in_n), (out_l, out_k) = factorization(n, args["factor"]), factorization(m, args["factor"])
    r, small = args["rank"], args["decompose_both"] and args["rank"] < max(out_l, in_m) / 2
    first = r * (out_l + in_m) if small else out_l * in_m
    return first + (r * (out_k + in_n) if r < max(out_k, in_n) / 2 else out_k * in_n)


def file_count(method: Method, args: Mapping[str, Any], layers: Sequence[Layer]) -> int:
    """Numbers in the smallest file that is the whole adapter: a LoRA file, NoRA's inner factors, or PEFT's folder."""
    trained = sum(layer.number * trained_count(method.name, args, layer.m, layer.n) for layer in layers)
    if method.adapter == "methods.nora:Nora":
        return trained
    if method.low_rank:
        rank = {"pissa": 2, "olora": 2}.get(method.name, 1) * args.get("rank", args.get("target_rank"))
        if method.name == "dylora":
            rank = args["save_rank"] or rank
        return sum(layer.number * rank * (layer.m + layer.n) for layer in layers)
    if method.name in ("vera", "randlora"):  # the shared random factors are in the file
        sides = max(layer.m for layer in layers), max(layer.n for layer in layers)
        per = args["rank"] * (1 if method.name == "vera" else math.ceil(min(sides) / args["rank"]))
        return trained + args["rank"] * sides[1] + per * sides[0]
    return trained


def setting(method: Method, args: Mapping[str, Any], layers: Sequence[Layer]) -> Setting:
    parameters = sum(layer.number * trained_count(method.name, args, layer.m, layer.n) for layer in layers)
    name, _ = SIZES.get(method.name, ("rank", ()))
    said = f"{name}={args[name]}"
    frozen = 0
    if method.name in ("nora", "nola-nora", "lora-xs"):
        outer = [
            args["rank"] if method.name == "lora-xs" else args["outer_rank"] or min(8 * args["rank"], layer.m, layer.n)
            for layer in layers
        ]
        frozen = sum(layer.number * r * layer.n for layer, r in zip(layers, outer))
        if method.name != "lora-xs":
            said += f" outer_rank={args['outer_rank'] or max(outer)}"
        if method.name == "nola-nora":  # a basis of A' and one of B' for each shape
            frozen += sum(2 * args["coefficients"] * args["rank"] * r for r in set(outer))
    if method.name == "nola":  # a basis of A for each n and one of B for each m
        sides = [*{layer.n for layer in layers}, *{layer.m for layer in layers}]
        frozen = args["coefficients"] * args["rank"] * sum(sides)
    return Setting(said, parameters, file_count(method, args, layers), frozen)


def nearest(method: Method, layers: Sequence[Layer], cost: Callable[[Setting], float], budget: float) -> Setting | None:
    """The largest setting whose cost is within the budget, all else at its defaults; None if none is."""
    _, values = SIZES.get(method.name, ("rank", range(1, LARGEST + 1)))
    if method.name in UNEVEN:
        within = [one for value in values if (one := _at(method, value, layers)) and cost(one) <= budget]
        return max(within, key=cost, default=None)
    low, high, best = 0, len(values) - 1, None
    while low <= high:
        middle = (low + high) // 2
        found = _at(method, values[middle], layers)
        if found is not None and cost(found) <= budget:
            best, low = found, middle + 1
        else:
            high = middle - 1
    return best


def _at(method: Method, value: int, layers: Sequence[Layer]) -> Setting | None:
    """The method with that value of what makes it larger or smaller; None if a layer can't hold it."""
    name, _ = SIZES.get(method.name, ("rank", ()))
    chosen = {name: value} | ({"target_rank": max(1, value - 1)} if method.name == "adalora" else {})
    args = resolve(method.name, [], {}) | chosen
    return setting(method, args, layers)._replace(chosen=chosen) if _fits(method.name, args, layers) else None


def _fits(method: str, args: Mapping[str, Any], layers: Sequence[Layer]) -> bool:
    """Whether every layer can hold it."""
    if method == "randlora" and args["rank"] > max(min(layer.m, layer.n) for layer in layers):
        return False  # one pair is of full rank already
    for layer in layers:
        side = min(layer.m, layer.n)
        if method == "oft" and layer.n % args["block_size"]:
            return False
        if method == "fourierft" and args["n_frequency"] > layer.m * layer.n:
            return False
        if method == "hra" and args["rank"] > layer.n:
            return False
        if method not in ("oft", "fourierft", "hra", "vera", "randlora", "lokr", "loha", "nola"):
            rank = args.get("init_rank", args.get("rank"))
            if rank > side or (method in ("nora", "nola-nora") and (args["outer_rank"] or 0) > side):
                return False
    return True


def base_outline(base: str, names: Sequence[str] = COMPONENT_NAMES) -> dict[str, Any]:
    """Component -> the base's model on the meta device, from its configuration.

    Raises:
        ValueError: if the base has no such configurations, here or in the Hub's cache.
    """
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    try:
        with init_empty_weights():
            return {
                name: UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base, subfolder=name))
                if name == "unet"
                else kinds[name](CLIPTextConfig.from_pretrained(base, subfolder=name))
                for name in names
            }
    except OSError as error:
        raise ValueError(f"--base {base} has no configuration of an SDXL base: {error}") from error


def layers_of(models: Mapping[str, Any], places: Places) -> list[Layer]:
    """The adapted layers by shape."""
    shapes: Counter[tuple[int, int]] = Counter()
    for component, model in models.items():
        shapes.update(tuple(layer.weight.shape) for layer in target_layers(component, model, places).values())
    return [Layer(m, n, count) for (m, n), count in sorted(shapes.items())]


def amount(text: str, unit: str = "") -> float:
    """2.3M, 1MB, 6GB: a number with a power of ten.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*([KMG]?){unit}", text, re.IGNORECASE)
    if not found:
        raise ValueError(f"{text} must look like {'1MB or 6GB' if unit else '2.3M'}")
    return float(found[1]) * UNITS[found[2].upper()]


def _least(method: Method, layers: Sequence[Layer], cost: Callable[[Setting], float], budget: float) -> str:
    name, values = SIZES.get(method.name, ("rank", range(1, LARGEST + 1)))
    possible = [one for value in values[: None if method.name in UNEVEN else 1] if (one := _at(method, value, layers))]
    if not possible:
        return f"no layer can hold {name}={values[0]}"
    least = min(possible, key=cost)
    return f"{least.said} takes {cost(least) / budget:.2f} of it"


def table(layers: Sequence[Layer], cost: Callable[[Setting], float], budget: float, bytes_each: int) -> str:
    """A row for each method of the registry, in Markdown."""
    rows = ["| method | settings | trained | file | of the budget |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        found = nearest(method, layers, cost, budget)
        if found is None:
            rows.append(f"| {method.name} | none fits: {_least(method, layers, cost, budget)} | | | |")
            continue
        size, share = f"{found.file_numbers * bytes_each / 1e6:.2f} MB", f"{cost(found) / budget:.2f}"
        rows.append(f"| {method.name} | {found.said} | {found.parameters:,} | {size} | {share} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, required=True, help="a folder or a Hub id; only its configurations")
    parser.add_argument("--params", help="trained parameters at most, such as 2.3M")
    parser.add_argument("--file", help="size of the adapter's file at most, such as 1MB")
    parser.add_argument("--memory", help="memory of training at most, such as 6GB")
    parser.add_argument("--targets", default="attention", help="as for the trainer")
    parser.add_argument("--text_encoders", action="store_true", help="both text encoders too")
    parser.add_argument("--dtype", choices=BYTES, default="fp16", help="of the file, and of the base in memory")
    parser.add_argument("--resolution", type=int, help="for --memory; default: the base's")
    parser.add_argument("--batch", type=int, default=1, help="for --memory")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in ("params", "file", "memory") if getattr(args, name) is not None}
    try:
        if len(given) != 1:
            raise ValueError("give one of --params, --file and --memory")
        models = base_outline(args.base, COMPONENT_NAMES if args.text_encoders else COMPONENT_NAMES[:1])
        layers = layers_of(models, Places(args.targets))
        each = BYTES[args.dtype]
        if args.params:
            print(table(layers, lambda one: one.parameters, amount(args.params), each))
        elif args.file:
            print(table(layers, lambda one: one.file_numbers * each, amount(args.file, "B"), each))
        else:
            import torch

            from methods.memory import training_bytes

            pixels = {
                "resolution": args.resolution,
                "batch_size": args.batch,
                "dtype": getattr(torch, DTYPES[args.dtype]),
            }
            fixed = training_bytes(models, Places(args.targets), **pixels)
            budget = amount(args.memory, "B")
            print(f"the base alone, with what autograd keeps beside adapters: {fixed / 1e9:.2f} GB")
            print(table(layers, lambda one: fixed + 16 * one.parameters + each * one.frozen_numbers, budget, each))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
