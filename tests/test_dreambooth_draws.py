"""Draws: functions of (seed, step, sample), whatever the batch, the process or the history."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreambooth.draws import (
    CLASS,
    INSTANCE,
    VALIDATION,
    PictureOrder,
    draw_sample,
    fixed_batches,
    generator_for,
    shuffled_place,
    training_batch,
)
from dreambooth.encode import EncodedPicture


def encoded(count=5, variants=1, offset=0.0, std=0.0, shape=(2, 2), **options):
    """Pictures whose latents are their number (plus 100 for each further variant)."""
    pictures = []
    for number in range(count):
        values = offset + number + 100.0 * torch.arange(variants).reshape(-1, 1, 1, 1)
        mean = values.expand(variants, 4, *shape)
        time_ids = torch.full((variants, 6), float(number))
        pictures.append(EncodedPicture(mean, torch.full_like(mean, std), time_ids, prompt=number, **options))
    return pictures


def order(pictures, *, seed=0, stream=INSTANCE, slots_per_step=4, num_steps=50, **options):
    return PictureOrder(
        pictures, seed=seed, stream=stream, slots_per_step=slots_per_step, num_steps=num_steps, **options
    )


def draw(pictures=None, *, seed=0, stream=INSTANCE, step=3, slots=range(4), slots_per_step=4, **options):
    pictures = pictures or encoded()
    return training_batch(
        {stream: pictures},
        {stream: order(pictures, seed=seed, stream=stream, slots_per_step=slots_per_step)},
        {stream: 1.0},
        step=step,
        slots=slots,
        seed=seed,
        num_train_timesteps=1000,
        **options,
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 49), st.integers(1, 6), st.integers(1, 6))
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
    shown = [shuffled_place(seed, INSTANCE, epoch * count + place, count) for place in range(count)]
    assert sorted(shown) == list(range(count))


def test_epochs_have_different_orders():
    orders = {tuple(shuffled_place(0, INSTANCE, epoch * 6 + i, 6) for i in range(6)) for epoch in range(10)}
    assert len(orders) > 5


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 5))
def test_shapes_take_turns_and_every_picture_its_share(counts, slots_per_step):
    pictures = [p for width, count in enumerate(counts, start=1) for p in encoded(count, shape=(1, width))]
    steps = 40 * len(pictures)
    one = order(pictures, slots_per_step=slots_per_step, num_steps=steps)
    shown = Counter(one.picture(step, slot) for step in range(steps) for slot in range(slots_per_step))
    for step in range(0, steps, 7):
        assert {pictures[one.picture(step, slot)].shape for slot in range(slots_per_step)} == {one.shapes[step]}
    share = steps * slots_per_step / len(pictures)
    assert all(abs(shown[row] - share) <= 2 * slots_per_step + 1 for row in range(len(pictures)))


def test_repeats_count_in_an_epoch():
    pictures = [*encoded(1, repeats=3), *encoded(1)]
    one = order(pictures, slots_per_step=4, num_steps=10)
    for step in range(10):
        assert Counter(one.picture(step, slot) for slot in range(4)) == {0: 3, 1: 1}


def test_class_pictures_come_in_the_shape_of_the_step():
    instance = [*encoded(2, shape=(1, 2)), *encoded(1, shape=(2, 1))]
    classes = [*encoded(4, shape=(2, 1)), *encoded(4, shape=(1, 2))]
    first = order(instance)
    second = order(classes, stream=CLASS, shapes=first.shapes)
    shown = Counter(second.picture(step, slot) for step in range(50) for slot in range(4))
    assert first.shapes == second.shapes and set(shown) == set(range(8))
    for step in range(50):
        assert classes[second.picture(step, 0)].shape == instance[first.picture(step, 0)].shape


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
    latents = draw(encoded(1, offset=2.0, std=0.5, shape=(8, 8)), slots=range(40), slots_per_step=40).latents
    assert abs(latents.mean() - 2) < 0.03 and abs(latents.std() - 0.5) < 0.03


def test_all_variants_are_shown():
    latents = draw(encoded(variants=2), slots=range(200), slots_per_step=200).latents
    assert 0.35 < (latents[:, 0, 0, 0] >= 100).float().mean() < 0.65


def test_conditioning_prompt_and_mask_go_with_their_picture():
    pictures = [
        EncodedPicture(one.mean, one.std, one.time_ids, one.prompt, mask=torch.full((1, 1, 2, 2), number / 10))
        for number, one in enumerate(encoded())
    ]
    batch = draw(pictures, slots=range(9), slots_per_step=9)
    shown = batch.latents[:, 0, 0, 0]
    assert torch.equal(batch.time_ids[:, 0], shown) and batch.prompts.tolist() == shown.tolist()
    assert torch.allclose(batch.mask[:, 0, 0, 0], shown / 10)


def test_class_pictures_follow_instance_pictures():
    streams = {INSTANCE: encoded(), CLASS: encoded(offset=100.0)}
    for size in (1, 2, 3):
        orders = {stream: order(pictures, stream=stream, slots_per_step=size) for stream, pictures in streams.items()}
        batch = training_batch(
            streams,
            orders,
            {INSTANCE: 1.0, CLASS: 0.3},
            step=0,
            slots=range(size),
            seed=0,
            num_train_timesteps=1000,
        )
        assert (batch.latents[:size] < 100).all() and (batch.latents[size:] >= 100).all()
        assert torch.allclose(batch.weight, torch.tensor([1.0] * size + [0.3] * size))


def test_noise_offset_moves_the_mean_of_a_channel():
    shape = {"shape": (16, 16)}
    plain = draw(encoded(1, **shape), slots=range(200), slots_per_step=200).noise.mean(dim=(2, 3))
    moved = draw(encoded(1, **shape), slots=range(200), slots_per_step=200, noise_offset=0.5).noise.mean(dim=(2, 3))
    assert abs(plain.std() - 1 / 16) < 0.01 and abs(moved.std() - (1 / 256 + 0.25) ** 0.5) < 0.05


def test_caption_dropout_has_its_share():
    dropped = draw(slots=range(1000), slots_per_step=1000, caption_dropout=0.3).uncaptioned
    assert dropped.dtype == torch.bool and abs(dropped.float().mean() - 0.3) < 0.05
    assert not draw().uncaptioned.any()


def test_fixed_batches_do_not_depend_on_how_they_are_shared_out():
    pictures = [*encoded(3), *encoded(2, offset=50.0, shape=(1, 4))]
    options = {"seed": 0, "stream": VALIDATION, "total": 8, "num_train_timesteps": 1000}
    samples = {}
    for parts in ([range(8)], [range(3), range(3, 8)]):
        rows = [
            (int(batch.timesteps[i]), batch.noise[i].flatten().tolist(), batch.latents[i].flatten().tolist())
            for slots in parts
            for batch in fixed_batches(pictures, slots=slots, **options)
            for i in range(len(batch.latents))
        ]
        samples[len(parts)] = sorted(rows)
    assert samples[1] == samples[2]
    assert [row[0] for row in samples[1]] == [62, 187, 312, 437, 562, 687, 812, 937]


def test_a_sample_needs_no_batch():
    picture = encoded(1)[0]
    one = draw_sample(picture, seed=0, stream=INSTANCE, step=3, slot=2, num_train_timesteps=1000)
    assert torch.equal(one.noise, draw(encoded(1), slots=range(2, 3)).noise[0])


def test_generator_depends_on_the_whole_key():
    states = {tuple(torch.rand(2, generator=generator_for(*key)).tolist()) for key in [(0, 1), (1, 0), (0, 0), (1, 1)]}
    assert len(states) == 4
