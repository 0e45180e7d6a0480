"""Draws: functions of (seed, step, sample), whatever the batch, the process or the history."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.draws import CLASS, INSTANCE, draw_batch, generator_for, picture_at, training_batch
from dreambooth.encode import EncodedImages


def encoded(count=5, variants=1, offset=0.0):
    mean = torch.arange(count).float().reshape(count, 1, 1, 1, 1).expand(count, variants, 4, 2, 2) + offset
    return EncodedImages(mean, torch.zeros_like(mean), torch.arange(count * 6).reshape(count, 6).float())


def draw(images=None, **changes):
    keys = {
        "seed": 0,
        "stream": INSTANCE,
        "step": 3,
        "slots": range(4),
        "slots_per_step": 4,
        "num_train_timesteps": 1000,
    }
    return draw_batch(images or encoded(), **(keys | changes))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 6), st.integers(1, 6))
def test_split_of_a_step_does_not_matter(seed, step, first, second):
    """Two processes, or two accumulated batches, see what one bigger batch sees."""
    total = first + second
    whole = draw(seed=seed, step=step, slots=range(total), slots_per_step=total)
    parts = [
        draw(seed=seed, step=step, slots=slots, slots_per_step=total) for slots in (range(first), range(first, total))
    ]
    for one, halves in zip(whole, zip(*parts)):
        assert torch.equal(one, torch.cat(halves))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(0, 3))
def test_every_picture_once_an_epoch(seed, count, epoch):
    shown = [picture_at(seed, INSTANCE, epoch * count + place, count) for place in range(count)]
    assert sorted(shown) == list(range(count))


def test_epochs_have_different_orders():
    orders = {tuple(picture_at(0, INSTANCE, epoch * 6 + i, 6) for i in range(6)) for epoch in range(10)}
    assert len(orders) > 5


def test_draws_differ_between_seeds_steps_samples_and_streams():
    noises = [draw().noise, draw(seed=1).noise, draw(step=4).noise, draw(stream=CLASS).noise]
    for i, one in enumerate(noises):
        assert len({tuple(row.flatten().tolist()) for row in one}) == 4
        for other in noises[i + 1 :]:
            assert not torch.isclose(one, other).any()


def test_global_random_state_plays_no_part():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw()))


def test_timesteps_and_noise_have_the_right_distribution():
    batch = draw(slots=range(2000), slots_per_step=2000)
    timesteps = batch.timesteps.float()
    assert 0 <= timesteps.min() < 10 and 990 <= timesteps.max() < 1000
    assert abs(timesteps.mean() - 499.5) < 4 * 288.7 / 2000**0.5
    assert abs(batch.noise.mean()) < 0.03 and abs(batch.noise.std() - 1) < 0.03


def test_latents_are_samples_of_the_posterior():
    images = EncodedImages(torch.full((1, 1, 4, 8, 8), 2.0), torch.full((1, 1, 4, 8, 8), 0.5), torch.zeros(1, 6))
    latents = draw(images, slots=range(40), slots_per_step=40).latents
    assert abs(latents.mean() - 2) < 0.03 and abs(latents.std() - 0.5) < 0.03


def test_both_mirror_images_are_shown():
    mean = torch.cat([encoded().mean, encoded(offset=100.0).mean], dim=1)
    images = EncodedImages(mean, torch.zeros_like(mean), encoded().time_ids)
    latents = draw(images, slots=range(200), slots_per_step=200).latents
    assert 0.35 < (latents[:, 0, 0, 0] >= 100).float().mean() < 0.65


def test_conditioning_goes_with_its_picture():
    images = encoded()
    batch = draw(images, slots=range(9), slots_per_step=9)
    for latents, time_ids in zip(batch.latents, batch.time_ids):
        assert torch.equal(time_ids, images.time_ids[int(latents[0, 0, 0])])


def test_class_pictures_follow_instance_pictures():
    for size in (1, 2, 3):
        batch = training_batch(
            {INSTANCE: encoded(), CLASS: encoded(offset=100.0)},
            torch.device("cpu"),
            seed=0,
            step=0,
            slots=range(size),
            slots_per_step=size,
            num_train_timesteps=1000,
        )
        assert batch.latents.shape[0] == 2 * size
        assert (batch.latents[:size] < 100).all() and (batch.latents[size:] >= 100).all()


def test_generator_depends_on_the_whole_key():
    states = {tuple(torch.rand(2, generator=generator_for(*key)).tolist()) for key in [(0, 1), (1, 0), (0, 0), (1, 1)]}
    assert len(states) == 4
