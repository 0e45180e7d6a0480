"""What a run leaves behind besides the weights: run.json and the model card."""

from __future__ import annotations

import hashlib
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from .config import TrainConfig

RECORD_VERSION = 1
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
_CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def module_fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's parameters: names, dtypes, shapes and bytes. Taken before anything is injected."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def peak_memory_mb() -> float:
    """Largest memory in use so far, MiB: the GPU allocator's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)  # bytes there, KiB on Linux


def run_record(
    config: TrainConfig,
    *,
    base_fingerprints: Mapping[str, str],
    trainable_parameters: Mapping[str, int],
    timings: Mapping[str, float],
    files: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    num_processes: int,
) -> dict[str, Any]:
    """run.json: what is needed to understand, compare and repeat the run.

    Args:
        base_fingerprints, trainable_parameters: by component (unet, text_encoder, text_encoder_2).
        timings: seconds.
        files: name -> bytes.
    """
    return {
        "record_version": RECORD_VERSION,
        "method": config.method,
        "config": asdict(config),
        "seed": config.seed,
        "base_fingerprints": dict(base_fingerprints),
        "trainable_parameters": sum(trainable_parameters.values()),
        "trainable_parameters_by_component": dict(trainable_parameters),
        "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "files": dict(files),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "num_processes": num_processes,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def model_card(record: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> str:
    """The adapter's README.md, with the metadata that the Hugging Face Hub reads.

    Args:
        samples: prompt and image file, relative to the card.
    """
    config = record["config"]
    data = ModelCardData(
        base_model=config["pretrained_model_name_or_path"],
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "lora", "dreambooth", "stable-diffusion-xl", record["method"]],
        instance_prompt=config["instance_prompt"],
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in samples],
    )
    return str(ModelCard.from_template(data, template_path=str(_CARD_TEMPLATE), record=record, samples=list(samples)))
