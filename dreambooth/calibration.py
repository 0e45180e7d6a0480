"""The forward passes during which an adapter method measures activations: pictures × timesteps, prompts."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from .draws import CALIBRATION, training_batch
from .encode import EncodedImages, EncodedPrompts

# Everyday captions beside the user's own: the text encoders' statistics should not rest on one sentence.
GENERIC_PROMPTS = (
    "a photo",
    "a photo of a person",
    "a close-up photo of an animal in the wild",
    "an old building by the sea at night",
    "a bowl of fruit on a wooden table",
    "a red car in a city street",
    "a watercolor painting of mountains and a lake",
    "a child playing in the snow",
)


@torch.no_grad()
def run_unet_passes(
    unet: UNet2DConditionModel,
    images: EncodedImages,
    prompts: EncodedPrompts,
    unconditional: EncodedPrompts,
    scheduler: DDPMScheduler,
    *,
    passes: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Denoise noised pictures at stratified timesteps, half with the instance prompt and half without any.

    Args:
        prompts, unconditional: the instance prompt comes first in the one; the other has one row.
        passes: of ``batch_size`` samples each, shared out among the processes.
    """
    total = passes * batch_size
    num_train_timesteps = scheduler.config.num_train_timesteps
    prompt_embeds = torch.cat([prompts.prompt_embeds[:1], unconditional.prompt_embeds])  # (2, tokens, d)
    pooled_prompt_embeds = torch.cat([prompts.pooled_prompt_embeds[:1], unconditional.pooled_prompt_embeds])  # (2, d2)
    for number in range(process_index, passes, num_processes):
        slots = range(number * batch_size, (number + 1) * batch_size)
        batch = training_batch(
            {CALIBRATION: images},
            unet.device,
            seed=seed,
            step=0,
            slots=slots,
            slots_per_step=total,
            num_train_timesteps=num_train_timesteps,
        )
        # One stratum of the schedule a sample; neighbours take turns with and without the prompt, so both see it all.
        timesteps = torch.tensor(
            [int((slot + 0.5) / total * num_train_timesteps) for slot in slots], device=unet.device
        )
        rows = torch.tensor([slot % 2 for slot in slots], device=unet.device)
        unet(
            scheduler.add_noise(batch.latents, batch.noise, timesteps).to(unet.dtype),
            timesteps,
            prompt_embeds[rows],
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds[rows], "time_ids": batch.time_ids},
        )
