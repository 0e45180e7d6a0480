"""Pictures that a run draws: of the class, before training, and of the subject, to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import free_memory
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from dreambooth.data import Concept, content_hash
from dreambooth.prepare import Pictures, read_class_pictures
from dreambooth.prior import class_image_name, missing_seeds
from inference.base import default_dtype, load_pipeline
from inference.manifest import image_names
from inference.sampling import GeneratedImage, generate_images
from settings.base import BaseOptions
from settings.pictures import PriorOptions
from storage.files import write_atomic
from storage.pictures import drawn_here, png_bytes
from trainer.accelerator import PRECISIONS, log_images
from trainer.sharding import SplittingAccelerator


class Sample(NamedTuple):
    prompt: str
    seed: int
    file: str  # name of the PNG
    image: Image.Image


@dataclass(frozen=True)
class Base:
    """The frozen base, to be loaded as often as pictures are drawn.

    Args:
        options: which one.
        dtype: of its parts but the autoencoder, which is in fp32 as in diffusers' script.
    """

    options: BaseOptions
    device: torch.device
    dtype: torch.dtype
    xformers: bool = False

    def load(self, **parts: None) -> StableDiffusionXLPipeline:
        """The pipeline, nothing in it trainable; parts that are said to be None are left out."""
        pipeline = self._load(self.dtype, vae_dtype=torch.float32, **parts)
        if self.xformers:
            pipeline.enable_xformers_memory_efficient_attention()
        for model in pipeline.components.values():
            if isinstance(model, nn.Module):
                model.requires_grad_(False)
        return pipeline

    def load_for_drawing(self, dtype: torch.dtype) -> StableDiffusionXLPipeline:
        """The pipeline in one precision throughout."""
        return self._load(dtype)

    def _load(self, dtype: torch.dtype, **options: Any) -> StableDiffusionXLPipeline:
        name, vae = self.options.pretrained_model_name_or_path, self.options.pretrained_vae_model_name_or_path
        return load_pipeline(name, dtype, self.device, vae, **options, **self.options.loading_options())


def draw_class_images(
    accelerator: Accelerator,
    base: Base,
    pipeline: StableDiffusionXLPipeline,
    pictures: Pictures,
    prior: PriorOptions,
    num_inference_steps: int,
) -> Pictures:
    """Draw the class images that are missing, each process its share; returns the pictures with all of them.

    Where they are not drawn in fp32 throughout, the base is loaded once more for them.
    """
    if not prior.draws_class_images:
        return pictures
    precision = prior.prior_generation_precision
    dtype = PRECISIONS[precision] if precision else default_dtype(accelerator.device)
    for concept in pictures.concepts:
        seeds = missing_seeds(concept.class_data_dir, concept.class_prompt, prior.num_class_images)
        accelerator.wait_for_everyone()  # all have looked before the first writes
        share = seeds[accelerator.process_index :: accelerator.num_processes]
        if share:
            with _drawing(base, pipeline, dtype) as drawing:
                sizes = prior.sample_batch_size, num_inference_steps, base.options.clip_skip
                _draw_class(drawing, concept, share, *sizes, accelerator)
        accelerator.wait_for_everyone()
    return replace(pictures, classes=read_class_pictures(prior, pictures.concepts))


@contextmanager
def _drawing(
    base: Base, pipeline: StableDiffusionXLPipeline, dtype: torch.dtype
) -> Iterator[StableDiffusionXLPipeline]:
    """The pipeline itself, or one of that precision while the other waits."""
    if pipeline.unet.dtype == dtype == pipeline.vae.dtype:
        yield pipeline
        return
    pipeline.to("cpu")  # two of SDXL are too much for most GPUs
    drawing = base.load_for_drawing(dtype)
    yield drawing
    drawing = None
    free_memory()
    pipeline.to(base.device)


def _draw_class(
    pipeline: StableDiffusionXLPipeline,
    concept: Concept,
    seeds: Sequence[int],
    batch_size: int,
    num_inference_steps: int,
    clip_skip: int,
    accelerator: Accelerator,
) -> None:
    folder = Path(concept.class_data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(seeds), desc="class images", unit="image", disable=not accelerator.is_main_process)
    options = {"num_inference_steps": num_inference_steps, "batch_size": batch_size, "clip_skip": clip_skip}
    for image in generate_images(pipeline, [concept.class_prompt], seeds, progress=bar, **options):
        write_atomic(folder / class_image_name(concept.class_prompt, image.seed), png_bytes(image.image))


class Sampler:
    """Draws by the adapter as it is now: inference's own function, on the live modules.

    Args:
        parts: of the pipeline, by name: what is trained, and the tokenizers, which may know a new word.
    """

    def __init__(
        self, accelerator: Accelerator, base: Base, parts: dict[str, Any], num_inference_steps: int, batch_size: int
    ) -> None:
        self.accelerator, self.base, self.parts = accelerator, base, parts
        self.options = {"num_inference_steps": num_inference_steps, "batch_size": batch_size}
        self.options["clip_skip"] = base.options.clip_skip

    def samples(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Sample]:
        """Pictures with names for files; none but in the main process."""
        names = image_names(prompts)
        drawn = self.draw(prompts, seeds)
        return [Sample(one.prompt, one.seed, f"{names[one.prompt]}-seed{one.seed}.png", one.image) for one in drawn]

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GeneratedImage]:
        """Every prompt with every seed; none but in the main process."""
        # each process has a part of a split base that the others need
        everyone_draws = isinstance(self.accelerator, SplittingAccelerator)
        if not seeds or not (self.accelerator.is_main_process or everyone_draws):
            return []
        # What is frozen is loaded anew, because it was freed after encoding. The trained models are put in afterwards:
        # loading casts all it holds, and their adapters must stay fp32.
        pipeline = self.base.load(**dict.fromkeys(self.parts))
        pipeline.register_modules(**self.parts)
        silent = not self.accelerator.is_main_process
        bar = tqdm(total=len(prompts) * len(seeds), desc="samples", unit="image", disable=silent)
        # What is trained computes in mixed precision by itself, and gives the autoencoder fp32.
        drawn = list(generate_images(pipeline, prompts, seeds, progress=bar, **self.options))
        return drawn if self.accelerator.is_main_process else []


def keep_samples(accelerator: Accelerator, samples: Sequence[Sample], folder: Path, step: int) -> list[Sample]:
    """Write the pictures into the folder and to the trackers; returns them with the names that they have there.

    Each PNG says its prompt, seed and step: the run's page is made of them.

    A picture of the user's that has a sample's name stays, and the sample gets another.
    """
    kept = []
    for sample in samples:
        folder.mkdir(parents=True, exist_ok=True)
        text = {"prompt": sample.prompt, "seed": str(sample.seed), "step": str(step)}
        data, name = png_bytes(sample.image, text), sample.file
        if os.path.lexists(folder / name) and not drawn_here(folder / name):
            name = f"{Path(name).stem}-{content_hash(data)[:8]}.png"
        write_atomic(folder / name, data)
        kept.append(sample._replace(file=name))
    if kept:
        log_images(accelerator, {sample.file: sample.image for sample in kept}, step)
    return kept
