"""A pipeline as the flags of a command say: its base, adapters' base, device, precision, scheduler and refiner."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from inference.adapter_files import recorded_base, recorded_config, recorded_downloads
from inference.base import (
    check_base,
    check_device,
    check_xformers,
    default_device,
    default_dtype,
    load_pipeline,
    load_refiner,
    make_scheduler,
)
from inference.load import adapted_components
from inference.prediction import Prediction, asked_prediction, prediction_of
from inference.sampling import Refiner
from settings.sampling import PREDICTION_OPTIONS, GenerateConfig, SamplingConfig

Config = TypeVar("Config", bound=SamplingConfig)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_hardware(config: SamplingConfig) -> None:
    """Raise ValueError unless this machine has what the flags ask for."""
    device = check_device(config.device)
    if config.enable_xformers_memory_efficient_attention:
        check_xformers(device)
    if isinstance(config, GenerateConfig) and config.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {config.offload} takes models off a GPU: leave it out on a CPU")


def choose_base(config: Config, adapter: str | None) -> Config:
    """The config with its base checked, not loaded: `--base`, or else the base as the adapter's run loaded it.

    What a single file's keys say of its predictions is said in the flags, and how many layers the adapter's prompts
    skipped in ``--clip_skip``.
    """
    if config.base:
        check_base(config.base)
    elif adapter is None:
        raise ValueError("no base: name one with --base (a diffusers folder, a .safetensors file or a Hub id)")
    else:
        recorded = recorded_config(adapter)
        predicts = {
            name: given if (given := getattr(config, name)) != default else recorded.get(name, default)
            for name, default in PREDICTION_OPTIONS.items()
        }
        loading = recorded_downloads(adapter) | config.download_options() | predicts
        config = replace(config, base=recorded_base(adapter), **loading)
    predicts = zip(PREDICTION_OPTIONS, asked_prediction(config.base, config.prediction_type, config.zero_terminal_snr))
    skipped = config.clip_skip
    if skipped is None and adapter is not None:
        skipped = recorded_config(adapter).get("clip_skip") or None
    return replace(config, clip_skip=skipped, **dict(predicts))


def torch_dtype(config: SamplingConfig) -> torch.dtype:
    """Of --dtype, or else the device's default."""
    return DTYPES[config.dtype] if config.dtype else default_dtype(check_device(config.device))


def pipeline_for(config: SamplingConfig) -> StableDiffusionXLPipeline:
    """The base of the flags, with their autoencoder, scheduler and attention."""
    pipeline = load_pipeline(
        config.base, torch_dtype(config), config.load_device, config.vae, **config.loading_options()
    )
    if (predicts := prediction_of(pipeline.scheduler)) != Prediction("epsilon", False):
        print(f"base: predicts {predicts.said}")
    if config.scheduler:
        pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler)
    if config.enable_xformers_memory_efficient_attention:
        pipeline.enable_xformers_memory_efficient_attention()
    return pipeline


def refiner_for(config: SamplingConfig, pipeline: StableDiffusionXLPipeline) -> Refiner | None:
    """The refiner of the flags; None without ``--refiner``."""
    if not config.refiner:
        return None
    refiner = load_refiner(config.refiner, pipeline, torch_dtype(config), config.load_device)
    if config.enable_xformers_memory_efficient_attention:
        refiner.enable_xformers_memory_efficient_attention()
    return Refiner(refiner, config.refiner_start)


def merge_and_offload(
    config: GenerateConfig, pipeline: StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline
) -> None:
    """`--fuse` and `--offload`, once the adapters are on: hooks on a module don't follow it into an adapter's layer."""
    if config.fuse and (parts := adapted_components(pipeline)):
        pipeline.fuse_lora(components=parts)
    if config.offload == "model":
        pipeline.enable_model_cpu_offload(device=config.device or default_device())
    elif config.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=config.device or default_device())
