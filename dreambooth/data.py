"""The pictures and captions of a run, from folders or Hugging Face datasets; and how a picture is read and cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image, ImageOps

from storage.pictures import CAPTION_SUFFIXES, METADATA, find_images

from .config import TrainConfig


@dataclass(frozen=True)
class Concept:
    """One subject and its class: what a run is told once, or once per entry of ``--concepts_list``."""

    instance_data_dir: str | None
    instance_prompt: str
    class_data_dir: str | None = None
    class_prompt: str | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Example:
    """One picture with its words."""

    image: Path | bytes  # a file, or the encoded picture itself from a dataset
    name: str  # for messages
    prompt: str
    concept: int = 0
    repeats: int = 1
    mask: Path | None = None

    def read(self) -> bytes:
        """The encoded picture."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()


# --- finding pictures -------------------------------------------------------------------------------------------------


def read_concepts(config: TrainConfig) -> list[Concept]:
    """The subjects of a run: one from the flags, or those of ``--concepts_list``.

    Raises:
        ValueError: if the list can't be read, or an entry lacks something or has something unknown.
    """
    if config.concepts_list is None:
        return [
            Concept(
                config.instance_data_dir,
                config.instance_prompt,
                config.class_data_dir,
                config.class_prompt,
                config.repeats,
            )
        ]
    flag = f"--concepts_list {config.concepts_list}"
    try:
        entries = yaml.safe_load(Path(config.concepts_list).read_text(encoding="utf-8"))  # JSON is YAML too
    except OSError as error:
        raise ValueError(f"{flag} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} is neither JSON nor YAML: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{flag} must be a list of subjects, each with instance_data_dir and instance_prompt")
    known = set(Concept.__dataclass_fields__)
    needed = ["instance_data_dir", "instance_prompt"]
    if config.with_prior_preservation:
        needed += ["class_prompt"] if config.prior_teacher else ["class_prompt", "class_data_dir"]
    for number, entry in enumerate(entries, start=1):
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"{flag}: entry {number} has {unknown[0]}, which is none of {', '.join(sorted(known))}")
        if missing := [name for name in needed if not str(entry.get(name) or "").strip()]:
            raise ValueError(f"{flag}: entry {number} lacks {missing[0]}")
        if type(entry.get("repeats", 1)) is not int or entry.get("repeats", 1) < 1:
            raise ValueError(f"{flag}: entry {number} has repeats {entry['repeats']}, and 1 is the least")
    return [Concept(**{"repeats": config.repeats, **entry}) for entry in entries]


def find_examples(config: TrainConfig, concepts: Sequence[Concept]) -> list[Example]:
    """The instance pictures of all concepts with their captions, else the instance prompt.

    Raises:
        ValueError: for a folder, dataset, caption or mask that is missing or can't be read.
    """
    if config.dataset_name is not None:
        return dataset_examples(config)
    return [
        example
        for number, concept in enumerate(concepts)
        for example in folder_examples(
            concept.instance_data_dir,
            concept.instance_prompt,
            concept=number,
            repeats=concept.repeats,
            caption_column=config.caption_column,
            mask_data_dir=config.mask_data_dir,
        )
    ]


def folder_examples(
    folder: str | Path,
    prompt: str,
    *,
    concept: int = 0,
    repeats: int = 1,
    caption_column: str | None = None,
    mask_data_dir: str | None = None,
    flag: str = "instance_data_dir",
) -> list[Example]:
    """The pictures of a folder. A caption beside a picture, or in ``metadata.jsonl``, goes before the prompt."""
    paths = find_images(folder, flag)
    captions = read_metadata(Path(folder) / METADATA, {path.name for path in paths}, caption_column)
    masks = masks_for(paths, mask_data_dir) if mask_data_dir else {}
    examples = []
    for path in paths:
        caption = captions.get(path.name) or caption_beside(path) or prompt
        examples.append(Example(path, str(path), caption, concept, repeats, masks.get(path)))
    return examples


def caption_beside(path: Path) -> str | None:
    """The text of ``cat.txt`` or ``cat.caption`` beside ``cat.png``; None where there is neither."""
    for suffix in CAPTION_SUFFIXES:
        file = path.with_suffix(suffix)
        if not file.is_file():
            continue
        try:
            caption = " ".join(file.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"caption {file} is not UTF-8 text: save it as UTF-8") from error
        if not caption:
            raise ValueError(f"caption {file} is empty: write what the picture shows, or delete the file")
        return caption
    return None


def read_metadata(path: Path, names: set[str], caption_column: str | None) -> dict[str, str]:
    """Captions by file name from ``metadata.jsonl``, whose lines have file_name and text (or another column)."""
    if not path.is_file():
        return {}
    column, captions = caption_column or "text", {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            name, caption = record["file_name"], record[column]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: each line needs file_name and {column} (--caption_column)"
            ) from error
        if name not in names:
            raise ValueError(f"{path}, line {number}: there is no picture {name} in the folder")
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{path}, line {number}: the caption of {name} is empty")
        captions[name] = caption.strip()
    return captions


def masks_for(paths: Sequence[Path], folder: str | Path) -> dict[Path, Path]:
    """The mask of each picture: the file of the same stem in the mask folder."""
    by_stem = {path.stem: path for path in find_images(folder, "mask_data_dir")}
    missing = [path.name for path in paths if path.stem not in by_stem]
    if missing:
        raise ValueError(f"--mask_data_dir {folder} has no mask for {missing[0]}: every picture needs one of its name")
    return {path: by_stem[path.stem] for path in paths}


def dataset_examples(config: TrainConfig) -> list[Example]:
    """The train split of a Hugging Face dataset, from the Hub or a folder, each picture kept as it is encoded."""
    import datasets  # slow to import, and few runs need it

    where = f"--dataset_name {config.dataset_name}"
    try:
        loaded = datasets.load_dataset(config.dataset_name, config.dataset_config_name, cache_dir=config.cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{where} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for flag, column in (("image_column", config.image_column), ("caption_column", config.caption_column)):
        if column is not None and column not in split.column_names:
            raise ValueError(f"--{flag} {column} is not in {where}, whose columns are {', '.join(split.column_names)}")
    rows = split.cast_column(config.image_column, datasets.Image(decode=False))
    examples = []
    for number, row in enumerate(rows):
        image, name = row[config.image_column], f"{config.dataset_name}, row {number}"
        prompt = config.instance_prompt if config.caption_column is None else row[config.caption_column]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name} has no caption in column {config.caption_column}")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"])
        examples.append(Example(data, name, prompt, repeats=config.repeats))
    if not examples:
        raise ValueError(f"{where} is empty")
    return examples


# --- reading and cutting ----------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """What is cut out of a picture: resized to ``resized`` first, then this box, maybe mirrored. Pixels."""

    resized: tuple[int, int]  # height, width
    top: int
    left: int
    height: int
    width: int
    mirrored: bool

    def of(self, image: Image.Image, interpolation: str) -> Image.Image:
        height, width = self.resized
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
        image = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        return ImageOps.mirror(image) if self.mirrored else image

    def time_ids(self, original: tuple[int, int]) -> torch.Tensor:
        """(6,): original height, width; crop top, left; target height, width (SDXL, section 2.2).

        SDXL's crop is counted from the left as the picture is shown: a mirrored one from the other side.
        """
        left = self.resized[1] - self.left - self.width if self.mirrored else self.left
        return torch.tensor([*original, self.top, left, self.height, self.width], dtype=torch.float32)


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture of ``size`` resized to just cover ``target``, its shape kept."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))


def crops(
    size: tuple[int, int],
    target: tuple[int, int],
    *,
    center_crop: bool,
    random_flip: bool,
    variants: int,
    generator: torch.Generator,
) -> list[Crop]:
    """The different crops of one picture that a run trains on: at most ``variants``, at least one.

    Args:
        size, target: height and width, pixels.
    """
    resized = cover(size, target)
    free = resized[0] - target[0], resized[1] - target[1]
    found: list[Crop] = []
    for number in range(variants):
        if center_crop:
            top, left = free[0] // 2, free[1] // 2
        else:
            top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in free)
        flip = random_flip and bool(torch.randint(2, (), generator=generator))
        if random_flip and variants > 1:
            flip = bool(number % 2)  # half of them, and not by luck none
        found.append(Crop(resized, top, left, *target, flip))
    return list(dict.fromkeys(found))


def content_hash(*parts: Any) -> str:
    """SHA-256 of bytes, strings and numbers, each with its length, so that no two lists of parts agree by chance."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
