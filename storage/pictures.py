"""Pictures as users have them: any mode, any colours, rotated, transparent, 16 bits, cut off."""

from __future__ import annotations

import functools
import io
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from storage.colors import UnreadableColors, to_srgb
from storage.decoding import Decoded, decode

# What file managers leave behind without being asked.
LITTER = {"thumbs.db", "desktop.ini"}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """The files of a folder, by name, without captions; hidden files and sub-folders are passed over.

    Raises:
        ValueError: no such folder, nothing in it, or a broken link, naming the flag that it came from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--{flag} {folder} {problem}: name the folder that holds the pictures")
    if not (paths := images_in(folder)):
        subjects = sorted(one for one in folder.iterdir() if one.is_dir() and images_in(one))
        if subjects:
            raise ValueError(f"--{flag} {folder} holds no picture: name one of its folders, such as {subjects[0]}")
        raise ValueError(f"--{flag} {folder} holds no picture: put at least one PNG, JPEG or WebP file into it")
    return paths


def images_in(folder: Path) -> list[Path]:
    """`find_images` of a folder that may have none."""
    seen = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name.lower() not in LITTER]
    if broken := sorted(path.name for path in seen if path.is_symlink() and not path.exists()):
        others = f", and so are {len(broken) - 1} others" if broken[1:] else ""
        raise ValueError(f"{folder / broken[0]} is a broken link{others}: mend it, or take it out of the folder")
    files = [path for path in seen if path.is_file()]
    stems = {composed(path.stem) for path in files if path.suffix.lower() not in CAPTION_SUFFIXES}
    return sorted(
        path
        for path in files
        if path.name != METADATA and not (path.suffix.lower() in CAPTION_SUFFIXES and composed(path.stem) in stems)
    )


def composed(name: str) -> str:
    """A name as names are compared (NFC): "é" is one letter or two, and copying to a Mac and back changes which."""
    return unicodedata.normalize("NFC", name)


def open_image(source: Path | bytes, name: str | None = None, keep_alpha: bool = False) -> Image.Image:
    """Any picture that Pillow reads, as viewers show it: the first frame, upright, sRGB, transparency laid over white.

    Of what lies beside the pixels only the orientation and the colours matter (`storage.colors`): whatever else is
    damaged there, the picture is read. A profile that can't be applied is passed over, with a warning.

    Args:
        name: what messages call it.
        keep_alpha: RGBA instead, colours as over white.

    Raises:
        ValueError: naming a file that is no picture, a broken one, or one that is too large.
    """
    decoded, name = _decode(source, name)
    image, alpha = _split_alpha(_eight_bits(decoded.image, name))
    try:
        image = to_srgb(image, decoded.info, decoded.adobe)
    except UnreadableColors as error:
        _warn(f"{name}: {error}: its colours are taken as they are")
        image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if keep_alpha:
        image.putalpha(alpha or Image.new("L", image.size, 255))
    return image


def open_mask(source: Path | bytes, name: str | None = None) -> Image.Image:
    """A picture whose numbers are no colours, as upright gray: no profile is applied; transparency laid over white."""
    decoded, name = _decode(source, name)
    image, alpha = _split_alpha(_eight_bits(decoded.image, name))
    image = image.convert("RGB").convert("L")  # CMYK and palettes have no direct way
    if alpha is not None:
        image = Image.composite(image, Image.new("L", image.size, 255), alpha)
    return image


def _decode(source: Path | bytes, name: str | None) -> tuple[Decoded, str]:
    """The picture, and what messages call it."""
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    decoded = decode(source if isinstance(source, bytes) else source.read_bytes(), name)
    if decoded.problem:
        _warn(f"{name}: {decoded.problem}")
    return decoded, name


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Gray of 16 or 32 bits with 255 as white, where Pillow's own conversion cuts off at 255.

    White is 65535 in 16 bits. Of 32-bit numbers nothing says it: it is the first of 1 (floats only), 255 and 65535
    that no value exceeds.

    Raises:
        ValueError: for values that fit none of these.
    """
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image).astype(np.float64)
    whites = [65535] if ";16" in image.mode else [1, 255, 65535] if image.mode == "F" else [255, 65535]
    sound = bool(np.isfinite(values).all()) and values.min() >= 0
    white = next((white for white in whites if sound and values.max() <= white), None)
    if white is None:
        raise ValueError(
            f"{name} has values from {np.nanmin(values):g} to {np.nanmax(values):g}, of which it isn't said what is "
            "white: save it with 8 or 16 bits a channel"
        )
    gray = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if isinstance(key := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours as they are, not blended, and the alpha channel; RGB, L, CMYK or LAB."""
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image if image.mode in ("L", "CMYK", "LAB") else image.convert("L" if image.mode == "1" else "RGB"), None


@functools.cache  # a picture is opened often, and said to be strange once
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


SOFTWARE = "NoRA training suite"  # what a PNG of ours says that it was made by; an editor puts its own name there


def png_text(path: Path) -> dict[str, str]:
    """The metadata of a PNG by keyword; {} where it has none, or is none."""
    try:
        with Image.open(path) as file:
            return {name: str(value) for name, value in getattr(file, "text", {}).items()}
    except Exception:  # damaged, or something else
        return {}


def drawn_here(path: Path) -> bool:
    """Whether a picture was written by this suite and by nothing else since: only then it may be replaced."""
    text = png_text(path)
    return text.get("Software") == SOFTWARE or text.get("command", "").startswith("python -m inference.generate")


def png_bytes(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file's bytes, which say that this suite made it.

    Args:
        text: metadata, by keyword; what tools show as the picture's parameters.
    """
    info = PngInfo()
    for keyword, value in ({"Software": SOFTWARE} | dict(text or {})).items():
        info.add_itxt(keyword, value)
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()
