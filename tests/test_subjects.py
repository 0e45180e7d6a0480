"""The sample subjects in assets/subjects: their number, format and size, and that their tool remakes them."""

import platform
from pathlib import Path

import pytest
from PIL import Image, ImageChops, features

from tools import make_subjects

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "subjects"
NAMES = sorted(make_subjects.SUBJECTS)
PICTURES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.png"))
# The zlib-ng and processor that wrote the committed files: others may pack the same pixels into other bytes.
COMPRESSOR = ("2.3.3", "x86_64")


@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """Return a folder with all subjects drawn anew."""
    pytest.importorskip("resvg_py", reason="resvg_py draws the sample subjects: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("subjects")
    make_subjects.main(["--output", str(folder)])
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_subject_has_its_pictures(name):
    subject = make_subjects.SUBJECTS[name]()
    for folder, shots in ((FOLDER / name, subject.train), (FOLDER / "heldout" / name, subject.heldout)):
        expected = [f"{number:02d}_{shot.name}.png" for number, shot in enumerate(shots, 1)]
        assert sorted(path.name for path in folder.iterdir()) == expected
    assert 4 <= len(subject.train) <= 6
    assert len(subject.heldout) == 2


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_a_picture_is_a_small_rgb_square(picture):
    with Image.open(FOLDER / picture) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (256, 256))
    assert (FOLDER / picture).stat().st_size < 40_000


def test_no_two_pictures_or_backgrounds_of_a_subject_are_the_same():
    for draw in make_subjects.SUBJECTS.values():
        shots = draw().train + draw().heldout
        assert len({shot.figure for shot in shots}) == len({shot.background for shot in shots}) == len(shots)


def test_the_readme_names_every_subject_and_its_prompt():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`a photo of [V] {name}`" in text for name in NAMES)


def test_the_tool_remakes_the_pictures(remade):
    assert sorted(path.relative_to(remade) for path in remade.rglob("*.png")) == PICTURES
    for picture in PICTURES:
        with Image.open(remade / picture) as new, Image.open(FOLDER / picture) as old:
            assert max(high for _, high in ImageChops.difference(new, old).getextrema()) <= 2, picture
        if (features.version("zlib_ng"), platform.machine()) == COMPRESSOR:
            assert (remade / picture).read_bytes() == (FOLDER / picture).read_bytes(), picture


def test_the_tool_writes_the_same_bytes_every_time(remade, tmp_path):
    make_subjects.main(["--output", str(tmp_path)])
    assert all((tmp_path / picture).read_bytes() == (remade / picture).read_bytes() for picture in PICTURES)


@pytest.mark.parametrize("name", NAMES)
def test_the_subject_fills_most_of_the_frame(name):
    pytest.importorskip("resvg_py", reason="resvg_py draws the sample subjects: pip install -r requirements-dev.txt")
    subject = make_subjects.SUBJECTS[name]()
    for shot in subject.train + subject.heldout:
        figure = make_subjects.render(shot.svg(background=False)).getchannel("A")
        left, top, right, bottom = figure.point(lambda alpha: 255 * (alpha > 120)).getbbox()
        assert 0.6 <= max(right - left, bottom - top) / make_subjects.SIZE <= 0.87, shot.name
        assert min(left, top, make_subjects.SIZE - right) > 8, f"{shot.name} is cut off"
