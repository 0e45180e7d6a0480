"""The pictures of the class, where prior preservation trains on them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from storage.pictures import images_in

_DRAWN = re.compile(r"class-([0-9a-f]{8})-seed\d{6}\.png")


def class_image_name(class_prompt: str, seed: int) -> str:
    """The file of a drawn class image; it says which prompt it was drawn for."""
    return f"class-{hashlib.sha256(class_prompt.encode()).hexdigest()[:8]}-seed{seed:06d}.png"


def class_images(folder: str | Path, class_prompt: str) -> list[Path]:
    """The class images that are there: the user's own, then those drawn for this prompt, not for another."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    wanted = _DRAWN.fullmatch(class_image_name(class_prompt, 0))[1]
    drawn_for = {path: _DRAWN.fullmatch(path.name) for path in images_in(folder)}
    own = [path for path, match in drawn_for.items() if match is None]
    return own + [path for path, match in drawn_for.items() if match is not None and match[1] == wanted]


def is_drawn(name: str) -> bool:
    """Whether a run drew the class image of this name."""
    return _DRAWN.fullmatch(name) is not None


def missing_seeds(folder: str | Path, class_prompt: str, wanted: int) -> list[int]:
    """Seeds of the class images that have to be drawn, so that the folder has ``wanted`` in all."""
    names = {path.name for path in class_images(folder, class_prompt)}
    own = len([name for name in names if not _DRAWN.fullmatch(name)])
    return [seed for seed in range(wanted - own) if class_image_name(class_prompt, seed) not in names]
