"""The denoising loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin

from .draws import Batch


def training_scheduler(base_scheduler: SchedulerMixin) -> DDPMScheduler:
    """The base's noise schedule for training, whatever sampler it ships with.

    Raises:
        ValueError: if the base predicts something that can't be trained here.
    """
    scheduler = DDPMScheduler.from_config(base_scheduler.config)
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"the base's scheduler has prediction_type {kind!r}: epsilon and v_prediction can be trained")
    return scheduler


def training_target(scheduler: DDPMScheduler, batch: Batch) -> torch.Tensor:
    """What the UNet should predict, (B, 4, h, w): the noise, or the velocity (arXiv 2202.00512, appendix D)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    return batch.noise


def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, prior_loss_weight: float | None) -> torch.Tensor:
    """Mean squared error; with class images as the second half of the batch, theirs is added with a weight.

    ``L = mse(instance) + prior_loss_weight * mse(class)`` (DreamBooth, arXiv 2208.12242, Eq. 2).
    """
    prediction, target = prediction.float(), target.float()  # fp32: a sum over a latent overflows in fp16
    if prior_loss_weight is None:
        return F.mse_loss(prediction, target)
    (instance, prior), (instance_target, prior_target) = prediction.chunk(2), target.chunk(2)
    return F.mse_loss(instance, instance_target) + prior_loss_weight * F.mse_loss(prior, prior_target)
