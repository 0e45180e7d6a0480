"""Every random draw as a function of (seed, step, sample): two runs that share them differ in the method alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dreambooth.encoded import EncodedPicture

# Which kind of picture a draw is for; part of its key, so that class images don't repeat the instance images' noise.
INSTANCE, CLASS, CALIBRATION, VALIDATION, CROPS, DROPOUT = range(6)


class Batch(NamedTuple):
    """The samples of one forward pass."""

    latents: torch.Tensor  # (B, 4, h, w)
    noise: torch.Tensor  # (B, 4, h, w)
    timesteps: torch.Tensor  # (B,) indices from 0 to num_train_timesteps - 1
    time_ids: torch.Tensor  # (B, 6)
    prompts: torch.Tensor  # (B,) rows of EncodedPrompts
    mask: torch.Tensor  # (B, 1, h, w), from 0 to 1: where the loss counts
    weight: torch.Tensor  # (B,) of each sample in the loss
    uncaptioned: torch.Tensor  # (B,) bool: trained without its prompt

    def to(self, device: torch.device) -> Batch:
        return Batch(*(column.to(device) for column in self))


def seed_for(*key: int) -> int:
    low, high = np.random.SeedSequence(key).generate_state(2)
    return (int(high) << 32 | int(low)) % 2**63


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone, so that draws agree between devices and after a restart."""
    return torch.Generator().manual_seed(seed_for(*key))


def step_seed(seed: int, step: int, process_index: int) -> int:
    """For what draws from the global generators during a step, such as dropout."""
    return seed_for(seed, DROPOUT, step, process_index)


def shuffled_place(seed: int, stream: int, position: int, count: int) -> int:
    """The ``position``-th of an endless row of ``count`` things: each once an epoch, in a new order every epoch."""
    epoch, place = divmod(position, count)
    return int(torch.randperm(count, generator=generator_for(seed, stream, 0, epoch))[place])


class PictureOrder:
    """Which picture every sample of every step shows.

    All samples of a step have one shape. Shapes take turns in proportion to their pictures (with repeats), so that over
    the run every picture is seen equally often; in each shape every picture comes once before any comes again.

    Args:
        shapes: (h, w) of each step, where another stream has decided it; the pictures have all of them.
    """

    def __init__(
        self,
        pictures: Sequence[EncodedPicture],
        *,
        seed: int,
        stream: int,
        slots_per_step: int,
        num_steps: int,
        shapes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.seed, self.stream, self.slots_per_step = seed, stream, slots_per_step
        self.members: dict[tuple[int, int], list[int]] = {}
        for row, picture in enumerate(pictures):
            self.members.setdefault(picture.shape, []).extend([row] * picture.repeats)
        self.shapes = list(shapes) if shapes is not None else self._take_turns(num_steps)
        taken: Counter[tuple[int, int]] = Counter()
        self.turns: list[int] = []  # how many steps had each step's shape before
        for shape in self.shapes:
            self.turns.append(taken[shape])
            taken[shape] += 1

    def _take_turns(self, num_steps: int) -> list[tuple[int, int]]:
        total = sum(map(len, self.members.values()))
        taken: Counter[tuple[int, int]] = Counter()
        shapes = []
        for step in range(num_steps):
            shape = max(self.members, key=lambda s: len(self.members[s]) * (step + 1) / total - taken[s])
            shapes.append(shape)
            taken[shape] += 1
        return shapes

    def picture(self, step: int, slot: int) -> int:
        """Row of the picture in ``slot`` of ``step``."""
        members = self.members[self.shapes[step]]
        position = self.turns[step] * self.slots_per_step + slot
        return members[shuffled_place(self.seed, self.stream, position, len(members))]


def picture_orders(streams: Mapping[int, Sequence[EncodedPicture]], **schedule: int) -> dict[int, PictureOrder]:
    """The order of every stream's pictures; class images have the shape of the instance images that they stand beside.

    Args:
        schedule: seed, slots_per_step and num_steps.
    """
    orders = {INSTANCE: PictureOrder(streams[INSTANCE], stream=INSTANCE, **schedule)}
    if CLASS in streams:
        orders[CLASS] = PictureOrder(streams[CLASS], stream=CLASS, shapes=orders[INSTANCE].shapes, **schedule)
    return orders


def draw_sample(
    picture: EncodedPicture,
    *,
    seed: int,
    stream: int,
    step: int,
    slot: int,
    num_train_timesteps: int,
    weight: float = 1.0,
    noise_offset: float = 0.0,
    caption_dropout: float = 0.0,
) -> Batch:
    """One sample, without the batch dimension: crop, timestep, latents and noise of a picture."""
    generator = generator_for(seed, stream, 1, step, slot)
    variant = int(torch.randint(len(picture.mean), (), generator=generator))
    timestep = torch.randint(num_train_timesteps, (), generator=generator)
    mean, std = picture.mean[variant], picture.std[variant]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(len(noise), 1, 1, generator=generator)
    uncaptioned = torch.rand((), generator=generator) < caption_dropout
    mask = torch.ones(1, *mean.shape[-2:]) if picture.mask is None else picture.mask[variant]
    return Batch(
        latents,
        noise,
        timestep,
        picture.time_ids[variant],
        torch.tensor(picture.prompt),
        mask,
        torch.tensor(weight),
        uncaptioned,
    )


def training_batch(
    streams: Mapping[int, Sequence[EncodedPicture]],
    orders: Mapping[int, PictureOrder],
    weights: Mapping[int, float],
    *,
    step: int,
    slots: range,
    **draw,
) -> Batch:
    """The samples in the given slots of a step, of every stream one after the other: instance, then class images.

    Args:
        streams: INSTANCE and, with prior preservation, CLASS -> their pictures.
        weights: of each stream's samples in the loss.
        slots: which of the step's slots, over all processes and accumulated batches, are wanted.
        draw: what `draw_sample` takes besides.
    """
    return stack_samples(
        [
            draw_sample(
                pictures[orders[stream].picture(step, slot)],
                stream=stream,
                step=step,
                slot=slot,
                weight=weights[stream],
                **draw,
            )
            for stream, pictures in streams.items()
            for slot in slots
        ]
    )


def fixed_batches(
    pictures: Sequence[EncodedPicture], *, seed: int, stream: int, slots: range, total: int, num_train_timesteps: int
) -> Iterator[Batch]:
    """Samples for measuring: slot k of ``total`` has the k-th stratum of the timesteps; a batch for each shape.

    They depend on the slot alone, so that it does not matter how the slots are shared out.
    """
    groups: dict[tuple[int, int], list[Batch]] = {}
    for slot in slots:
        picture = pictures[shuffled_place(seed, stream, slot, len(pictures))]
        sample = draw_sample(
            picture, seed=seed, stream=stream, step=0, slot=slot, num_train_timesteps=num_train_timesteps
        )
        stratum = torch.tensor(int((slot + 0.5) / total * num_train_timesteps))
        groups.setdefault(picture.shape, []).append(sample._replace(timesteps=stratum))
    return map(stack_samples, groups.values())


def stack_samples(samples: Sequence[Batch]) -> Batch:
    return Batch(*(torch.stack(column) for column in zip(*samples)))
