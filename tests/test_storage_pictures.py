"""Pictures as users have them: orientation, modes, transparency, junk."""

import contextlib

import numpy as np
import pytest
from PIL import Image, features

from storage.pictures import find_images, open_image


def corners(width=40, height=24, mode="RGB"):
    """Black but for a red top left and a blue bottom right quarter."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[height // 2 :, width // 2 :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = corners()
    # How a camera held that way stores the upright picture: the inverse of what a viewer does.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.png")), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    gray = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (16, 1)))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    image = deep if mode in ("I;16", "I") else gray.convert(mode)
    path = tmp_path / ("photo.tiff" if mode in ("CMYK", "F") else "photo.png")
    image.save(path)
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (32, 16)
    error = np.abs(np.asarray(opened).astype(int) - np.asarray(gray.convert("RGB")).astype(int))
    assert error.mean() < (128 if mode == "1" else 3)  # one bit is dithered


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "b.png", transparency=0)
    for name in ("a.png", "b.png"):
        opened = open_image(tmp_path / name)
        assert opened.getpixel((0, 0)) == (0, 0, 255) and opened.getpixel((5, 5)) == (255, 255, 255)


def test_alpha_is_kept_on_request(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "b.png")
    assert np.asarray(open_image(tmp_path / "a.png", keep_alpha=True)).tolist() == [[[0, 0, 255, 255], [255] * 3 + [0]]]
    assert np.asarray(open_image(tmp_path / "b.png", keep_alpha=True)).tolist() == [[[0, 0, 0, 255]] * 2]


def test_folder_listing(tmp_path):
    for name in ("b.png", "a.jpg", "a.txt", "b.caption", "metadata.jsonl", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert [path.name for path in find_images(tmp_path, "instance_data_dir")] == ["a.jpg", "b.png"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: folder / "none", "does not exist"),
        (lambda folder: (folder / "file").write_text("x") and folder / "file", "is not a folder"),
        (lambda folder: folder, "holds no picture"),
    ],
)
def test_wrong_folders_are_named(tmp_path, prepare, words):
    with pytest.raises(ValueError, match=words) as error:
        find_images(prepare(tmp_path), "instance_data_dir")
    assert "--instance_data_dir" in str(error.value) and str(tmp_path) in str(error.value)


def test_a_folder_of_subjects_is_told_from_a_subject(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no picture: name one of its folders, such as .*cat"):
        find_images(tmp_path, "instance_data_dir")


@pytest.mark.parametrize("content", [b"hello", b""])
def test_no_picture_is_named(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match="notes.txt is not a picture"):
        open_image(tmp_path / "notes.txt")


def test_cut_off_picture_is_named(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.jpg is broken or cut off"):
        open_image(tmp_path / "cut.jpg")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF: nothing of it can be broken")
def test_broken_avif_is_no_traceback(tmp_path):
    """Its decoder raises RuntimeError; whatever a flipped byte does, it is a picture or a ValueError."""
    corners().save(tmp_path / "a.avif")
    whole = (tmp_path / "a.avif").read_bytes()
    for place in range(len(whole)):
        (tmp_path / "a.avif").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            open_image(tmp_path / "a.avif")
