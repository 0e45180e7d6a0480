"""Adapter files as they come: NoRA's and diffusers' own, kohya's (A1111, ComfyUI) and PEFT's folders.

Only headers are read here, so that a file that can't fit is refused before the pipeline is touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from inference.base import check_base
from methods.components import (
    BEST,
    BEST_SCORES,
    COMPONENT_NAMES,
    EMBEDDINGS,
    FOLDED_WEIGHTS,
    INNER_WEIGHTS,
    RUN_RECORD,
)
from storage.files import read_json
from storage.tensors import read_safetensors_header

_LORA_MATRIX = re.compile(r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")
BASE_COLUMN = "base"
DOWNLOAD_OPTIONS = ("revision", "variant", "cache_dir")  # flags of the trainer and of the commands here
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_")
_PEFT_PREFIX = "base_model.model."
_LORA_EXTRA = (".alpha", ".lora_magnitude_vector")  # scalars and DoRA vectors, whose shapes follow from the matrices


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's headers."""

    path: Path  # the file, or the folder of a PEFT adapter
    kind: Literal["folded", "inner", "kohya", "peft"]  # "folded": diffusers' LoRA; "inner": NoRA's inner factors
    shapes: dict[str, tuple[int, ...]]  # of a PEFT adapter: {component}.{key}
    metadata: dict[str, str]
    parts: dict[str, Path] = field(default_factory=dict)  # component -> folder, of a PEFT adapter

    @property
    def new_word(self) -> Path | None:
        """The learned embeddings beside it, if there are any."""
        path = (self.path if self.path.is_dir() else self.path.parent) / EMBEDDINGS
        return path if path.is_file() else None


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Read the header of an adapter file, or of the file to use in a folder; no weights are read.

    In a run's folder the folded file comes first, because it needs no outer factors to be computed anew. A folder may
    also be PEFT's (one adapter, or one each in unet/, text_encoder/ and text_encoder_2/), or hold a single LoRA file
    of any name. The kind of a file is read from its keys and metadata, so files may be renamed.

    Raises:
        ValueError: no such path, no adapter in it, or not an adapter file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"adapter {path} does not exist (looked from {Path.cwd()})")
    if path.is_dir():
        candidates = [path / name for name in (FOLDED_WEIGHTS, INNER_WEIGHTS)]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None and (parts := _peft_folders(path)):
            return _inspect_peft(path, parts)
        others = list(path.glob("*.safetensors"))
        if file is None and len(others) != 1:
            raise ValueError(
                f"adapter folder {path} has neither {FOLDED_WEIGHTS} nor {INNER_WEIGHTS}, nor is it a PEFT folder "
                f"({CONFIG_NAME}), nor does it hold just one .safetensors file: name the file itself"
            )
        path = file or others[0]
    metadata, shapes = read_safetensors_header(path, "adapter")
    if any(key.startswith(_KOHYA_PREFIXES) for key in shapes):
        return AdapterFile(path, "kohya", shapes, metadata)
    if not any(_LORA_MATRIX.fullmatch(key) for key in shapes):
        raise ValueError(
            f"adapter {path} holds no LoRA matrices in a format that is known here, such as unet.….lora_A.weight of "
            "diffusers or lora_unet_….lora_down.weight of kohya"
        )
    return AdapterFile(path, "inner" if "fingerprints" in metadata else "folded", shapes, metadata)


def _peft_folders(path: Path) -> dict[str, Path]:
    """Component -> folder with a PEFT adapter; a lone adapter's component is told from its layers later."""
    if (path / CONFIG_NAME).is_file():
        return {"": path}
    return {name: path / name for name in COMPONENT_NAMES if (path / name / CONFIG_NAME).is_file()}


def _inspect_peft(path: Path, parts: dict[str, Path]) -> AdapterFile:
    found, shapes = {}, {}
    for name, folder in parts.items():
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        if not weights.is_file():
            raise ValueError(f"adapter folder {folder} has {CONFIG_NAME} and no {SAFETENSORS_WEIGHTS_NAME} beside it")
        read_json(folder / CONFIG_NAME)
        keys = {
            key.removeprefix(_PEFT_PREFIX): shape
            for key, shape in read_safetensors_header(weights, "adapter")[1].items()
        }
        if not name:  # only a UNet has attention blocks named like this
            name = "unet" if any("transformer_blocks" in key for key in keys) else "text_encoder"
        found[name] = folder
        shapes |= {f"{name}.{key}": shape for key, shape in keys.items()}
    return AdapterFile(path, "peft", shapes, {}, found)


def read_run_record(path: str | Path) -> dict[str, Any]:
    """The `run.json` of an adapter: beside it, or one folder up for a checkpoint or the best; {} if there is none."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    inner = folder.name == BEST or _CHECKPOINT.fullmatch(folder.name)
    records = [folder / RUN_RECORD, *([folder.resolve().parent / RUN_RECORD] if inner else [])]
    return next((read_json(record) for record in records if record.is_file()), {})


def run_checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints that hold an adapter, in the order of training."""
    found = [(match, folder) for folder in path.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(folder.name))]
    steps = [(int(match[1]), folder) for match, folder in found]
    return sorted(
        (step, folder)
        for step, folder in steps
        if any((folder / name).is_file() for name in (FOLDED_WEIGHTS, INNER_WEIGHTS))
    )


def trained_steps(path: str | Path) -> int | None:
    """The step that an adapter is of: a checkpoint's, the best one's, or the run's last; None if it is not known."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if match := _CHECKPOINT.fullmatch(folder.name):
        return int(match[1])
    if folder.name == BEST:
        return read_json(folder / BEST_SCORES).get("step") if (folder / BEST_SCORES).is_file() else None
    return recorded_config(path).get("max_train_steps")


def recorded_config(path: str | Path) -> dict[str, Any]:
    """The flags of the run that made an adapter; {} where they are not known."""
    config = read_run_record(path).get("config")
    return config if isinstance(config, dict) else {}


def recorded_base(path: str | Path) -> str:
    """The base that an adapter was trained on, as its `run.json` names it.

    Raises:
        ValueError: there is no record, or the base it names is not here.
    """
    base = recorded_config(path).get("pretrained_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter {path} has no {RUN_RECORD} that names its base: name it with --base")
    try:
        check_base(base)
    except ValueError as error:
        raise ValueError(
            f"{RUN_RECORD} of adapter {path} names a base that can't be used: {error}; or use --base"
        ) from error
    return base


def recorded_downloads(path: str | Path) -> dict[str, str]:
    """The keyword arguments of ``from_pretrained`` that an adapter's run loaded its base with."""
    config = recorded_config(path)
    options = {name: value for name in DOWNLOAD_OPTIONS if isinstance(value := config.get(name), str)}
    if not Path(options.get("cache_dir", "")).is_dir():  # another machine's
        options.pop("cache_dir", None)
    return options


def check_lora_fits(path: Path, shapes: Mapping[str, tuple[int, ...]], components: dict[str, nn.Module]) -> None:
    """Raise ValueError, naming the layer, unless every LoRA pair fits a layer of the base.

    Args:
        path: what messages call the adapter.
        shapes: key in diffusers' spelling -> shape.
    """
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _LORA_MATRIX.fullmatch(key)
        if match:
            side = "A" if match["side"] in ("lora_A", "lora.down") else "B"
            pairs.setdefault(match["layer"], {})[side] = shape
        elif not key.endswith(_LORA_EXTRA):
            raise ValueError(f"adapter {path}: {key} is not a key of a LoRA in the diffusers format")
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"adapter {path}: {layer} has only lora_{min(pair)}, the file is incomplete")
        weight = _base_weight(components, layer)
        if weight is None:
            raise ValueError(
                f"adapter {path} belongs to another base: this one has no layer {layer}; use the base it was trained on"
            )
        if not all(len(shape) == weight.ndim and min(shape) > 0 for shape in pair.values()):
            raise ValueError(
                f"adapter {path}: {layer} has lora_A {pair['A']} and lora_B {pair['B']}, the file is damaged"
            )
        (rank, in_features), (out_features, rank_out) = pair["A"][:2], pair["B"][:2]
        if rank != rank_out:
            raise ValueError(f"adapter {path}: {layer} has rank {rank} in lora_A and {rank_out} in lora_B")
        if (out_features, in_features) != tuple(weight.shape[:2]):
            raise ValueError(
                f"adapter {path} belongs to another base: {layer} is {out_features}×{in_features} in the file and "
                f"{weight.shape[0]}×{weight.shape[1]} in this base; use the base it was trained on"
            )


def _base_weight(components: dict[str, nn.Module], layer: str) -> torch.Tensor | None:
    """The frozen weight behind a key's layer, for keys with and without transformers' old `text_model` level."""
    for prefix, component in components.items():
        for spelling in (prefix, prefix.removesuffix(".text_model")):
            if not layer.startswith(f"{spelling}."):
                continue
            try:
                module = component.get_submodule(layer.removeprefix(f"{spelling}."))
            except AttributeError:
                continue
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim >= 2:
                return weight
    return None


def parse_named_adapters(pairs: Sequence[str], flag: str = "--adapters") -> dict[str, Path]:
    """`["lora=out/lora", …]` -> name: path, in order.

    Raises:
        ValueError: for a pair of another form, and for a name that is no folder's name, or taken.
    """
    adapters: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (separator and name.strip() and path):
            raise ValueError(f"{flag} {pair} must be NAME=PATH, such as nora=out/nora")
        if name == BASE_COLUMN or name in adapters:
            raise ValueError(f"{flag} {pair}: the name {name} is taken, choose another one")
        adapters[name] = Path(path)
    return adapters
