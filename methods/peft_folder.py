"""Plain LoRA folders of PEFT, for updates that were made of something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from methods.update import Update
from storage.tensors import write_safetensors


def write_lora_folder(folder: Path, updates: Mapping[str, Update]) -> None:
    """adapter_config.json and adapter_model.safetensors of the updates, by module path; alpha is each layer's rank."""
    common = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
    others = {name: update.rank for name, update in updates.items() if update.rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(updates),
        rank_pattern=others,
        alpha_pattern=others,
        inference_mode=True,
    )
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.up
    write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))
