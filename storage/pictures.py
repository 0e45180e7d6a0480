"""Pictures as users have them: any mode, rotated, transparent, 16 bits, cut off."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

# What file managers leave behind without being asked.
LITTER = {"thumbs.db", "desktop.ini"}
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """The files of a folder, by name, without captions; hidden files and sub-folders are passed over.

    Raises:
        ValueError: no such folder, or nothing in it, naming the flag that it came from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--{flag} {folder} {problem}: name the folder that holds the pictures")
    if not (paths := images_in(folder)):
        raise ValueError(f"--{flag} {folder} holds no picture: put at least one PNG, JPEG or WebP file into it")
    return paths


def images_in(folder: Path) -> list[Path]:
    """`find_images` of a folder that may have none."""
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name.lower() not in LITTER]
    stems = {path.stem for path in files if path.suffix.lower() not in CAPTION_SUFFIXES}
    return sorted(
        path
        for path in files
        if path.name != METADATA and not (path.suffix.lower() in CAPTION_SUFFIXES and path.stem in stems)
    )


def open_image(source: Path | bytes, name: str | None = None, keep_alpha: bool = False) -> Image.Image:
    """Any picture that Pillow reads as upright RGB: EXIF orientation applied, transparency laid over white.

    Args:
        name: what messages call it.
        keep_alpha: RGBA instead, colours as over white.

    Raises:
        ValueError: naming a file that is no picture, or a broken one.
    """
    name = name or str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read: take it out of the folder") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is broken or cut off ({error}): replace it or take it out of the folder") from error
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values * (255 / 65535)).round().clip(0, 255).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if keep_alpha:
        image.putalpha(alpha or Image.new("L", image.size, 255))
    return image


def png_bytes(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file's bytes.

    Args:
        text: metadata, by keyword; what tools show as the picture's parameters.
    """
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_itxt(keyword, value)
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=info)
    return stream.getvalue()
