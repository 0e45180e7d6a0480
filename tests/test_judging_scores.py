"""The scores' mathematics against loops in NumPy, and the embedded encoders on the sample subjects."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from transformers import CLIPModel, CLIPProcessor

from judging.scores import (
    LONE_REFERENCE,
    ClipEncoder,
    ImageEncoder,
    diversity,
    drift,
    memorisation,
    prompt_fidelity,
    subject_fidelity,
)
from judging.statistics import confidence_interval, spread
from storage.pictures import open_image

ASSETS = Path(__file__).parent.parent / "assets"
CPU = torch.device("cpu")


def features(count, seed, width=6):
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def cosine(one, other):
    one, other = one.double().numpy(), other.double().numpy()
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


@pytest.fixture(scope="module")
def clip():
    return ClipEncoder(str(ASSETS / "tiny-clip"), CPU)


@pytest.fixture(scope="module")
def dino():
    return ImageEncoder(str(ASSETS / "tiny-dino"), CPU)


def subject(name):
    return [open_image(path) for path in sorted((ASSETS / "subjects" / name).glob("*.png"))]


# --- mathematics ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 6), instances=st.integers(1, 5), seed=st.integers(0, 1000))
def test_scores_are_mean_pairwise_cosines(count, instances, seed):
    drawn, base, own = features(count, seed), features(count, seed + 1), features(instances, seed + 2)
    for row in range(count):
        expected = np.mean([cosine(drawn[row], other) for other in own])
        assert subject_fidelity(drawn, own)[row].item() == pytest.approx(expected, abs=1e-5)
        assert prompt_fidelity(drawn, base)[row].item() == pytest.approx(cosine(drawn[row], base[row]), abs=1e-5)
        assert drift(drawn, base)[row].item() == pytest.approx((1 - cosine(drawn[row], base[row])) / 2, abs=1e-5)
    if count > 1:
        pairs = [1 - cosine(drawn[i], drawn[j]) for i in range(count) for j in range(i)]
        assert diversity(drawn) == pytest.approx(np.mean(pairs), abs=1e-5)


def test_a_picture_compared_with_itself(clip, dino):
    images = subject("robot")
    for encoder in (clip, dino):
        found = encoder.images(images)
        assert subject_fidelity(found[:1], found[:1]).item() == pytest.approx(1, abs=1e-6)
        assert (found @ found.T).max(dim=1).values.numpy() == pytest.approx(1, abs=1e-6)
        assert drift(found, found).abs().max().item() < 1e-6
        assert diversity(found[[0, 0, 0]]) == pytest.approx(0, abs=1e-6)
        assert torch.equal(found, encoder.images(images))
    assert memorisation(images, images).nearest == pytest.approx(1, abs=1e-6)


def test_rounding_makes_no_negative_drift():
    one = torch.tensor([[0.6, 0.8]]) * (1 + 1e-7)  # of unit length, but for the last bit
    assert drift(one, one).item() == 0 and diversity(torch.cat([one, one])) == 0


def test_spread_is_between_seeds():
    values = {0: [0.1, 0.3], 1: [0.5, 0.7], 2: [0.3, 0.5]}
    found = spread(values)
    assert found.mean == pytest.approx(0.4) and found.std == pytest.approx(0.2)
    assert found.low < 0.4 < found.high and found == spread(values)
    alone = spread({7: [0.25]})
    assert alone.std == 0 and alone.low == alone.high == alone.mean == 0.25


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_bootstrap_interval_holds_the_mean_and_lies_among_the_values(values):
    found = spread(dict(enumerate([value] for value in values)))
    assert (
        min(values) - 1e-9 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= max(values) + 1e-9
    )


def test_interval_of_a_few_runs():
    mean, half = confidence_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)  # Student's table, two degrees
    assert math.isnan(confidence_interval([1.0])[1])


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_clip_is_that_of_transformers(clip):
    images, prompts = subject("cat")[:2], ["a photo of a cat", "a photo of a robot on the beach"]
    model = CLIPModel.from_pretrained(ASSETS / "tiny-clip")
    inputs = CLIPProcessor.from_pretrained(ASSETS / "tiny-clip")(
        images=images, text=prompts, padding="max_length", return_tensors="pt", max_length=24, truncation=True
    )
    with torch.no_grad():
        expected = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert torch.allclose(clip.images(images) @ clip.texts(prompts).T, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_embedded_encoders_know_a_subject_again(name, request):
    """Each of the 24 pictures is nearer to the others of its subject than to any other subject's, in the mean."""
    encoder = request.getfixturevalue(name)
    subjects = {name: encoder.images(subject(name)) for name in ("cat", "dog", "robot", "teapot")}
    right = total = 0
    for own, found in subjects.items():
        for row in range(len(found)):
            others = found[[index for index in range(len(found)) if index != row]]
            means = {other: (found[row] @ pictures.T).mean() for other, pictures in subjects.items() if other != own}
            right += (found[row] @ others.T).mean() > max(means.values())
            total += 1
    assert total >= 20 and right / total >= 0.9, f"{right} of {total}"


def test_embedded_clip_reads_scenes(clip):
    """Of pictures that the project drew itself: backgrounds in their own colours."""
    prompts = ["a photo of a cat on a red background", "a photo of a cat on a blue background"]
    for row, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (64, 64), colour)
        assert (clip.images([picture]) @ clip.texts(prompts).T).argmax().item() == row


def test_wrong_encoders_are_named(tmp_path):
    with pytest.raises(ValueError, match="--dino .*nowhere, which is no folder here either, could not be loaded"):
        ImageEncoder(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ValueError, match="is a ViTModel, which reads no prompts: name a CLIP"):
        ClipEncoder(str(ASSETS / "tiny-dino"), CPU)


# --- memorisation -----------------------------------------------------------------------------------------------------


def test_alarm_for_copies_alone():
    """Soft and noisy copies, as a model that knows its training images by heart draws them; and other pictures."""
    instances = subject("robot")
    rng = np.random.default_rng(0)
    soft = [image.resize((64, 64)).filter(ImageFilter.GaussianBlur(1)) for image in instances]
    copies = [
        Image.fromarray((np.asarray(image) + rng.normal(0, 12, (64, 64, 3))).clip(0, 255).astype(np.uint8))
        for image in soft
    ]
    found = memorisation(copies, instances)
    assert found.alarm and found.share == 1 and found.nearest > 0.95 > found.between_instances
    others = subject("cat") + subject("dog")
    assert not memorisation(others, instances).alarm
    half = memorisation(copies[:3] + others[:3], instances)
    assert not half.alarm and half.share == 0.5
    assert memorisation(copies[:1], instances[:1]).alarm and not memorisation(others, instances[:1]).alarm


def photographs(count, width, height):
    """Soft patches of colour, half of them the same in each, as a subject is that was taken in different places."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 255, (4, 6, 3))
    patches = [(shared + rng.integers(0, 255, shared.shape)) / 2 for _ in range(count)]
    small = [Image.fromarray(patch.astype(np.uint8)) for patch in patches]
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image in small]


def test_the_alarm_sees_what_was_trained_on():
    """Square crops of a photograph and mirror images, and a picture that is in the folder twice."""
    for instances in (photographs(5, 180, 120), photographs(5, 120, 180), subject("robot")):
        crops = [ImageOps.fit(image, (64, 64)) for image in instances]
        side = min(instances[0].size)
        ends = [image.crop((0, 0, side, side)).resize((64, 64)) for image in instances]
        for copies in (crops, [ImageOps.mirror(image) for image in crops], ends):
            found = memorisation(copies, instances)
            assert found.alarm and found.share == 1 and found.nearest > 0.95 > found.between_instances
        once, twice = (
            memorisation(crops, instances),
            memorisation(crops, [*instances, *map(ImageOps.mirror, instances)]),
        )
        assert twice == pytest.approx(once)
    assert memorisation(crops[:1] * 2, instances[:1] * 3).between_instances == LONE_REFERENCE


def test_the_alarm_is_silent_for_other_pictures_of_any_shape():
    others = subject("cat") + subject("dog")
    wide = [ImageOps.fit(image, (96, 64)) for image in others]
    assert not memorisation(others + wide, subject("robot")).alarm
    photos = photographs(16, 180, 120)
    for others in (photos[5:], [ImageOps.fit(photo, (64, 64)) for photo in photos[5:]]):
        assert not memorisation(others, photos[:5]).alarm
