"""Many small tensors as a few stacked ones: an inner-only file of SDXL has 1,120, and their names alone take 0.16 MB.

Modules whose tensors have the same names, shapes and dtypes are a group; "{group}.{entry}" is the stack of that entry,
in the order of the modules' names, which the layout has as a tree by path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def pack(modules: Mapping[str, Tensors]) -> tuple[Tensors, list[dict]]:
    """Stacked tensors, and the layout, for JSON: a tree of module names for each group."""
    groups: dict[tuple, list[str]] = {}
    for name in sorted(modules):
        entries = sorted(modules[name].items())
        signature = tuple((entry, tuple(tensor.shape), tensor.dtype) for entry, tensor in entries)
        groups.setdefault(signature, []).append(name)
    packed = {
        f"{number}.{entry}": torch.stack([modules[name][entry].detach().cpu() for name in names])
        for number, (signature, names) in enumerate(groups.items())
        for entry, *_ in signature
    }
    return packed, [_tree(names) for names in groups.values()]


def unpack(packed: Mapping[str, torch.Tensor], layout: list[dict]) -> dict[str, Tensors]:
    """Module name -> entry -> tensor.

    Raises:
        ValueError: if a stack has another length than its group, or no group.
    """
    groups = [sorted(_names(tree)) for tree in layout]
    modules: dict[str, Tensors] = {name: {} for names in groups for name in names}
    for key, stack in packed.items():
        number, _, entry = key.partition(".")
        names = groups[int(number)] if number.isdecimal() and int(number) < len(groups) else []
        if not entry or not names or len(stack) != len(names):
            raise ValueError(f"the key {key} doesn't fit its layout of {len(names)} modules")
        for name, tensor in zip(names, stack):
            modules[name][entry] = tensor
    return modules


def _tree(names: list[str]) -> dict:
    root: dict[str, Any] = {}
    for name in names:
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = {}
    return root


def _names(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for part, below in tree.items():
        if below:
            yield from _names(below, f"{prefix}{part}.")
        else:
            yield f"{prefix}{part}"
