"""Sample pictures: one function for the commands, the gallery, the scores and the trainer's validation images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from tqdm.auto import tqdm

from inference.prediction import guidance_rescale_for
from inference.tokens import spell_out
from settings.sampling import check_sampling

PromptEmbeds = dict[str, torch.Tensor]  # keyword arguments of the pipeline, for one prompt


@dataclass(frozen=True)
class GeneratedImage:
    prompt: str
    seed: int
    image: Image.Image | np.ndarray | torch.Tensor  # PIL, (H, W, 3) in [0, 1], or (C, H, W), as output_type says
    scale: float | None = None  # of the adapters, where it is known
    command: str | None = None  # draws it again, where it is known


@dataclass(frozen=True)
class Refiner:
    """SDXL's second model, which takes over for the last steps (SDXL, arXiv 2307.01952, section 2.5)."""

    pipeline: StableDiffusionXLImg2ImgPipeline
    start: float = 0.8  # share of the steps that the base takes


def encode_prompts(
    pipeline: StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
    clip_skip: int = 0,
) -> dict[str, PromptEmbeds]:
    """Each prompt's embeddings, for `generate_images` on a pipeline whose text encoders will be gone by then.

    Prompts are encoded one by one, because a batched matrix product rounds differently from a single one.

    Args:
        clip_skip: layers of the text encoders that prompts skip, as diffusers counts: 0 is the last but one.

    Raises:
        ValueError: if a text encoder has no so many layers.

    Returns:
        prompt -> prompt_embeds (1, L, D), pooled_prompt_embeds (1, P), and both of the negative prompt.
    """
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    check_clip_skip([pipeline.text_encoder, pipeline.text_encoder_2], clip_skip)
    options = {"negative_prompt": negative_prompt, "clip_skip": clip_skip or None}
    with evaluation_mode(pipeline), torch.no_grad():
        return {
            prompt: dict(zip(names, pipeline.encode_prompt(spell_out(pipeline, prompt), **options)))
            for prompt in prompts
        }


def check_clip_skip(text_encoders: Sequence[torch.nn.Module | None], clip_skip: int) -> None:
    """Raise ValueError unless each text encoder (a refiner has one alone) has a layer that is not skipped."""
    layers = min(encoder.config.num_hidden_layers for encoder in text_encoders if encoder is not None)
    if clip_skip >= layers:
        raise ValueError(
            f"--clip_skip {clip_skip} leaves nothing of a text encoder of {layers} layers, whose last is never read: "
            f"the most is {layers - 1}"
        )


@contextmanager
def evaluation_mode(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Dropout off in every model of the pipeline, and each put back as it was."""
    training = [
        module
        for model in pipeline.components.values()
        if isinstance(model, torch.nn.Module)
        for module in model.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def generate_images(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    guidance_rescale: float | None = None,
    negative_prompt: str | None = None,
    clip_skip: int = 0,
    encoded_prompts: Mapping[str, PromptEmbeds] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    refiner: Refiner | None = None,
    output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    progress: bool | tqdm = True,
) -> Iterator[GeneratedImage]:
    """Every prompt with every seed, prompt by prompt, yielded batch by batch as they are drawn.

    Each image has its own CPU generator, seeded with its seed, which draws its first latents and any noise the
    scheduler adds; so an image depends on its prompt and seed, and not on the batch it is in or on the device. No
    global random state is read or changed, and models in training mode are put back into it after each batch.

    Args:
        guidance_rescale: phi of arXiv 2305.08891, section 3.4. None: 0.7 where the base's schedule has zero terminal
            SNR, else 0.
        clip_skip: as for `encode_prompts`.
        encoded_prompts: of `encode_prompts`, for a pipeline without text encoders; the negative prompt is in it.
        height, width: in pixels, multiples of 8. None: the size the base was trained at.
        batch_size: images at a time; a memory setting, without effect on the images.
        refiner: draws the last steps; it has text encoders of its own, which know no adapter and no new word.
        progress: show a bar over all images, or count them on a bar of the caller's.

    Raises:
        ValueError: a value out of range (at the call, before anything is drawn).
    """
    prompts, seeds = list(prompts), list(seeds)
    native_size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    height, width = height or native_size, width or native_size
    check_sampling(prompts, seeds, num_inference_steps, guidance_scale, height, width, batch_size)
    if encoded_prompts is not None:
        if negative_prompt is not None:
            raise ValueError("encoded_prompts hold their negative prompt: pass it to encode_prompts instead")
        if missing := [prompt for prompt in prompts if prompt not in encoded_prompts]:
            raise ValueError(f"encoded_prompts lack {missing[0]!r}: encode every prompt")
    return _generate_batches(
        pipeline,
        [(prompt, seed) for prompt in prompts for seed in seeds],
        {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale_for(pipeline.scheduler)
            if guidance_rescale is None
            else guidance_rescale,
            "height": height,
            "width": width,
            "output_type": output_type,
        },
        lambda: encoded_prompts or encode_prompts(pipeline, prompts, negative_prompt, clip_skip),
        batch_size,
        progress,
        refiner,
        lambda: encode_prompts(refiner.pipeline, prompts, negative_prompt) if refiner else {},
    )


def _generate_batches(
    pipeline: StableDiffusionXLPipeline,
    requests: list[tuple[str, int]],
    call_options: dict[str, Any],
    encode: Callable[[], Mapping[str, PromptEmbeds]],
    batch_size: int,
    progress: bool | tqdm,
    refiner: Refiner | None,
    encode_for_refiner: Callable[[], Mapping[str, PromptEmbeds]],
) -> Iterator[GeneratedImage]:
    own_bar = isinstance(progress, bool)
    bar = tqdm(total=len(requests), unit="image", disable=not progress) if own_bar else progress
    scale = pipeline.vae_scale_factor
    latents_shape = (pipeline.unet.config.in_channels, call_options["height"] // scale, call_options["width"] // scale)
    pipeline.set_progress_bar_config(disable=True)  # one bar over the images, not one over the steps of each batch
    as_pil = call_options["output_type"] == "pil"
    call_options = call_options | ({"output_type": "np"} if as_pil else {})  # which can be checked
    base_options = call_options
    if refiner:
        refiner.pipeline.set_progress_bar_config(disable=True)
        base_options = call_options | {"output_type": "latent", "denoising_end": refiner.start}
    try:
        encoded, encoded_for_refiner = encode(), encode_for_refiner()
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
            # (B, 4, H/8, W/8): drawn in fp32 and then cast, so that fp16 and fp32 runs start from the same noise
            latents = torch.stack([torch.randn(latents_shape, generator=generator) for generator in generators])
            try:
                with evaluation_mode(pipeline):
                    images = pipeline(
                        **_stack([encoded[prompt] for prompt, _ in batch]),
                        generator=generators,
                        latents=latents.to(pipeline.unet.dtype),
                        **base_options,
                    ).images
                if refiner:
                    names = (
                        "num_inference_steps",
                        "guidance_scale",
                        "guidance_rescale",
                        "output_type",
                    )  # the size is the latents'
                    images = refiner.pipeline(
                        **_stack([encoded_for_refiner[prompt] for prompt, _ in batch]),
                        image=images,
                        denoising_start=refiner.start,
                        generator=generators,
                        **{name: call_options[name] for name in names},
                    ).images
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory at batch_size={batch_size} and {call_options['width']}×{call_options['height']}: "
                    "lower the batch size or the image size"
                ) from error
            for (prompt, seed), image in zip(batch, images):
                check_finite(image, prompt, seed)
            finished = pipeline.image_processor.numpy_to_pil(images) if as_pil else images
            for (prompt, seed), image in zip(batch, finished):
                yield GeneratedImage(prompt, seed, image)
            bar.update(len(batch))
    finally:
        if own_bar:
            bar.close()


def check_finite(image: np.ndarray | torch.Tensor, prompt: str, seed: int) -> None:
    """Refuse a picture that is none: as PIL's it would be black.

    Raises:
        ValueError: it has values that are not finite.
    """
    if not bool(torch.as_tensor(image).isfinite().all()):
        raise ValueError(
            f"the picture of {prompt!r} with seed {seed} has values that are not finite: lower the adapter's scale, or "
            "draw in float32 (--dtype fp32) or with another --vae"
        )


def _stack(embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """One batch of several prompts' embeddings; SDXL's refiner has none of a first encoder, and diffusers says None."""
    return {
        name: None if value is None else torch.cat([one[name] for one in embeds]) for name, value in embeds[0].items()
    }


def warn_of_truncated_prompts(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> None:
    """Say which prompts are longer than the text encoders read; diffusers cuts them off."""
    for prompt in prompts:
        tokens = len(pipeline.tokenizer(spell_out(pipeline, prompt)).input_ids)
        limit = pipeline.tokenizer.model_max_length
        if tokens > limit:
            print(f"warning: prompt {prompt!r} has {tokens} tokens, the base reads the first {limit}", file=sys.stderr)
