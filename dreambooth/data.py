"""Pictures from a folder: read, turned upright, made RGB, resized and cropped, with SDXL's size conditioning."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# What file managers leave behind without being asked.
LITTER = {"thumbs.db", "desktop.ini"}


class TrainingImage(NamedTuple):
    """One picture, ready for the autoencoder."""

    pixels: torch.Tensor  # (3, resolution, resolution) in [-1, 1]
    time_ids: torch.Tensor  # (6,): original height, width; crop top, left; target height, width (SDXL, section 2.2)


def find_images(folder: str | Path, flag: str) -> list[Path]:
    """The files of a folder, by name; hidden files and sub-folders are passed over.

    Raises:
        ValueError: no such folder, or nothing in it, naming the flag that it came from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"--{flag} {folder} {problem}: name the folder that holds the pictures")
    paths = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name.lower() not in LITTER]
    if not paths:
        raise ValueError(f"--{flag} {folder} holds no picture: put at least one PNG, JPEG or WebP file into it")
    return sorted(paths)


def open_image(path: Path) -> Image.Image:
    """Any picture that Pillow reads as upright RGB: EXIF orientation applied, transparency laid over white.

    Raises:
        ValueError: naming a file that is no picture, or a broken one.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read: take it out of the folder") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is broken or cut off ({error}): replace it or take it out of the folder") from error
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values * (255 / 65535)).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def prepare_image(image: Image.Image, resolution: int) -> TrainingImage:
    """Resize the shorter side to ``resolution`` (Lanczos) and cut the middle square."""
    width, height = image.size
    scale = resolution / min(width, height)
    resized = image.resize(
        (max(resolution, round(width * scale)), max(resolution, round(height * scale))), Image.LANCZOS
    )
    left, top = (resized.width - resolution) // 2, (resized.height - resolution) // 2
    square = resized.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)
    time_ids = torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)
    return TrainingImage(pixels, time_ids)
