"""Pictures on a disk: their names, the text in each PNG, and the manifest that lists a folder's; imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from settings.sampling import SamplingConfig
from storage.files import cut_bytes, write_atomic
from storage.pictures import composed, png_bytes, png_text
from storage.text import parse_json, read_text

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from inference.sampling import GeneratedImage

MANIFEST = "manifest.jsonl"
STEM_BYTES = 60  # with seed, scale and hash a name stays below 143, the least that any file system takes (eCryptfs)
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # PyTorch's names -> those of --dtype


def image_names(prompts: Sequence[str]) -> dict[str, str]:
    """A file-name stem per prompt, of at most 60 bytes; prompts whose stems would collide get a hash of their text."""
    plain = {prompt: re.sub(r"[\W_]+", "-", composed(prompt.lower())).strip("-") for prompt in prompts}
    slugs = {prompt: cut_bytes(name, STEM_BYTES).rstrip("-") or "prompt" for prompt, name in plain.items()}
    counts = {slug: list(slugs.values()).count(slug) for slug in slugs.values()}
    return {prompt: slug if counts[slug] == 1 else f"{slug}-{text_digest(prompt)}" for prompt, slug in slugs.items()}


def text_digest(text: str) -> str:
    """Eight letters that tell two texts apart in a file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The images that earlier commands listed in this folder; [] where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        records = [parse_json(line) for line in read_text(path).split("\n") if line]
        types = {"file": str, "prompt": str, "seed": int}
        if all(isinstance(record[name], kind) for record in records for name, kind in types.items()):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} is not a manifest of this command: move it away, or choose another --output")


def listed_images(name: str, folder: Path) -> dict[tuple[str, int, float | None], Path]:
    """(prompt, seed, scale of the adapters) -> file, of the pictures that a manifest lists.

    Args:
        name: of the column in `--images`, for the messages.

    Raises:
        ValueError: if there is no manifest, or if it has two pictures for one place.
    """
    records = read_manifest(folder)
    if not records:
        raise ValueError(f"--images {name}={folder} has no manifest: name a folder that inference.generate wrote")
    files: dict[tuple[str, int, float | None], Path] = {}
    for record in records:
        place = record["prompt"], record["seed"], record.get("scale") if record.get("adapter") else None
        if place in files:
            raise ValueError(
                f"--images {name}={folder} has two pictures of {place[0]!r} with seed {place[1]}, {files[place].name} "
                f"and {record['file']}: keep each in a folder of its own"
            )
        files[place] = folder / record["file"]
    return files


def write_manifest(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON line per image; lines of earlier commands stay for images that are still there and not redrawn."""
    redrawn = {record["file"] for record in records}
    kept = [
        record
        for record in read_manifest(folder)
        if record["file"] not in redrawn and (folder / record["file"]).is_file()
    ]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in [*kept, *records]]
    write_atomic(folder / MANIFEST, "".join(lines))


def image_record(
    config: SamplingConfig,
    pipeline: StableDiffusionXLPipeline,
    drawn: GeneratedImage,
    file: str,
    adapters: Mapping[str, float],
    scale: float,
) -> dict[str, Any]:
    """All that an image depends on, under the names of `inference.generate`'s flags: its line of the manifest.

    Args:
        config: with its base chosen.
        adapters: path -> weight.
        scale: factor on all of them.
    """
    width, height = drawn.image.size
    weights = list(adapters.values())
    return {
        "file": file,
        "prompt": drawn.prompt,
        "seed": drawn.seed,
        "width": width,
        "height": height,
        "base": config.base,
        "revision": config.revision,
        "variant": config.variant,
        "adapter": list(adapters) or None,
        "adapter_weights": weights if set(weights) - {1.0} else None,
        "scale": scale,
        "negative_prompt": config.negative_prompt,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "vae": config.vae,
        "scheduler": type(pipeline.scheduler).__name__,
        "refiner": config.refiner,
        "refiner_start": config.refiner_start if config.refiner else None,
        "dtype": DTYPES[str(pipeline.unet.dtype).removeprefix("torch.")],
        **config.said_of_base(),
    }


def write_image(folder: Path, record: Mapping[str, Any], image: Image.Image) -> None:
    """A PNG that says what it was made with: its line of the manifest, and the command that draws it again."""
    text = {"parameters": json.dumps(record, ensure_ascii=False), "command": remake_command(record)}
    write_atomic(folder / record["file"], png_bytes(image, text))


def written_record(path: Path) -> dict[str, Any] | None:
    """The record that a PNG of `write_image` carries; None for any other picture."""
    try:
        return json.loads(png_text(path)["parameters"])
    except (KeyError, ValueError):
        return None


def remake_command(record: Mapping[str, Any]) -> str:
    """The command that draws one image of a manifest again."""
    command = ["python", "-m", "inference.generate"]
    for name, value in record.items():
        if (
            name in ("file", "request")
            or value is None
            or value is False
            or (name == "scale" and not record["adapter"])
        ):
            continue
        values = value if isinstance(value, list) else [value]
        # with "=", because a prompt or a weight may begin with a dash; a flag with several values may be repeated
        command += [f"--{name}"] if value is True else [f"--{name}={one}" for one in values]
    return shlex.join(command)
