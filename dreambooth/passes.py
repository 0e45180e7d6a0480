"""The forward passes during which an adapter method measures activations: pictures × timesteps, prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from dreambooth.draws import CALIBRATION, fixed_batches
from dreambooth.encode import EncodedPicture, EncodedPrompts
from dreambooth.loss import Objective
from methods.base_passes import PROMPTS

SAMPLES_PER_PASS = 4
# Everyday captions beside the user's own: the text encoders' statistics should not rest on one sentence.
GENERIC_PROMPTS = ("a photo", *PROMPTS[:-1])


@torch.no_grad()
def run_unet_passes(
    unet: UNet2DConditionModel,
    pictures: Sequence[EncodedPicture],
    prompts: EncodedPrompts,
    unconditional: EncodedPrompts,
    objective: Objective,
    *,
    passes: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Denoise noised pictures at stratified timesteps, half with their prompt and half without any.

    Which samples these are depends on ``passes`` and ``seed`` alone: not on the batch nor on the number of processes.

    Args:
        unconditional: one row.
        passes: of SAMPLES_PER_PASS samples each; they are run in batches that are shared out among the processes.
    """
    total = passes * SAMPLES_PER_PASS
    table = EncodedPrompts(*(torch.cat(pair) for pair in zip(prompts, unconditional)))
    nothing = len(prompts.prompt_embeds)  # the row of the empty prompt
    for start in range(process_index * batch_size, total, num_processes * batch_size):
        slots = range(start, min(start + batch_size, total))
        for batch in fixed_batches(
            pictures,
            seed=seed,
            stream=CALIBRATION,
            slots=slots,
            total=total,
            num_train_timesteps=objective.num_train_timesteps,
        ):
            batch = batch.to(unet.device)
            # Neighbouring strata take turns with and without the prompt, so both see the whole schedule.
            even = batch.timesteps * total // objective.num_train_timesteps % 2 == 0
            text = table.rows(torch.where(even, batch.prompts, nothing))
            noisy_latents, timesteps = objective.model_input(batch)
            unet(
                noisy_latents.to(unet.dtype),
                timesteps,
                text.prompt_embeds,
                added_cond_kwargs={"text_embeds": text.pooled_prompt_embeds, "time_ids": batch.time_ids},
            )
