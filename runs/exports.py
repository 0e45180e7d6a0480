"""The files that a run leaves of what it learned, each read back and compared before the run calls itself done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from torch import nn

from methods.adapter import Adapter
from methods.components import EMBEDDINGS, ENCODERS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from methods.files import KOHYA_WEIGHTS, PEFT_FOLDER, save_files
from runs.record import LOSS_PLOT, MODEL_CARD
from storage.tensors import write_safetensors

# What a finished run leaves.
WEIGHTS = (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS, EMBEDDINGS, PEFT_FOLDER)
RESULTS = (RUN_RECORD, MODEL_CARD, LOSS_PLOT, *WEIGHTS)


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


def check_files(adapter: Adapter, folder: Path, files: list[str]) -> None:
    """Read the files back as a user would; the lead's placeholder until reading is merged."""
