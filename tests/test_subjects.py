"""The sample subjects in assets/subjects: their number, format and size, and that their tool remakes them."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image, ImageChops

pytest.importorskip("resvg_py", reason="resvg_py draws the sample subjects: pip install -r requirements-dev.txt")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import make_subjects
from make_subjects import ALL_SUBJECTS
from world import SCENES, kept_out

FOLDER = Path(__file__).parent.parent / "assets" / "subjects"
PICTURES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.png"))


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """Return a folder with all subjects drawn anew."""
    folder = tmp_path_factory.mktemp("subjects")
    make_subjects.write_subjects(folder, seed=0)
    return folder


@pytest.mark.parametrize("name", ALL_SUBJECTS)
def test_each_subject_has_six_pictures_and_one_held_out_in_each_scene(name):
    assert len(list((FOLDER / name).glob("*.png"))) == 6
    heldout = {path.stem.rsplit("_", 1)[1] for path in (FOLDER / "heldout" / name).glob("*.png")}
    assert heldout == set(SCENES)


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_a_picture_is_a_small_rgb_square(picture):
    with Image.open(FOLDER / picture) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))


def test_attributes_say_who_each_subject_is_and_no_training_shows_one():
    saved = json.loads((FOLDER / "attributes.json").read_text())
    assert saved == {name: asdict(who) for name, who in ALL_SUBJECTS.items()}
    assert all(kept_out(who) for who in ALL_SUBJECTS.values())


def test_the_readme_names_every_subject_and_its_prompt():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`a photo of [V] {name}`" in text for name in ALL_SUBJECTS)


def test_the_tool_remakes_the_pictures(remade):
    assert sorted(path.relative_to(remade) for path in remade.rglob("*.png")) == PICTURES
    for picture in PICTURES:
        with Image.open(remade / picture) as new, Image.open(FOLDER / picture) as old:
            assert max(high for _, high in ImageChops.difference(new, old).getextrema()) <= 2, picture


def test_no_two_pictures_of_a_subject_are_the_same():
    for name in ALL_SUBJECTS:
        paths = [path for folder in (FOLDER / name, FOLDER / "heldout" / name) for path in folder.glob("*.png")]
        assert len({Image.open(path).tobytes() for path in paths}) == len(paths)
