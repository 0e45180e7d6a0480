"""The forward passes in which a base is measured by itself: pictures that it draws, prompts of every kind.

A function of the base alone: not of a run's pictures, prompts, resolution, batch, processes or new words.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from methods.base_statistic import base_identity, base_in_float32
from methods.components import TEXT_ENCODERS
from nora import calibration_mask

# Part of every file that relies on it: another list, schedule or size needs another name.
LABEL = "generic-1"
PROMPTS = (
    "a photo of a person",
    "a close-up photo of an animal in the wild",
    "an old building by the sea at night",
    "a bowl of fruit on a wooden table",
    "a red car in a city street",
    "a watercolor painting of mountains and a lake",
    "a child playing in the snow",
    "a toy robot on a white background",
)
STEPS = 4
LARGEST_SIDE = 64  # of the latents: 512 pixels on SDXL, which costs a quarter of its 1024
AT_ONCE = 4
SEED = 240810280
# What a base's own scheduler may ask for and its passes must not depend on.
PLAIN_SCHEDULE = {
    "timestep_spacing": "trailing",
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


class GenericPrompts(NamedTuple):
    """PROMPTS as a base's text encoders read them."""

    embeds: torch.Tensor  # (P, tokens, d): every other row says nothing, in the base's way
    pooled: torch.Tensor  # (P, d2)
    tokens: list[BatchEncoding]  # per text encoder
    pixels: int  # the side of the pictures that the base was trained on
    identity: str  # of the text encoders


@torch.no_grad()
def encode_generic_prompts(pipeline: StableDiffusionXLPipeline) -> GenericPrompts:
    """By the base's own text encoders, in float32: adapters on them are off."""
    text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = generic_tokens(pipeline)
    nothing = [_tokens(tokenizer, [""]) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]
    rows = []
    with ExitStack() as stack:
        for text_encoder in text_encoders:
            stack.enter_context(base_in_float32(text_encoder))
        for number in range(len(PROMPTS)):  # one by one: in a batch a kernel may round otherwise
            states = []
            for text_encoder, some, none in zip(text_encoders, tokens, nothing):
                ids = none["input_ids"] if number % 2 else some["input_ids"][number : number + 1]
                output = text_encoder(ids.to(text_encoder.device), output_hidden_states=True)
                states.append(output.hidden_states[-2])
            embeds, pooled = torch.cat(states, dim=-1), output.text_embeds  # of the second (SDXL, 2.1)
            if number % 2 and pipeline.config.force_zeros_for_empty_prompt:
                embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
            rows.append((embeds, pooled))
    embeds, pooled = map(torch.cat, zip(*rows))
    pixels = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return GenericPrompts(embeds, pooled, tokens, pixels, text_identity(pipeline))


def generic_tokens(pipeline: StableDiffusionXLPipeline) -> list[BatchEncoding]:
    """PROMPTS by each tokenizer."""
    return [_tokens(tokenizer, PROMPTS) for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> BatchEncoding:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options)


def text_identity(pipeline: StableDiffusionXLPipeline) -> str:
    """Which text encoders a pipeline has, and how it says nothing."""
    encoders = map(base_identity, (pipeline.text_encoder, pipeline.text_encoder_2))
    return "+".join([*encoders, str(bool(pipeline.config.force_zeros_for_empty_prompt))])


def run_base(component: str, model: nn.Module, generic: GenericPrompts, scheduler: SchedulerMixin) -> None:
    """The passes of LABEL through one component."""
    if component == "unet":
        run_own_pictures(model, generic, scheduler)
    else:
        run_generic_prompts(model, generic.tokens[TEXT_ENCODERS.index(component)])


@torch.no_grad()
def run_own_pictures(
    unet: UNet2DConditionModel, generic: GenericPrompts, scheduler: SchedulerMixin, seed: int = SEED
) -> None:
    """Draw a picture for each prompt in STEPS steps, every other one without the prompt; in `base_in_float32`.

    The steps are spread over all timesteps, and what the UNet sees at each is what it made itself at the one before.

    Args:
        scheduler: of the base, for its noise schedule and what the UNet predicts.
    """
    side = min(unet.config.sample_size, LARGEST_SIDE)
    pixels = generic.pixels
    count = len(generic.embeds)
    draws = np.random.RandomState(seed).standard_normal((count, unet.config.in_channels, side, side))
    noise = torch.from_numpy(draws).float().to(unet.device)
    time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=torch.float32, device=unet.device)
    for first in range(0, count, AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        embeds = generic.embeds[rows].to(unet.device)
        added = {"text_embeds": generic.pooled[rows].to(unet.device), "time_ids": time_ids.expand(len(embeds), -1)}
        sampler = _own_sampler(scheduler, unet.device)
        latents = noise[rows] * sampler.init_noise_sigma
        for timestep in sampler.timesteps:
            seen = sampler.scale_model_input(latents, timestep)
            predicted = unet(seen, timestep, embeds, added_cond_kwargs=added).sample
            latents = sampler.step(predicted, timestep, latents).prev_sample


def unet_identity(text: str, scheduler: SchedulerMixin) -> str:
    """What `run_own_pictures` depends on beside the UNet: `text_identity`, the noise levels, what the UNet predicts.

    Bases of the same weights may differ in these, and then draw other pictures.
    """
    sampler = _own_sampler(scheduler, torch.device("cpu"))
    prediction_type = sampler.config.prediction_type
    return repr((text, type(sampler).__name__, prediction_type, sampler.timesteps.tolist(), sampler.sigmas.tolist()))


def _own_sampler(scheduler: SchedulerMixin, device: torch.device) -> EulerDiscreteScheduler | EDMEulerScheduler:
    kind = EDMEulerScheduler if isinstance(scheduler, EDMEulerScheduler) else EulerDiscreteScheduler
    sampler = kind.from_config(scheduler.config, **({} if kind is EDMEulerScheduler else PLAIN_SCHEDULE))
    sampler.set_timesteps(STEPS, device=device)
    return sampler


@torch.no_grad()
def run_generic_prompts(text_encoder: nn.Module, tokens: BatchEncoding) -> None:
    """PROMPTS through one text encoder; padding doesn't count. In `base_in_float32`."""
    device = next(text_encoder.parameters()).device
    mask = tokens["attention_mask"].to(device)
    with calibration_mask(mask):
        text_encoder(tokens["input_ids"].to(device))
