"""The pictures and captions of a run, from folders or Hugging Face datasets; and how a picture is read and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from settings.pictures import DataOptions, PriorOptions
from settings.record import MOST
from storage.pictures import CAPTION_SUFFIXES, METADATA, composed, find_images
from storage.text import check_text, expand_home, first_line, load_yaml, parse_json, read_text


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


def read_concepts(data: DataOptions, prior: PriorOptions) -> list[Concept]:
    """The subjects of a run: one from the flags, or those of ``--concepts_list``.

    Raises:
        ValueError: if the list can't be read, or an entry lacks something or has something unknown.
    """
    if data.concepts_list is None:
        subject, of_class = (data.instance_data_dir, data.instance_prompt), (prior.class_data_dir, prior.class_prompt)
        return [Concept(*subject, *of_class, data.repeats)]
    flag = f"--concepts_list {data.concepts_list}"
    try:
        entries = load_yaml(data.concepts_list, "--concepts_list")
    except OSError as error:
        raise ValueError(f"{flag} can't be read: {error.strerror}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{flag} must be a list of subjects, each with instance_data_dir and instance_prompt")
    known = set(Concept.__dataclass_fields__)
    needed = ["instance_data_dir", "instance_prompt"]
    if prior.with_prior_preservation:
        needed += ["class_prompt"] if prior.prior_teacher else ["class_prompt", "class_data_dir"]
    for number, entry in enumerate(entries, start=1):
        if unknown := sorted(map(str, set(entry) - known)):
            raise ValueError(f"{flag}: entry {number} has {unknown[0]}, which is none of {', '.join(sorted(known))}")
        if missing := [name for name in needed if not str(entry.get(name) or "").strip()]:
            raise ValueError(f"{flag}: entry {number} lacks {missing[0]}")
        for name in known - {"repeats"}:
            if not isinstance(entry.get(name), str | None):
                raise ValueError(f"{flag}: entry {number} has {name} {entry[name]!r}: write it as a text, in quotes")
    return [_concept(entry, data.repeats, f"{flag}: entry {number}") for number, entry in enumerate(entries, start=1)]


def _concept(entry: dict[str, Any], repeats: int, where: str) -> Concept:
    """An entry of ``--concepts_list``; ``repeats`` is what it has where it doesn't say."""
    values = {name: value for name, value in entry.items() if value is not None}
    try:
        values["repeats"] = int(str(values.get("repeats", repeats)))
    except ValueError:
        values["repeats"] = 0
    if not 1 <= values["repeats"] <= MOST:
        raise ValueError(f"{where} has repeats {entry['repeats']}: from 1 to {MOST} work")
    for name in values.keys() - {"repeats"}:
        check_text(values[name], f"{where} has {name}")
    for name in values.keys() & {"instance_data_dir", "class_data_dir"}:
        try:
            values[name] = expand_home(values[name])
        except ValueError as error:
            raise ValueError(f"{where} has {name} {values[name]}, which {error}") from error
    return Concept(**values)


def find_examples(data: DataOptions, cache_dir: str | None, concepts: Sequence[Concept]) -> list[Example]:
    """The instance pictures of all concepts with their captions, else the instance prompt.

    Args:
        cache_dir: where a dataset of the Hub is kept.

    Raises:
        ValueError: for a folder, dataset, caption or mask that is missing or can't be read.
    """
    if data.dataset_name is not None:
        return dataset_examples(data, cache_dir)
    if data.caption_column and not any((Path(one.instance_data_dir) / METADATA).is_file() for one in concepts):
        raise ValueError(f"--caption_column {data.caption_column} needs a {METADATA} beside the pictures: leave it out")
    return [
        example
        for number, concept in enumerate(concepts)
        for example in folder_examples(
            concept.instance_data_dir,
            concept.instance_prompt,
            concept=number,
            repeats=concept.repeats,
            caption_column=data.caption_column,
            mask_data_dir=data.mask_data_dir,
            flag=source_flag(data.concepts_list, number, "instance_data_dir"),
        )
    ]


def source_flag(concepts_list: str | None, concept: int, name: str) -> str:
    """What messages call a folder of a subject: its flag, or its place in the list."""
    return name if concepts_list is None else f"concepts_list {concepts_list}: entry {concept + 1}'s {name}"


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
    beside = by_picture([path for path in Path(folder).iterdir() if path.suffix.lower() in CAPTION_SUFFIXES], paths)
    masks = masks_for(paths, mask_data_dir) if mask_data_dir else {}
    examples = []
    for path in paths:
        caption = captions.get(path.name) or (read_caption(beside[path]) if path in beside else prompt)
        examples.append(Example(path, str(path), caption, concept, repeats, masks.get(path)))
    return examples


def by_picture(files: Sequence[Path], pictures: Sequence[Path]) -> dict[Path, Path]:
    """Picture -> the caption or mask ``cat.*`` that stands for ``cat.png``.

    Raises:
        ValueError: if a picture has two of them.
    """
    found: dict[Path, Path] = {}
    named: dict[str, list[Path]] = {}
    for file in sorted(files):
        named.setdefault(composed(file.stem), []).extend([file] if file.is_file() else [])
    for picture in pictures:
        own = named.get(composed(picture.stem), [])
        own = [file for file in own if file.stem == picture.stem] or own
        if len(own) > 1:
            raise ValueError(f"{own[0]} and {own[1]} are for the same picture: delete one")
        if own:
            found[picture] = own[0]
    return found


def read_caption(file: Path) -> str:
    caption = " ".join(line.strip() for line in read_text(file, "caption").split("\n") if line.strip())
    if not caption:
        raise ValueError(f"caption {file} is empty: write what the picture shows, or delete the file")
    return caption


def read_metadata(path: Path, names: set[str], caption_column: str | None) -> dict[str, str]:
    """Captions by file name from ``metadata.jsonl``, whose lines have file_name and text (or another column)."""
    if not path.is_file():
        return {}
    column, captions = caption_column or "text", {}
    known = {composed(name): name for name in names}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            name, caption = record["file_name"], record[column]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: each line needs file_name and {column} (--caption_column)"
            ) from error
        if isinstance(name, str) and name not in names:
            name = known.get(composed(name), name)
        if not isinstance(name, str) or name not in names:
            raise ValueError(f"{path}, line {number}: there is no picture {name} in the folder")
        if name in captions:
            raise ValueError(f"{path}, line {number}: {name} has a caption already: delete one")
        captions[name] = check_caption(caption, f"{path}, line {number}: the caption of {name}")
    return captions


def check_caption(caption: Any, what: str) -> str:
    """The caption of a record, which messages call ``what``, without the spaces around it.

    Raises:
        ValueError: if it is no text, or none that can be trained on.
    """
    if not isinstance(caption, str | None):
        kind = "a list" if isinstance(caption, list) else repr(caption)
        raise ValueError(f"{what} is {kind}, and a picture has one text: name another --caption_column")
    if caption is None or not caption.strip():
        raise ValueError(f"{what} is empty: write what the picture shows")
    return check_text(caption, what).strip()


def masks_for(paths: Sequence[Path], folder: str | Path) -> dict[Path, Path]:
    """The mask of each picture: the file of the same stem in the mask folder."""
    masks = by_picture(find_images(folder, "mask_data_dir"), paths)
    missing = [path.name for path in paths if path not in masks]
    if missing:
        raise ValueError(f"--mask_data_dir {folder} has no mask for {missing[0]}: every picture needs one of its name")
    return masks


def held_out_examples(
    folder: str | Path,
    prompt: str,
    *,
    caption_column: str | None = None,
    mask_data_dir: str | None = None,
    trained: Sequence[Example] = (),
) -> list[Example]:
    """Pictures for the validation loss, with their own captions; and their masks, where the folder of masks has them.

    Args:
        prompt: of those without a caption.
        trained: the pictures that are trained on, which masks are told from by name.

    Raises:
        ValueError: as for `folder_examples`; also if a mask may belong to a trained picture, or only some have one.
    """
    flag = "validation_data_dir"
    examples = folder_examples(folder, prompt, caption_column=caption_column, flag=flag)
    paths = find_images(folder, flag)
    if mask_data_dir is None or not by_picture(find_images(mask_data_dir, "mask_data_dir"), paths):
        return examples
    masks = masks_for(paths, mask_data_dir)
    owners = {one.mask: one.image for one in trained}
    for path in paths:
        owner = owners.get(masks[path])
        if isinstance(owner, Path) and owner.resolve() != path.resolve():
            raise ValueError(
                f"--{flag} has {path.name}, and {owner} has the same name: which of them --mask_data_dir's "
                f"{masks[path].name} belongs to isn't said; rename one"
            )
    return [replace(one, mask=masks[path]) for one, path in zip(examples, paths)]


def dataset_examples(data: DataOptions, cache_dir: str | None) -> list[Example]:
    """The train split of a Hugging Face dataset, from the Hub or a folder, each picture kept as it is encoded."""
    import datasets  # slow to import, and few runs need it

    where = f"--dataset_name {data.dataset_name}"
    try:
        loaded = datasets.load_dataset(data.dataset_name, data.dataset_config_name, cache_dir=cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{where} can't be loaded: {first_line(error)}") from error
    split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for flag, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column is not None and column not in split.column_names:
            raise ValueError(f"--{flag} {column} is not in {where}, whose columns are {', '.join(split.column_names)}")
    try:
        rows = list(split.cast_column(data.image_column, datasets.Image(decode=False)))
    except (TypeError, ValueError, NotImplementedError) as error:  # Arrow's own are of these
        raise ValueError(f"--image_column {data.image_column} of {where} holds no pictures: name another") from error
    examples = []
    for number, row in enumerate(rows):
        image, name = row[data.image_column], f"{data.dataset_name}, row {number}"
        prompt = data.instance_prompt if data.caption_column is None else row[data.caption_column]
        prompt = check_caption(prompt, f"the caption of {name}, in column {data.caption_column},")
        if image is None:
            raise ValueError(f"{name} has no picture in column {data.image_column}: delete the row")
        encoded = image["bytes"] if image["bytes"] is not None else Path(image["path"])
        examples.append(Example(encoded, name, prompt, repeats=data.repeats))
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
