"""The drawn world of tools/world: reproducible pictures, honest captions, and settings that no training shows."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("resvg_py")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import world
from pretrain_tiny_sdxl import build_tokenizer
from world.attributes import draw_new_subject, in_reserve, is_near

from inference.sampling import GeneratedImage
from judging.attributes import AttributeReader, SubjectReading, asked_place, attributes_kept, reduced, to_pixels


@pytest.fixture(scope="module")
def pictures():
    return [world.sample(5, index, 32) for index in range(150)]


def test_a_picture_is_a_function_of_seed_and_index(pictures):
    again = world.sample(5, 7, 32)
    assert again.caption == pictures[7].caption and again.image.tobytes() == pictures[7].image.tobytes()
    assert world.sample(6, 7, 32).image.tobytes() != again.image.tobytes()


def test_no_picture_shows_a_kept_out_setting(pictures):
    assert not any(world.kept_out(picture.who) for picture in pictures)
    assert all(world.kept_out(subject) for subject in world.SUBJECTS.values())
    cat = world.SUBJECTS["cat"]
    assert is_near(replace(cat, accessory="none", shades=9), cat)
    assert not is_near(replace(cat, accessory="none", main="red"), cat)
    assert not is_near(replace(cat, kind="dog"), cat)
    subject = draw_new_subject(np.random.default_rng(0), "cat")
    assert world.kept_out(subject) and not is_near(subject, cat)


def test_the_reserve_hides_combinations_and_no_pair():
    """A sixteenth or so is in reserve, and any two attributes still meet in the pretraining."""
    names = ("main", "second", "pattern", "accessory")
    options = (world.COLORS, world.COLORS, world.PATTERNS, world.ACCESSORIES)
    settings = [s for s in product(*options) if s[0] != s[1]]
    known = [s for s in settings if not in_reserve(world.Who("cat", **dict(zip(names, s))))]
    assert 0.04 < 1 - len(known) / len(settings) < 0.09
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert {(s[i], s[j]) for s in known} == {(s[i], s[j]) for s in settings}


def test_captions_name_the_kind_and_only_what_is_there(pictures):
    for picture in pictures:
        words, who = picture.caption.split(), picture.who
        assert who.kind in words
        if "wearing" in words:
            assert words[-1] == who.accessory or f"{who.accessory} " in picture.caption
        for scene, phrase in world.SCENES.items():
            assert (phrase in picture.caption) <= (picture.place == scene)
    share = Counter("background" in p.caption or any(s in p.caption for s in world.SCENES.values()) for p in pictures)
    assert 0.8 < share[True] / len(pictures) < 1


@pytest.mark.parametrize("kind", world.KINDS)
def test_every_attribute_is_seen(kind):
    """Changing any attribute that a reader can be asked for changes the picture."""
    who = world.Who(kind, "blue", "yellow", pattern="stripes", accessory="hat")
    pose = world.Pose(view="standing")

    def pixels(who, pose=pose):
        return np.asarray(world.draw(who, pose, "white", np.random.default_rng(0), 64), dtype=float)

    changes = {"main": "red", "second": "pink", "eyes": "orange", "accent": "green", "pattern": "spots"}
    for name, value in {**changes, "accessory": "bow"}.items():
        assert np.abs(pixels(replace(who, **{name: value})) - pixels(who)).max() > 40, name
    mirrored = pixels(who, replace(pose, mirror=True))
    assert np.abs(mirrored[:, ::-1] - pixels(who)).mean() < 2


def test_the_tokenizer_knows_the_captions_words_and_splits_identifiers(pictures, tmp_path):
    tokenizer = build_tokenizer([picture.caption for picture in pictures], tmp_path)
    assert tokenizer.tokenize("A photo of a cat") == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>"]
    assert tokenizer.tokenize("[V]") == ["[</w>", "v</w>", "]</w>"] and len(tokenizer.tokenize("sks")) > 1
    assert tokenizer.unk_token_id not in tokenizer("a zyxwvut", add_special_tokens=False).input_ids


def test_an_unknown_place_is_refused():
    with pytest.raises(ValueError, match="unknown place 'moon'"):
        world.draw(world.SUBJECTS["cat"], world.Pose(), "moon", np.random.default_rng(0))


def test_the_reader_saves_and_reads(pictures, tmp_path):
    torch.manual_seed(0)
    reader = AttributeReader({"kind": ["cat", "dog"], "place": ["snow", "night"]}, {"in the snow": "snow"}).eval()
    images = [picture.image for picture in pictures[:3]]
    pixels = to_pixels(np.stack([reduced(image) for image in images]))
    before = reader(pixels)
    reader.save(tmp_path, {"accuracy": {}})
    again = AttributeReader.load(tmp_path)
    torch.testing.assert_close(again(pixels), before, atol=2e-2, rtol=0)
    assert [set(reading) for reading in again.read(images)] == [{"kind", "place"}] * 3
    assert again.places == reader.places
    with pytest.raises(ValueError, match="holds no attribute reader"):
        AttributeReader.load(tmp_path / "none")


def test_fidelity_is_the_share_of_the_subjects_attributes():
    subject = {"kind": "cat", "main": "teal", "accessory": "scarf", "accent": "purple"}
    assert attributes_kept(subject, {**subject, "place": "snow"}) == 1
    assert attributes_kept(subject, {**subject, "main": "red", "accent": "red"}) == 0.5
    plain = {"kind": "cat", "main": "teal", "accessory": "none", "accent": "purple"}
    assert attributes_kept(plain, {**plain, "accent": "red"}) == 1
    with pytest.raises(ValueError, match="no attribute"):
        attributes_kept({}, subject)


def test_a_prompt_names_a_place():
    places = {world.place_words(place): place for place in world.PLACES}
    assert asked_place("a photo of [V] cat in the jungle", places) == "jungle"
    assert asked_place("a photo of a cat on an orange background", places) == "orange"
    assert asked_place("a photo of a cat", places) is None
    assert asked_place("a cat on the grass at night", {"at night": "night", "on the grass at night": "both"}) == "both"


class PerfectReader(AttributeReader):
    """Reads what was drawn: the pictures are numbered by their brightness."""

    def read(self, images):
        return [self.known[image.getpixel((0, 0))[0]] for image in images]


def test_a_subjects_scores_are_the_shares_that_are_read(tmp_path):
    answers = {"kind": ["cat", "dog"], "main": ["teal", "red"], "place": ["snow", "night"]}
    AttributeReader(answers, {"in the snow": "snow", "at night": "night"}).save(tmp_path / "reader", {})
    subject = tmp_path / "cat"
    subject.mkdir()
    with pytest.raises(ValueError, match=r"attributes\.json doesn't say what cat is"):
        SubjectReading(tmp_path / "reader", subject)
    facts = tmp_path / "attributes.json"  # beside the folder: a run refuses what is no picture in it
    facts.write_text('{"dog": {"kind": "dog"}}')
    with pytest.raises(ValueError, match="doesn't say what cat is"):
        SubjectReading(tmp_path / "reader", subject)
    facts.write_text('{"cat": {"kind": "bird"}}')
    with pytest.raises(ValueError, match="kind is bird, and .* knows cat, dog"):
        SubjectReading(tmp_path / "reader", subject)
    facts.write_text('{"cat": {"kind": "cat", "main": "teal", "shades": 3}}')
    reading = SubjectReading(tmp_path / "reader", subject)
    reading.reader = PerfectReader(answers, reading.reader.places)
    reading.reader.known = [
        {"kind": "cat", "main": "teal", "place": "snow"},
        {"kind": "cat", "main": "red", "place": "night"},
        {"kind": "dog", "main": "red", "place": "night"},
        {"kind": "cat", "main": "teal", "place": "snow"},
    ]
    prompts = ["a cat in the snow"] * 2 + ["a cat at night", "a cat"]
    drawn = [
        GeneratedImage(prompt=prompt, seed=seed, image=Image.new("RGB", (4, 4), (number, 0, 0)))
        for number, (prompt, seed) in enumerate(zip(prompts, (0, 1, 0, 0)))
    ]
    assert reading.score(drawn) == {
        "attributes": {"a cat in the snow": {0: 1.0, 1: 0.5}, "a cat at night": {0: 0.0}, "a cat": {0: 1.0}},
        "scene": {"a cat in the snow": {0: 1.0, 1: 0.0}, "a cat at night": {0: 1.0}},
    }
