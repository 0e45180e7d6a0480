"""A loss that can be compared between steps and runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from dreambooth.draws import VALIDATION, fixed_batches
from dreambooth.encode import EncodedPicture, EncodedPrompts
from dreambooth.loss import Objective

SAMPLES = 64
SEED = 20_231_115  # not the run's: every run is measured on the same noise


@torch.no_grad()
def validation_loss(
    unet: UNet2DConditionModel,
    pictures: Sequence[EncodedPicture],
    prompts: EncodedPrompts,
    objective: Objective,
    batch_size: int,
    samples: int = SAMPLES,
) -> float:
    """Mean loss over ``samples`` fixed draws: every stratum of the timesteps once, the same noise in every run."""
    training, total = unet.training, 0.0
    unet.eval()
    for first in range(0, samples, batch_size):
        for batch in fixed_batches(
            pictures,
            seed=SEED,
            stream=VALIDATION,
            slots=range(first, min(first + batch_size, samples)),
            total=samples,
            num_train_timesteps=objective.num_train_timesteps,
        ):
            batch = batch.to(unet.device)
            text = prompts.rows(batch.prompts)
            noisy_latents, timesteps = objective.model_input(batch)
            prediction = unet(
                noisy_latents.to(unet.dtype),
                timesteps,
                text.prompt_embeds,
                added_cond_kwargs={"text_embeds": text.pooled_prompt_embeds, "time_ids": batch.time_ids},
            ).sample
            total += objective.loss(prediction, batch, num_instances=1).item()
    unet.train(training)
    return total / samples
