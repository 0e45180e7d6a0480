"""The files that a run leaves of what it learned, each read back and compared before the run calls itself done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from torch import nn

from methods.adapter import Adapter
from methods.components import EMBEDDINGS, ENCODERS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from methods.files import KOHYA_WEIGHTS, PEFT_FOLDER, save_files
from methods.reading import read_adapter
from methods.update import Update
from runs.record import LOSS_PLOT, MODEL_CARD, RUN_PAGE
from storage.tensors import write_safetensors

TOLERANCE = 1e-4  # relative; files hold what is live in fp32, and differ by how a product is rounded
# What a finished run leaves.
WEIGHTS = (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS, EMBEDDINGS, PEFT_FOLDER)
RESULTS = (RUN_RECORD, MODEL_CARD, LOSS_PLOT, RUN_PAGE, *WEIGHTS)


def save_adapter(
    adapter: Adapter,
    models: Mapping[str, nn.Module],
    folder: Path,
    *,
    new_word: str | None = None,
    kohya: bool = False,
    peft: bool = False,
) -> list[str]:
    """Write the adapter's files, and the embeddings of a new word; returns their names.

    Args:
        models: component name -> model with what learned inside.
        new_word: what the new tokens stand for, where there are any.
        kohya, peft: as for `save_files`.
    """
    names = save_files(adapter, folder, kohya=kohya, peft=peft)
    if new_word is not None:
        write_safetensors(folder / EMBEDDINGS, new_embeddings(models), {"word": new_word})
        names.append(EMBEDDINGS)
    return names


def new_embeddings(models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """(tokens, d) of the words that each text encoder learned, by diffusers' names for the two."""
    embeddings = {}
    for key, (encoder, _) in ENCODERS.items():
        state = get_peft_model_state_dict(models[encoder], save_embedding_layers=False)
        embeddings[key] = next(value for name, value in state.items() if "trainable_tokens_delta" in name).float()
    return embeddings


@torch.no_grad()
def check_files(adapter: Adapter, folder: Path, files: Sequence[str]) -> None:
    """Read the files back as a user's pipeline does, and compare each layer's ΔW with the live one.

    On a base that is split or in 8 bits only LoRA files are, which can be read without the base's own weights.

    Args:
        files: names of those that were written, in the folder.

    Raises:
        ValueError: naming the file and the layer that differ.
    """
    paths = [folder / name for name in (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS) if name in files]
    if any(name.startswith(f"{PEFT_FOLDER}/") for name in files):
        paths.append(folder / PEFT_FOLDER)
    if not all(base_is_whole(model) for model in adapter.models.values()):
        if not adapter.method.low_rank:
            return
        paths = [path for path in paths if path.name in (FOLDED_WEIGHTS, KOHYA_WEIGHTS)]
    for path in paths:
        read = read_adapter(path, adapter.models, adapter.base_statistics)
        for component in adapter.models:
            found = dict(read.get(component, {}))
            for layer, update in adapter.updates(component):
                if layer not in found:
                    raise ValueError(f"{path} lacks {component}.{layer}: the file is not whole")
                _compare(path, f"{component}.{layer}", found.pop(layer), update)
            if found:
                raise ValueError(f"{path} has {component}.{min(found)}, and the adapter in memory has not")


def base_is_whole(model: nn.Module) -> bool:
    """Whether this process holds the frozen weights themselves: not parts of them, nor 8 bits of them."""
    return all(type(parameter.data) is torch.Tensor for parameter in model.parameters())


def _compare(path: Path, layer: str, found: Update, live: Update) -> None:
    size = float(live.weight().norm())
    error = float((found.weight() - live.weight()).norm()) / max(size, 1e-12)
    if size > 0 and not error <= TOLERANCE:
        raise ValueError(f"{path} read back differs from the adapter in memory by {error:.1e} at {layer}")
