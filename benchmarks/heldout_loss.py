"""The denoising loss on pictures of a subject that an adapter was not trained on: does it know the subject?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth.data import folder_examples
from dreambooth.encode import (
    CropSettings,
    EncodedPicture,
    EncodedPrompts,
    cut_picture,
    encode_pictures,
    encode_prompts,
    inspect_picture,
    tokenize,
)
from dreambooth.encoded_cache import EncodedCache
from dreambooth.loss import Objective
from dreambooth.validation import validation_loss

BATCH = 32
SUBJECTS = Path(__file__).parent.parent / "assets" / "subjects"


@torch.no_grad()
def encode_folder(
    pipeline: StableDiffusionXLPipeline, folder: Path, prompt: str
) -> tuple[list[EncodedPicture], EncodedPrompts]:
    """The folder's pictures, whole, and their captions, or the prompt where there is none beside a picture."""
    resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    settings = CropSettings([(resolution, resolution)], center_crop=True, variants=1)
    examples = folder_examples(folder, prompt, flag="subject")
    cuts = [cut_picture(inspect_picture(example), settings) for example in examples]
    captions = list(dict.fromkeys(example.prompt for example in examples))
    numbers = [captions.index(example.prompt) for example in examples]
    with tempfile.TemporaryDirectory() as cache:
        pictures = encode_pictures(pipeline.vae, "", cuts, numbers, settings, EncodedCache(cache))
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], captions)
    prompts = encode_prompts([pipeline.text_encoder, pipeline.text_encoder_2], tokens)
    return pictures, prompts


def heldout_loss(pipeline: StableDiffusionXLPipeline, folder: Path, prompt: str, samples: int = 256) -> float:
    """Mean squared error of the noise (or velocity) prediction over ``samples`` draws from the folder's pictures."""
    pictures, prompts = encode_folder(pipeline, folder, prompt)
    return validation_loss(pipeline.unet, pictures, prompts, Objective(pipeline.scheduler), BATCH, samples)
