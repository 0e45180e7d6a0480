"""The files that a run leaves of what it learned, each read back and compared before the run calls itself done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from torch import nn

from methods.adapter import Adapter
from methods.components import EMBEDDINGS, ENCODERS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from methods.files import KOHYA_WEIGHTS, PEFT_FOLDER, save_files, save_kohya, tools_file
from methods.reading import read_adapter
from methods.update import Update
from runs.record import LOSS_PLOT, MODEL_CARD, RUN_PAGE
from runs.tools_header import METHOD_KEY
from storage.files import check_own_output
from storage.tensors import read_safetensors_header, write_safetensors

# Relative. Files hold what is live in fp32, and differ by how a product is rounded; those in half precision by more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# What a finished run leaves, beside the `tools_file` of its folder.
WEIGHTS = (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS, EMBEDDINGS, PEFT_FOLDER)
RESULTS = (RUN_RECORD, MODEL_CARD, LOSS_PLOT, RUN_PAGE, *WEIGHTS)


def results(folder: Path) -> list[str]:
    """Names of the files and folders that a finished run leaves in its folder."""
    return [*RESULTS, tools_file(folder)]


def save_adapter(
    adapter: Adapter,
    models: Mapping[str, nn.Module],
    folder: Path,
    *,
    new_word: str | None = None,
    peft: bool = False,
) -> list[str]:
    """Write the adapter's files, and the embeddings of a new word; returns their names.

    Args:
        models: component name -> model with what learned inside.
        new_word: what the new tokens stand for, where there are any.
        peft: as for `save_files`.
    """
    names = save_files(adapter, folder, peft=peft)
    if new_word is not None:
        write_safetensors(folder / EMBEDDINGS, new_embeddings(models), {"word": new_word})
        names.append(EMBEDDINGS)
    return names


def check_tools_file(folder: Path) -> None:
    """Raise ValueError if the place of the `tools_file` is taken by something that no run wrote."""

    def own(path: Path) -> bool:
        return METHOD_KEY in read_safetensors_header(path, "file")[0]

    check_own_output(folder / tools_file(folder), f"--output_dir {folder}", "file of a run", own)


def save_tools_file(adapter: Adapter, folder: Path, header: Mapping[str, str], dtype: torch.dtype) -> str:
    """Write the file for drawing programs; returns its name.

    Args:
        header: see `tools_header`.
    """
    name = tools_file(folder)
    save_kohya(adapter, folder / name, header, dtype)
    return name


def new_embeddings(models: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """(tokens, d) of the words that each text encoder learned, by diffusers' names for the two."""
    embeddings = {}
    for key, (encoder, _) in ENCODERS.items():
        state = get_peft_model_state_dict(models[encoder], save_embedding_layers=False)
        embeddings[key] = next(value for name, value in state.items() if "trainable_tokens_delta" in name).float()
    return embeddings


@torch.no_grad()
def check_files(adapter: Adapter, folder: Path, files: Sequence[str], tools_dtype: torch.dtype = torch.float16) -> None:
    """Read the files back as a user's pipeline does, and compare each layer's ΔW with the live one.

    On a base that is split or in 8 bits only LoRA files are, which can be read without the base's own weights.

    Args:
        files: names of those that were written, in the folder.
        tools_dtype: of the `tools_file`.

    Raises:
        ValueError: naming the file and the layer that differ.
    """
    tools = tools_file(folder)
    paths = [folder / name for name in (FOLDED_WEIGHTS, INNER_WEIGHTS, tools) if name in files]
    if any(name.startswith(f"{PEFT_FOLDER}/") for name in files):
        paths.append(folder / PEFT_FOLDER)
    if not all(base_is_whole(model) for model in adapter.models.values()):
        if not adapter.method.low_rank:
            return
        paths = [path for path in paths if path.name in (FOLDED_WEIGHTS, tools)]
    for path in paths:
        read = read_adapter(path, adapter.models, adapter.base_statistics)
        for component in adapter.models:
            found = dict(read.get(component, {}))
            for layer, update in adapter.updates(component):
                if layer not in found:
                    raise ValueError(f"{path} lacks {component}.{layer}: the file is not whole")
                dtype = tools_dtype if path.name == tools else torch.float32
                _compare(path, f"{component}.{layer}", found.pop(layer), update, TOLERANCES[dtype])
            if found:
                raise ValueError(f"{path} has {component}.{min(found)}, and the adapter in memory has not")


def base_is_whole(model: nn.Module) -> bool:
    """Whether this process holds the frozen weights themselves: not parts of them, nor 8 bits of them."""
    return all(type(parameter.data) is torch.Tensor for parameter in model.parameters())


def _compare(path: Path, layer: str, found: Update, live: Update, tolerance: float) -> None:
    size = float(live.weight().norm())
    # factors may cancel to nothing, as those of a PiSSA layer do that learned nothing: what rounds is no difference
    noise = torch.finfo(torch.float32).eps * float(live.up.norm() * live.down.norm())
    error = max(0.0, float((found.weight() - live.weight()).norm()) - noise) / max(size, 1e-12)
    if size > 0 and not error <= tolerance:
        raise ValueError(f"{path} read back differs from the adapter in memory by {error:.1e} at {layer}")
