"""Pictures as people's cameras, phones and programs write them, each as a viewer shows it."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from accelerate import Accelerator
from drawn_pictures import encoded, ramp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError
from tiny_sdxl import build_pipeline

from dreambooth.data import find_examples, held_out_examples, read_concepts
from dreambooth.prepare import encode_run, read_pictures
from inference.manifest import image_names, text_digest, write_image
from settings.columns import CompareConfig
from settings.sampling import MAX_SEED
from settings.training import TrainConfig
from storage.decoding import exif_orientation
from storage.files import write_atomic
from storage.pictures import find_images, open_image, open_mask
from trainer.compare import plan

FAULTS = Path(__file__).parent.parent.parent / "shared" / "faults" / "inputs"
needs_faults = pytest.mark.skipif(not FAULTS.is_dir(), reason="the faults' inputs lie beside the repository")


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- colours ----------------------------------------------------------------------------------------------------------


def tag(kind: bytes, content: bytes) -> bytes:
    return kind + bytes(4) + content


def curve(gamma: float) -> bytes:
    return tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)))


def srgb_curve() -> bytes:
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return tag(b"para", struct.pack(">HH5i", 3, 0, *(round(number * 65536) for number in numbers)))


def xyz(*values: float) -> bytes:
    return tag(b"XYZ ", struct.pack(">3i", *(round(value * 65536) for value in values)))


def icc(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 (ICC.1:2001-04)."""
    words = b"made for a test\0"
    tags = {
        b"desc": tag(b"desc", struct.pack(">I", len(words)) + words + bytes(78)),
        b"wtpt": xyz(0.9642, 1, 0.8249),
    } | tags
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"lcms", 0x02100000, kind, space, connection) + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# Bradford-adapted to D50, as profiles have them
ADOBE = icc(
    b"RGB ",
    b"mntr",
    {
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        **{name: curve(563 / 256) for name in (b"rTRC", b"gTRC", b"bTRC")},
    },
)
P3 = icc(
    b"RGB ",
    b"mntr",
    {
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407),
        **{name: srgb_curve() for name in (b"rTRC", b"gTRC", b"bTRC")},
    },
)
GRAY = icc(b"GRAY", b"mntr", {b"kTRC": curve(1.8)})


def cmyk_profile() -> bytes:
    """Of a press whose inks are lighter than Pillow's: Lab is a linear table of two points for each ink (lut8)."""
    corners = [
        (round(255 * (1 - key) * (1 - 0.3 * (c + m + y) / 3)), 128 + 40 * (m - c), 128 + 40 * (y - c))
        for c in (0, 1) for m in (0, 1) for y in (0, 1) for key in (0, 1)
    ]  # fmt: skip
    identity = bytes(range(256))
    table = bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    table += identity * 4 + bytes(value for corner in corners for value in corner) + identity * 3
    return icc(b"CMYK", b"prtr", {b"A2B0": tag(b"mft1", table)}, b"Lab ")


def by_littlecms(image, profile) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return pixels(ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))


@needs_faults
def test_a_png_in_adobe_rgb_trains_in_its_own_colours():
    image = Image.open(FAULTS / "icc" / "adobe.png")
    shown = pixels(open_image(FAULTS / "icc" / "adobe.png"))
    assert np.abs(shown - by_littlecms(image, image.info["icc_profile"])).max() == 0
    assert np.abs(shown - pixels(image)).mean() > 3  # as it was trained on before


@pytest.mark.parametrize("profile", [ADOBE, P3], ids=["Adobe RGB", "Display P3"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_photo_of_a_wide_color_space_is_converted(kind, profile):
    """Every iPhone writes Display P3."""
    data = encoded(ramp(), kind, icc_profile=profile, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as file:
        stored = file.convert("RGB")
    shown = pixels(open_image(data))
    assert np.abs(shown - by_littlecms(stored, profile)).max() <= 1
    assert np.abs(shown - pixels(stored)).mean() > 2


@pytest.mark.parametrize(
    ("mode", "kind", "profile"),
    [
        ("L", "PNG", GRAY),
        ("L", "JPEG", GRAY),
        ("CMYK", "JPEG", cmyk_profile()),
        ("CMYK", "TIFF", cmyk_profile()),
        ("P", "PNG", ADOBE),
        ("RGBA", "PNG", ADOBE),
        ("LA", "PNG", GRAY),
        ("L", "PNG", P3),
    ],
)
def test_profiles_of_every_mode(mode, kind, profile):
    data = encoded(ramp(mode), kind, icc_profile=profile)
    with Image.open(io.BytesIO(data)) as file:
        stored = file.convert({"LA": "L", "P": "RGB", "RGBA": "RGB"}.get(mode, "RGB" if profile is P3 else mode))
    assert np.abs(pixels(open_image(data)) - by_littlecms(stored, profile)).max() <= 1
    if profile is not P3:  # gray is gray in P3 too
        assert np.abs(pixels(open_image(data)) - pixels(stored.convert("RGB"))).mean() > 2


def test_sixteen_bits_of_gray_have_their_profile():
    gray = ramp("L")
    data = encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), icc_profile=GRAY)
    assert np.abs(pixels(open_image(data)) - by_littlecms(gray, GRAY)).max() <= 1


def test_lab_is_read():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(ramp(), srgb, lab, outputMode="LAB")
    back = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert (pixels(open_image(encoded(image, "TIFF"))) == pixels(back)).all()


def test_srgb_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (pixels(open_image(encoded(ramp(), icc_profile=profile))) == pixels(ramp())).all()


@pytest.mark.parametrize(
    "profile", [b"nonsense", ADOBE[:200], ADOBE[:128] + bytes(400), GRAY, cmyk_profile()], ids=range(5)
)
def test_a_broken_profile_is_passed_over_with_one_warning(tmp_path, capsys, profile):
    (tmp_path / "a.jpg").write_bytes(data := encoded(ramp(), "JPEG", icc_profile=profile))
    for _ in range(3):
        assert (pixels(open_image(tmp_path / "a.jpg")) == pixels(Image.open(io.BytesIO(data)))).all()
    assert capsys.readouterr().err.count("a.jpg: its colour profile can't be applied") == 1


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks behind its header."""
    made = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:33] + made + data[33:]


def chromaticities(*values: float) -> bytes:
    return struct.pack(">8I", *(round(value * 100_000) for value in values))


SRGB_POINTS = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
ADOBE_POINTS = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def gamma(value: float) -> bytes:
    return struct.pack(">I", round(value * 100_000))


@pytest.mark.parametrize(
    ("chunks", "profile"),
    [
        ([(b"gAMA", gamma(256 / 563)), (b"cHRM", chromaticities(*ADOBE_POINTS))], ADOBE),
        ([(b"gAMA", gamma(1 / 2.2)), (b"cHRM", chromaticities(*SRGB_POINTS))], None),
        ([(b"gAMA", gamma(1 / 2.2))], None),
        ([(b"sRGB", b"\0"), (b"gAMA", gamma(1)), (b"cHRM", chromaticities(*ADOBE_POINTS))], None),
        ([(b"cICP", bytes([12, 13, 0, 1]))], P3),
        ([(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", gamma(1))], None),
        ([(b"iCCP", b"x\0\0" + zlib.compress(ADOBE)), (b"gAMA", gamma(1))], ADOBE),
    ],
    ids=["gAMA+cHRM", "sRGB's own", "gAMA", "sRGB first", "cICP P3", "cICP first", "iCCP first"],
)
def test_chunks_of_a_png_say_its_colors(chunks, profile):
    expected = pixels(ramp()) if profile is None else by_littlecms(ramp(), profile)
    assert (
        np.abs(pixels(open_image(with_chunks(encoded(ramp()), *chunks))) - expected).max() <= (profile is not None) * 2
    )


def test_linear_light_of_a_renderer():
    gray = np.abs(pixels(open_image(with_chunks(encoded(Image.new("L", (4, 4), 55)), (b"gAMA", gamma(1))))))
    assert (gray == 127).all() or (gray == 128).all()  # sRGB's 128 is 21.6 % of the light


@pytest.mark.parametrize("chunk", [(b"cICP", bytes([9, 16, 0, 1])), (b"cHRM", bytes(32)), (b"gAMA", gamma(0.001))])
def test_colors_that_are_not_understood_are_left_with_a_warning(capsys, chunk):
    data = with_chunks(encoded(ramp()), chunk)
    assert (pixels(open_image(data, f"odd {chunk[0]}.png")) == pixels(ramp())).all()
    assert f"warning: odd {chunk[0]}.png: its" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["R03", "color space 2"])
def test_a_camera_that_says_adobe_rgb_in_exif_alone(where):
    """Canon and others write no profile: DCF 2.0's index says it."""
    exif = Image.Exif()
    own = exif.get_ifd(0x8769)
    own[0xA001] = 65535 if where == "R03" else 2
    if where == "R03":
        own[0xA005] = {1: "R03"}
    data = encoded(ramp(), "JPEG", exif=exif, quality=95)
    stored = Image.open(io.BytesIO(data))
    assert np.abs(pixels(open_image(data)) - by_littlecms(stored, ADOBE)).max() <= 2
    both = encoded(ramp(), "JPEG", exif=exif, quality=95, icc_profile=P3)  # a profile goes before
    assert np.abs(pixels(open_image(both)) - by_littlecms(stored, P3)).max() <= 1


# --- numbers ----------------------------------------------------------------------------------------------------------


@needs_faults
def test_a_float_tiff_is_not_black():
    values = np.asarray(Image.open(FAULTS / "ftiff" / "a.tif"))
    assert values.max() <= 1
    assert np.abs(pixels(open_image(FAULTS / "ftiff" / "a.tif"))[..., 0] - values * 255).max() <= 0.5


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
@pytest.mark.parametrize("white", [1, 255, 65535])
def test_gray_tiffs_of_programs_have_their_own_white(kind, white):
    if (kind is not np.float32 and white == 1) or (kind is np.uint16 and white == 255):
        return  # nearly black, and so it is shown
    gray = ramp("L")
    values = np.asarray(gray).astype(np.float64) * (white / 255)
    image = Image.fromarray((values if kind is np.float32 else values.round()).astype(kind))
    assert np.abs(pixels(open_image(encoded(image, "TIFF")))[..., 0] - pixels(gray)).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 70000.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_numbers_without_a_white_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ValueError, match="depth.tif has values from .* save it with 8 or 16 bits a channel"):
        open_image(tmp_path / "depth.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_lies_over_white(mode, kind):
    assert (
        pixels(open_image(encoded(Image.new(mode, (4, 4), 0), kind, **({"exact": True} if kind == "WEBP" else {}))))
        == 255
    ).all()


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0), ("I;16", 7 * 257)])
def test_a_transparent_colour_lies_over_white(mode, key):
    image = Image.new(mode, (4, 4), key)
    image.putpixel((0, 0), (200, 200, 200) if mode == "RGB" else 100)
    shown = pixels(open_image(encoded(image, transparency=key)))
    assert (shown[1:] == 255).all() and ((shown[0, 0] < 255).all() or mode == "1")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_of_several(kind):
    first, second = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("RGB", (32, 32), (30, 30, 200))
    shown = open_image(encoded(first, kind, save_all=True, append_images=[second]))
    assert shown.size == (32, 32) and np.abs(pixels(shown) - pixels(first)).max() <= 12


def test_a_heic_of_a_phone(tmp_path):
    for index in range(3):
        image = ramp(size=(64, 48)) if index < 2 else ramp("RGBA", (64, 48))
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 1 else 1
        pillow_heif.from_pillow(image).save(tmp_path / f"IMG_{index}.HEIC", exif=exif.tobytes(), quality=95)
        shown = open_image(tmp_path / f"IMG_{index}.HEIC")
        assert shown.mode == "RGB" and np.abs(pixels(shown).mean() - pixels(image.convert("RGB")).mean()) < 3
    assert len(find_images(tmp_path, "instance_data_dir")) == 3


# --- damage -----------------------------------------------------------------------------------------------------------


@needs_faults
@pytest.mark.parametrize("name", ["exif_traceback_0.jpg", "exif_traceback_3.jpg"])
def test_an_odd_tag_beside_the_orientation(name):
    stored = Image.open(FAULTS / name)
    turn = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[exif_orientation(stored.info["exif"])]
    assert (pixels(open_image(FAULTS / name)) == pixels(stored.transpose(turn))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_read_whatever_stands_beside_it(kind):
    """A resolution that is text, a name that is a number, a pointer to nowhere."""
    entries = [(0x010F, 3, 1, 7), (0x0112, 3, 1, 6), (0x011A, 2, 4, 0x41414141), (0x8769, 4, 1, 0xFFFFFFF0)]
    block = b"II*\0" + struct.pack("<IH", 8, len(entries))
    block += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    if kind == "TIFF":  # which is such a block itself
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "camera"
        data = encoded(ramp(), kind, exif=exif)
        place = data.index(struct.pack("<HH", 0x010F, 2))
        data = data[:place] + struct.pack("<HHI", 0x010F, 12, 9) + data[place + 8 :]
    else:
        data = encoded(ramp(), kind, exif=b"Exif\0\0" + block)
    assert open_image(data).size == (32, 48)


@pytest.mark.parametrize("short", [0, 40])
def test_a_jpeg_whose_resolution_pillow_chokes_on(capsys, short):
    """It keeps its profile and its orientation, also where its end is missing."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128] = 6, 72.0, 2
    block = exif.tobytes()
    odd = block.replace(struct.pack(">HH", 0x011A, 5), struct.pack(">HH", 0x011A, 7))
    noisy = Image.effect_noise((96, 200), 60).convert("RGB")
    good, data = (encoded(noisy, "JPEG", icc_profile=P3, exif=some) for some in (block, odd))
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(data))
    shown, right = pixels(open_image(data[: len(data) - short], "x.jpg")), pixels(open_image(good))
    assert shown.shape == right.shape and (shown[:, 16:] == right[:, 16:]).all()
    assert ("last bytes are missing" in capsys.readouterr().err) == bool(short)


@needs_faults
def test_a_comfyui_picture_with_a_large_workflow():
    assert open_image(FAULTS / "bigtext" / "comfy.png").size == Image.open(FAULTS / "icc" / "adobe.png").size


def test_large_text_and_large_profiles_are_no_damage():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    big = icc(b"RGB ", b"mntr", dict(adobe_tags()) | {b"A2B9": tag(b"data", bytes(2_000_000))})
    data = encoded(ramp(), pnginfo=info, icc_profile=big)
    assert np.abs(pixels(open_image(data)) - by_littlecms(ramp(), ADOBE)).max() <= 1


def adobe_tags():
    count = struct.unpack_from(">I", ADOBE, 128)[0]
    for place in range(132, 132 + 12 * count, 12):
        name, start, size = struct.unpack_from(">4sII", ADOBE, place)
        yield name, ADOBE[start : start + size]


def test_damaged_text_costs_neither_the_picture_nor_its_colors():
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(ramp(), icc_profile=ADOBE, exif=exif)
    text = struct.pack(">I", 4) + b"tEXtabcd" + b"\0\0\0\0"  # its checksum is wrong
    assert (pixels(open_image(good[:33] + text + good[33:])) == pixels(open_image(good))).all()


def test_too_large_a_picture_is_named(tmp_path):
    header = struct.pack(">II5B", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "poster.png").write_bytes(with_chunks(data, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")))
    with pytest.raises(ValueError, match="poster.png is too large: pictures of up to 179 megapixels are read"):
        open_image(tmp_path / "poster.png")


def test_jpegs_that_viewers_open(tmp_path, capsys):
    """Without the end mark, with a few bytes less, with something behind, under another ending."""
    noisy = Image.effect_noise((96, 200), 60).convert("RGB")
    whole = encoded(noisy, "JPEG", icc_profile=ADOBE)
    right = pixels(open_image(whole))
    for name, data in {
        "a.jfif": whole,
        "b.JPE": whole[:-2],
        "c.png": whole + b"\0" * 999,
        "d.jpg": whole + whole,
    }.items():
        (tmp_path / name).write_bytes(data)
        assert (pixels(open_image(tmp_path / name)) == right).all(), name
    assert capsys.readouterr().err == ""
    shown = pixels(open_image(whole[:-40], "short.jpg"))
    assert (shown[:184] == right[:184]).all() and "short.jpg: its last bytes are missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="half.jpg is broken or cut off"):
        open_image(whole[: len(whole) * 3 // 4], "half.jpg")


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 199), st.binary(min_size=1, max_size=12), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_no_exif_block_is_a_traceback(place, content, kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "camera", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    block = bytearray(exif.tobytes())
    place %= len(block)
    block[place : place + len(content)] = content
    shown = open_image(encoded(ramp(), kind, exif=bytes(block)))
    turned = exif_orientation(bytes(block)) in (5, 6, 7, 8)
    assert shown.size == ((32, 48) if turned else (48, 32)) or kind == "PNG"


# --- names, links, captions and masks ---------------------------------------------------------------------------------


def config(**options) -> TrainConfig:
    given = {"pretrained_model_name_or_path": "base", "instance_prompt": "a photo of [V] cat", "resolution": 32}
    return TrainConfig.of(**(given | options))


def examples(**options):
    one = config(**options)
    return find_examples(one.data, None, read_concepts(one.data, one.prior))


def save(folder, *names, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new(mode, (40, 30), (number * 20, 90, 200) if mode == "RGB" else 255).save(folder / name)
    return folder


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("picture", "other"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_folder_that_was_zipped_on_a_mac(tmp_path, picture, other):
    save(tmp_path / "cat", f"{picture}.png", "b.png")
    (tmp_path / "cat" / f"{other}.txt").write_text("[V] cat at a table")
    save(tmp_path / "masks", f"{other}.png", "b.png", mode="L")
    found = examples(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))
    assert {one.prompt for one in found} == {"a photo of [V] cat", "[V] cat at a table"}
    assert {one.image.stem: one.mask.stem for one in found} == {picture: other, "b": "b"}
    (tmp_path / "cat" / f"{other}.txt").unlink()
    line = {"file_name": f"{other}.png", "text": "[V] cat outside"}
    (tmp_path / "cat" / "metadata.jsonl").write_text(json.dumps(line))
    assert "[V] cat outside" in {one.prompt for one in examples(instance_data_dir=str(tmp_path / "cat"))}


def test_two_pictures_whose_names_differ_by_spelling_alone_keep_their_captions(tmp_path):
    save(tmp_path, f"{COMPOSED}.png", f"{DECOMPOSED}.png")
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / f"{name}.txt").write_text(f"[V] {len(name)}")
    assert [one.prompt for one in examples(instance_data_dir=str(tmp_path))] == ["[V] 5", "[V] 4"]


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.jsonl"])
def test_a_broken_link_is_named(tmp_path, name):
    save(tmp_path / "cat", "a.png")
    (tmp_path / "cat" / name).symlink_to(tmp_path / "gone" / name)
    with pytest.raises(ValueError, match=f"{name} is a broken link: mend it"):
        examples(instance_data_dir=str(tmp_path / "cat"))


def test_links_to_pictures_and_hidden_broken_ones_are_fine(tmp_path):
    save(tmp_path / "real", "a.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "cat" / ".#lock").symlink_to("nobody@nowhere")  # Emacs's
    assert len(examples(instance_data_dir=str(tmp_path / "cat"))) == 1


def test_masks_are_no_colors(tmp_path):
    """A profile is not applied to a mask, and its own orientation is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp("L").save(tmp_path / "m.png", icc_profile=GRAY, exif=exif)
    assert (pixels(open_mask(tmp_path / "m.png")) == pixels(ramp("L").transpose(Image.Transpose.ROTATE_270))).all()
    for mode in ("1", "L", "P", "RGB", "RGBA", "I;16", "CMYK", "F"):
        white = (
            Image.fromarray(np.full((4, 4), 65535, np.uint16))
            if mode == "I;16"
            else Image.new("L", (4, 4), 255).convert(mode)
        )
        assert (pixels(open_mask(encoded(white, "TIFF"))) == 255).all(), mode


def test_held_out_pictures_have_their_own_captions_and_masks(tmp_path):
    save(tmp_path / "cat", "a.png")
    save(tmp_path / "held", "h.png", "i.png")
    (tmp_path / "held" / "h.txt").write_text("[V] cat asleep")
    save(tmp_path / "masks", "a.png", "h.png", "i.png", mode="L")
    options = {"instance_data_dir": str(tmp_path / "cat"), "mask_data_dir": str(tmp_path / "masks")}
    one = config(**options)
    found = read_pictures(one.data, one.prior, 8, held_out_dir=str(tmp_path / "held")).held_out
    assert [picture.example.prompt for picture in found] == ["[V] cat asleep", "a photo of [V] cat"]
    assert [picture.example.mask.name for picture in found] == ["h.png", "i.png"] and found[0].mask_digest
    (tmp_path / "masks" / "i.png").unlink()
    with pytest.raises(ValueError, match="no mask for i.png"):
        read_pictures(one.data, one.prior, 8, held_out_dir=str(tmp_path / "held"))
    Image.new("L", (40, 30), 0).save(tmp_path / "masks" / "i.png")
    with pytest.raises(ValueError, match="i.png masks out all"):
        read_pictures(one.data, one.prior, 8, held_out_dir=str(tmp_path / "held"))


def test_a_mask_is_not_taken_for_another_picture_of_the_same_name(tmp_path):
    masks = save(tmp_path / "masks", "a.png", mode="L")
    trained = examples(instance_data_dir=str(save(tmp_path / "cat", "a.png")), mask_data_dir=str(masks))
    save(tmp_path / "held", "a.png")
    with pytest.raises(ValueError, match="--validation_data_dir has a.png, and .*cat/a.png has the same name"):
        held_out_examples(tmp_path / "held", "x", mask_data_dir=str(masks), trained=trained)
    found = held_out_examples(tmp_path / "cat", "x", mask_data_dir=str(masks), trained=trained)  # the very same picture
    assert [one.mask.name for one in found] == ["a.png"]


def test_held_out_pictures_without_masks_are_said(tmp_path, capsys):
    save(tmp_path / "cat", "a.png")
    save(tmp_path / "masks", "a.png", mode="L")
    one = config(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))
    read_pictures(one.data, one.prior, 8, held_out_dir=str(save(tmp_path / "held", "h.png")))
    assert "the validation loss counts everywhere" in capsys.readouterr().err


def test_the_validation_loss_is_of_their_own_captions_and_masks(tmp_path):
    """And what is measured of the base before training doesn't know them."""
    save(tmp_path / "cat", "a.png")
    save(tmp_path / "held", "h.png")
    (tmp_path / "held" / "h.txt").write_text("[V] cat asleep")
    save(tmp_path / "masks", "a.png", "h.png", mode="L")
    Image.new("L", (40, 30), 128).save(tmp_path / "masks" / "h.png")
    one = config(instance_data_dir=str(tmp_path / "cat"), mask_data_dir=str(tmp_path / "masks"))
    pipeline = build_pipeline()

    def encode(**options):
        pictures = read_pictures(one.data, one.prior, 8, **options)
        return encode_run(pipeline, pictures, Accelerator(cpu=True), cache_dir=tmp_path / "encoded")

    without, encoded = encode(), encode(held_out_dir=str(tmp_path / "held"))
    (picture,) = encoded.held_out
    asleep = pipeline.tokenizer("[V] cat asleep").input_ids
    assert encoded.tokens[0]["input_ids"][picture.prompt, : len(asleep)].tolist() == asleep
    assert picture.mask is not None and abs(float(picture.mask.mean()) - 128 / 255) < 0.01
    for one_, other in zip(without.calibration_tokens, encoded.calibration_tokens):
        assert torch.equal(one_["input_ids"], other["input_ids"])


def test_a_strip_that_no_memory_holds_is_refused(tmp_path):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "strip.png")
    one = config(instance_data_dir=str(tmp_path), resolution=1024)
    with pytest.raises(ValueError, match="strip.png is 60000 x 1, which would be enlarged to 61440000 x 1024"):
        read_pictures(one.data, one.prior, 8)


# --- names of drawn pictures ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=120), min_size=1, max_size=4, unique=True
    )
)
def test_names_of_drawn_pictures_fit_every_file_system(prompts):
    """Fancy letters take four bytes each, and a lower case may be longer than its capital."""
    names = image_names(prompts)
    assert len(set(names.values())) == len(prompts)
    for name in names.values():
        longest = f"{name}-seed{MAX_SEED}-scale-0.30000000000000004-{text_digest(name)}.png"
        assert len(longest.encode()) < 143 and name and not set(name) & set("/\\:\0")


def test_pictures_of_fancy_and_japanese_prompts_are_written(tmp_path):
    for prompt in ("\U0001d4d0" * 80, "猫" * 80, "ﷺ" * 60, "é" * 100, "İ" * 60):
        write_image(
            tmp_path, {"file": f"{image_names([prompt])[prompt]}-seed0.png", "adapter": None}, Image.new("RGB", (4, 4))
        )
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_a_file_whose_name_is_as_long_as_names_can_be(tmp_path):
    for name in ("g" * 250 + ".html", "猫" * 83 + ".json"):
        assert write_atomic(tmp_path / name, "x").read_text() == "x"


def test_a_method_with_an_endless_name_is_refused_before_training():
    with pytest.raises(ValueError, match="is longer than 200 bytes: give it a shorter name"):
        plan(CompareConfig(methods=["n" * 201 + "=--method nora"], output_dir="x"), [])
