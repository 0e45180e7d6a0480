"""Every random draw as a function of (seed, step, sample): two runs that share them differ in the method alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from .encode import EncodedImages

# Which kind of picture a draw is for; part of its key, so that class images don't repeat the instance images' noise.
INSTANCE, CLASS, CALIBRATION = range(3)


class Batch(NamedTuple):
    """What the UNet sees but for the text."""

    latents: torch.Tensor  # (B, 4, h, w)
    noise: torch.Tensor  # (B, 4, h, w)
    timesteps: torch.Tensor  # (B,)
    time_ids: torch.Tensor  # (B, 6)


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, so that draws agree between devices and after a restart."""
    low, high = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed((int(high) << 32 | int(low)) % 2**63)


def picture_at(seed: int, stream: int, position: int, count: int) -> int:
    """Which of ``count`` pictures the ``position``-th sample of a run shows: each once an epoch, in a new order."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=generator_for(seed, stream, 0, epoch))[place])


def draw_batch(
    images: EncodedImages,
    *,
    seed: int,
    stream: int,
    step: int,
    slots: range,
    slots_per_step: int,
    num_train_timesteps: int,
) -> Batch:
    """The samples in the given slots of a step: picture, mirror, latent sample, timestep and noise.

    Args:
        slots: which of the step's ``slots_per_step`` samples, over all processes and accumulated batches, are wanted.
    """
    rows = []
    for slot in slots:
        row = picture_at(seed, stream, step * slots_per_step + slot, len(images))
        generator = generator_for(seed, stream, 1, step, slot)
        variant = int(torch.randint(images.variants, (), generator=generator))
        timestep = torch.randint(num_train_timesteps, (), generator=generator)
        mean, std = images.mean[row, variant], images.std[row, variant]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        rows.append(Batch(latents, noise, timestep, images.time_ids[row]))
    return Batch(*(torch.stack(column) for column in zip(*rows)))


def training_batch(streams: Mapping[int, EncodedImages], device: torch.device, **draw) -> Batch:
    """One batch of every stream, one after the other: instance images first, then class images.

    Args:
        streams: INSTANCE and, with prior preservation, CLASS -> their pictures.
        draw: what `draw_batch` takes besides.
    """
    batches = [draw_batch(images, stream=stream, **draw) for stream, images in streams.items()]
    return Batch(*(torch.cat(column).to(device) for column in zip(*batches)))
