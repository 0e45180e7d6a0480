"""The scores' mathematics against loops in NumPy, and the embedded encoders on the sample subjects."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from judging.scores import (
    ClipEncoder,
    ImageEncoder,
    diversity,
    drift,
    prompt_fidelity,
    subject_fidelity,
)
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


def test_rounding_makes_no_negative_drift():
    one = torch.tensor([[0.6, 0.8]]) * (1 + 1e-7)  # of unit length, but for the last bit
    assert drift(one, one).item() == 0 and diversity(torch.cat([one, one])) == 0


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


@pytest.mark.parametrize(("name", "least"), [("clip", 0.5), ("dino", 0.9)])
def test_embedded_encoders_know_a_subject_again(name, least, request):
    """Each of the 24 pictures is nearer to the others of its subject than to any other subject's, in the mean.

    By chance a quarter are. CLIP, which learned captions, goes as much by the place.
    """
    encoder = request.getfixturevalue(name)
    subjects = {name: encoder.images(subject(name)) for name in ("cat", "dog", "robot", "teapot")}
    right = total = 0
    for own, found in subjects.items():
        for row in range(len(found)):
            others = found[[index for index in range(len(found)) if index != row]]
            means = {other: (found[row] @ pictures.T).mean() for other, pictures in subjects.items() if other != own}
            right += (found[row] @ others.T).mean() > max(means.values())
            total += 1
    assert total >= 20 and right / total >= least, f"{right} of {total}"


def test_embedded_clip_reads_scenes(clip):
    """Of pictures that the project drew itself: backgrounds in their own colours."""
    prompts = ["a photo of a cat on a red background", "a photo of a cat on a blue background"]
    for row, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (64, 64), colour)
        assert (clip.images([picture]) @ clip.texts(prompts).T).argmax().item() == row


def test_wrong_encoders_are_named(tmp_path):
    with pytest.raises(ValueError, match="--dino .*nowhere, which is no folder in .* either, could not be loaded"):
        ImageEncoder(str(tmp_path / "nowhere"), CPU)
    with pytest.raises(ValueError, match="is a ViTModel, which reads no prompts: name a CLIP"):
        ClipEncoder(str(ASSETS / "tiny-dino"), CPU)
