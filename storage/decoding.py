"""Bytes of a picture -> its pixels upright, and what says how its colours are meant.

Viewers open more than Pillow does. So a PNG or JPEG that Pillow refuses is tried again without what lies beside its
pixels, and a JPEG whose last bytes are missing is read.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pillow_heif
from PIL import ExifTags, Image, ImageChops, PngImagePlugin, UnidentifiedImageError

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses more: half a gigabyte of memory
LAST_ROWS = 16  # of a JPEG: its largest blocks; that much may be missing
# Compressed text or a profile in a PNG: Pillow stops at a megabyte, which a workflow or a printer's profile exceeds.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_PNG, _JPEG, _END_OF_JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
_APP1, _APP15, _COMMENT, _START_OF_SCAN = 0xE1, 0xEF, 0xFE, 0xDA  # markers of JPEG
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_PNG_COLORS = {b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoded:
    """A picture as its file has it, upright."""

    image: Image.Image  # any mode
    info: dict[str, Any]  # Pillow's; also "cicp", the content of that chunk
    adobe: bool = False  # a camera says beside it that it is in Adobe RGB
    problem: str | None = None  # what of it could not be read, and was left out


def decode(data: bytes, name: str) -> Decoded:
    """The first frame of a picture.

    Raises:
        ValueError: naming one that is no picture, is broken or cut off, or has more than `MOST_PIXELS`.
    """
    _register_heif()
    try:
        with warnings.catch_warnings():  # of large pictures and odd metadata
            warnings.simplefilter("ignore")
            return _decode(data)
    except UnidentifiedImageError as error:
        wrong = "is broken" if data.startswith((_PNG, _JPEG)) else "is not a picture that can be read"
        raise ValueError(f"{name} {wrong}: take it out of the folder") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large: pictures of up to {MOST_PIXELS / 1e6:.0f} megapixels are read; make it smaller"
        ) from error
    except MemoryError as error:
        raise ValueError(f"{name} is too large for this machine's memory: make it smaller") from error
    except Exception as error:  # decoders of damaged files raise anything, from struct.error to ZeroDivisionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is broken or cut off ({reason}): replace it or take it out of the folder") from error


def _decode(data: bytes) -> Decoded:
    try:
        return _load(data)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        if data.startswith(_PNG):  # damaged or huge text is left out, and if that was not all, everything
            with contextlib.suppress(Exception):
                return _load(_png_of(data, _PNG_PIXELS | _PNG_COLORS))
            return _load(_png_of(data, _PNG_PIXELS), "its profile or its EXIF is damaged, and is passed over")
        if data.startswith(_JPEG):  # the same of a JPEG, and then an end that is missing
            bare, exif = _bare_jpeg(data)
            with contextlib.suppress(Exception):
                return _load(bare, exif=exif)
            if image := _cut_off_jpeg(bare, exif):
                return image
        raise


def _load(data: bytes, problem: str | None = None, exif: bytes | None = None) -> Decoded:
    """What Pillow reads.

    Args:
        exif: a block that stood beside it.
    """
    with Image.open(io.BytesIO(data)) as file:
        if exif is not None:
            file.info["exif"] = exif
        if file.format == "TIFF":
            _keep_orientation_alone(file)
        file.load()
        info = dict(file.info)
        if file.format == "PNG" and (chunk := dict(_png_chunks(data)).get(b"cICP")):
            info["cicp"] = tuple(chunk[8:12])
        turn = _UPRIGHT.get(_orientation(file))
        return Decoded(file.transpose(turn) if turn is not None else file.copy(), info, _is_adobe(file), problem)


def _cut_off_jpeg(data: bytes, exif: bytes | None) -> Decoded | None:
    """A JPEG whose end is missing, if no more than its last rows are, which are then gray.

    What a decoder makes of the missing part depends on what stands there instead, and nothing else does.
    """
    plain, *filled = (
        Image.open(io.BytesIO(data + filler * 4096 + _END_OF_JPEG)).convert("RGB") for filler in (b"", b"\0", b"\xaa")
    )
    lost = [box for image in filled if (box := ImageChops.difference(plain, image).getbbox())]
    if any(top < plain.height - LAST_ROWS for _, top, _, _ in lost):
        return None
    return _load(data + _END_OF_JPEG, "its last bytes are missing, and its end may be gray" if lost else None, exif)


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes | None]:
    """A JPEG with no more than its pixels, its ICC profile and how its colours are stored; and its EXIF block."""
    kept, exif, place = [data[:2]], None, 2
    while place + 4 <= len(data):
        start, marker, length = struct.unpack_from(">BBH", data, place)
        if start != 0xFF or marker == _START_OF_SCAN:
            break
        segment = data[place : place + 2 + length]
        if marker == _APP1 and segment[4:].startswith(b"Exif\0\0"):
            exif = exif or segment[4:]
        elif not (_APP1 <= marker <= _APP15 or marker == _COMMENT) or segment[4:].startswith(
            (b"ICC_PROFILE", b"Adobe")
        ):
            kept.append(segment)
        place += 2 + length
    return b"".join([*kept, data[place:]]), exif


def _png_of(data: bytes, kinds: set[bytes]) -> bytes:
    return _PNG + b"".join(chunk for kind, chunk in _png_chunks(data) if kind in kinds)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, whole chunk) of a PNG, as far as it goes."""
    place = len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, data[place : place + length + 12]
        place += length + 12


def _orientation(file: Image.Image) -> int:
    """EXIF's orientation from 1 to 8; 1 where there is none. Other tags may be damaged: they are not looked at."""
    found = exif_orientation(file.info["exif"]) if isinstance(file.info.get("exif"), bytes) else None
    if found is None:
        try:  # as text in a PNG, in XMP, or in what a TIFF is made of
            found = file.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged
            found = None
    return found if found in _UPRIGHT else 1


def exif_orientation(exif: bytes) -> int | None:
    """The orientation of an EXIF block; None where it has none (EXIF 2.32, 4.6.4)."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == ExifTags.Base.Orientation and kind in (3, 4):  # a number of 16 or 32 bits
                return struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", exif, entry + 8)[0]
    except struct.error:  # it ends before
        pass
    return None


def _keep_orientation_alone(file: Image.Image) -> None:
    """Take every other EXIF tag off a TIFF, which Pillow would write anew while it turns the picture upright."""
    try:
        exif = file.getexif()
        for tag in set(exif) - {ExifTags.Base.Orientation}:
            del exif[tag]
    except Exception:  # damaged
        pass


def _is_adobe(file: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB as cameras do: by the index of DCF 2.0, or by a colour space of 2."""
    try:
        exif = file.getexif()
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
        space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
    except Exception:  # damaged
        return False
    return space == 2 or (space != 1 and str(index).strip("\0 ") == "R03")


@functools.cache
def _register_heif() -> None:
    pillow_heif.register_heif_opener()
