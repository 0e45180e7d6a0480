"""Pictures that a run draws: of the class, before training, and of the subject, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import free_memory
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from dreambooth.data import Concept
from dreambooth.prior import class_image_name
from inference.base import default_dtype, load_pipeline
from inference.manifest import image_names
from inference.sampling import GeneratedImage, generate_images
from settings.training import TrainConfig
from storage.files import write_atomic
from storage.pictures import png_bytes
from trainer.accelerator import PRECISIONS, log_images
from trainer.sharding import SplittingAccelerator


class Sample(NamedTuple):
    prompt: str
    file: str  # name of the PNG
    image: Image.Image


def load_base(
    config: TrainConfig, accelerator: Accelerator, dtype: torch.dtype, **parts: None
) -> StableDiffusionXLPipeline:
    """The frozen base, its autoencoder in fp32 as in diffusers' script; parts that are said to be None are left out."""
    pipeline = load_pipeline(
        config.pretrained_model_name_or_path,
        dtype,
        accelerator.device,
        config.pretrained_vae_model_name_or_path,
        vae_dtype=torch.float32,
        **config.download_options(),
        **parts,
    )
    if config.enable_xformers_memory_efficient_attention:
        pipeline.enable_xformers_memory_efficient_attention()
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False)
    return pipeline


def draw_class_images(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: StableDiffusionXLPipeline,
    concept: Concept,
    seeds: Sequence[int],
) -> None:
    """The base's own pictures of a subject's class, with the given seeds, into its folder.

    Where they are not drawn in fp32 throughout, the base is loaded once more for them.
    """
    if not seeds:
        return
    precision = config.prior_generation_precision
    dtype = PRECISIONS[precision] if precision else default_dtype(accelerator.device)
    drawing = pipeline
    if not pipeline.unet.dtype == dtype == pipeline.vae.dtype:
        pipeline.to("cpu")  # two of SDXL are too much for most GPUs
        drawing = load_pipeline(
            config.pretrained_model_name_or_path,
            dtype,
            accelerator.device,
            config.pretrained_vae_model_name_or_path,
            **config.download_options(),
        )
    folder = Path(concept.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(seeds), desc="class images", unit="image", disable=not accelerator.is_main_process)
    options = {"num_inference_steps": config.num_inference_steps, "batch_size": config.sample_batch_size}
    for image in generate_images(drawing, [concept.class_prompt], seeds, progress=bar, **options):
        write_atomic(folder / class_image_name(concept.class_prompt, image.seed), png_bytes(image.image))
    if drawing is not pipeline:
        drawing = None
        free_memory()
        pipeline.to(accelerator.device)


def draw_samples(
    config: TrainConfig, accelerator: Accelerator, parts: dict[str, Any], dtype: torch.dtype
) -> list[Sample]:
    """The validation images, by the adapter as it is now."""
    seeds = range(config.seed, config.seed + config.num_validation_images)
    names = image_names(config.validation_prompt)
    drawn = draw_pictures(config, accelerator, parts, dtype, config.validation_prompt, seeds)
    return [Sample(one.prompt, f"{names[one.prompt]}-seed{one.seed}.png", one.image) for one in drawn]


def draw_pictures(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: dict[str, Any],
    dtype: torch.dtype,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[GeneratedImage]:
    """Pictures by the adapter as it is now: inference's own function, on the live modules. For the main process only.

    Args:
        parts: of the pipeline, by name: what is trained, and the tokenizers, which may know a new word.
    """
    everyone_draws = isinstance(accelerator, SplittingAccelerator)  # each has a part of the base that the others need
    if not seeds or not (accelerator.is_main_process or everyone_draws):
        return []
    # What is frozen is loaded anew, because it was freed after encoding. The trained models are put in afterwards:
    # load_pipeline casts all it holds, and their adapters must stay fp32.
    pipeline = load_base(config, accelerator, dtype, **dict.fromkeys(parts))
    pipeline.register_modules(**parts)
    bar = tqdm(total=len(prompts) * len(seeds), desc="samples", unit="image", disable=not accelerator.is_main_process)
    options = {"num_inference_steps": config.num_inference_steps, "batch_size": config.sample_batch_size}
    # What is trained computes in mixed precision by itself, and gives the autoencoder fp32.
    drawn = list(generate_images(pipeline, prompts, seeds, progress=bar, **options))
    return drawn if accelerator.is_main_process else []


def keep_samples(accelerator: Accelerator, samples: Sequence[Sample], folder: Path, step: int) -> None:
    """Write the pictures into the folder and to the trackers."""
    for sample in samples:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / sample.file, png_bytes(sample.image))
    if samples:
        log_images(accelerator, {sample.file: sample.image for sample in samples}, step)
