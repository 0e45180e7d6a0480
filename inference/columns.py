"""Pictures for galleries and scores: what an earlier command drew is read again, what is missing is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from inference.adapter_files import inspect_adapter, parse_named_adapters
from inference.generate import (
    GeneratedImage,
    Refiner,
    SamplingConfig,
    describe,
    generate_images,
    image_names,
    read_manifest,
    warn_of_truncated_prompts,
    write_image,
    write_manifest,
)
from inference.load import load_adapter, set_adapter_scale, swap_adapter, unload_adapters
from storage.pictures import open_image

SAMPLING = tuple(one.name for one in fields(SamplingConfig))
Requests = dict[tuple[str, int], str]  # (prompt, seed) -> a digest of all that the picture depends on


@dataclass
class ColumnsConfig(SamplingConfig):
    """Flags of the commands that set models side by side."""

    adapters: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "NAME=PATH of each, beside the base."}
    )
    images: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "NAME=FOLDER of pictures with a manifest that inference.generate wrote: nothing is drawn.",
        },
    )

    def columns(self, drawing: Sequence[str]) -> tuple[dict[str, Path], dict[str, list[GeneratedImage]]]:
        """The adapters, and the pictures that are there already, by name.

        Args:
            drawing: names of the flags that say what is drawn, and how.

        Raises:
            ValueError: if there is nothing, a name is there twice, or such a flag is given where nothing is drawn.
        """
        adapters = parse_named_adapters(self.adapters or [])
        folders = parse_named_adapters(self.images or [], "--images")
        if not adapters and not folders:
            raise ValueError("no adapter: give at least one with --adapters NAME=PATH, or pictures with --images")
        if taken := set(adapters) & set(folders):
            raise ValueError(f"--images {min(taken)}: the name is an adapter's already, choose another one")
        for name in drawing:
            if not adapters and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name} is for what is drawn, and --images are there already: leave it out")
        for path in adapters.values():
            inspect_adapter(path)
        return adapters, {name: read_pictures(name, folder) for name, folder in folders.items()}


def read_pictures(name: str, folder: Path) -> list[GeneratedImage]:
    """The pictures that a manifest lists, with their prompts, seeds and scales.

    Raises:
        ValueError: if there is no manifest, or if it has two pictures for one place.
    """
    records = read_manifest(folder)
    if not records:
        raise ValueError(f"--images {name}={folder} has no manifest: name a folder that inference.generate wrote")
    drawn: dict[tuple[str, int, float | None], Path] = {}
    for record in records:
        place = record["prompt"], record["seed"], record.get("scale") if record.get("adapter") else None
        if place in drawn:
            raise ValueError(
                f"--images {name}={folder} has two pictures of {place[0]!r} with seed {place[1]}, {drawn[place].name} "
                f"and {record['file']}: keep each in a folder of its own"
            )
        drawn[place] = folder / record["file"]
    return [GeneratedImage(prompt, seed, open_image(file), scale) for (prompt, seed, scale), file in drawn.items()]


def picture_folder(output: Path) -> Path:
    """Where a gallery or scores keep their pictures; a command that is run again finds them there."""
    return output.parent / "pictures"


class Job(NamedTuple):
    """Pictures of prompts by one model."""

    name: str  # of the folder that they are kept in
    adapter: Path | None  # None: the base
    prompts: Sequence[str]
    scale: float = 1.0


class Studio:
    """One pipeline, loaded when the first picture has to be drawn, and one adapter at a time on it.

    Args:
        config: how pictures are drawn, its base chosen.
        folder: where they are kept, each model's in a folder of its own with a manifest.
    """

    def __init__(self, config: SamplingConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._refiner: Refiner | None = None
        self._on: tuple[Path, str] | None = None  # the adapter on the pipeline, and its name there

    def draw(self, jobs: Sequence[Job], seeds: Sequence[int]) -> list[list[GeneratedImage]]:
        """Each job's pictures, every prompt with every seed, prompt by prompt; only what is missing is drawn.

        Raises:
            ValueError: an adapter of another base, before anything is drawn.
        """
        wanted = [self._requests(job, seeds) for job in jobs]
        lacking = [job for job, requests in zip(jobs, wanted) if self._kept(job, requests).keys() < requests.keys()]
        for adapter in dict.fromkeys(job.adapter for job in lacking if job.adapter):
            self._put_on(adapter, 1.0)  # each once: it is refused before an hour of sampling, not after it
        with tqdm(total=sum(map(len, wanted)), unit="image") as bar:
            return [self._pictures(job, requests, bar) for job, requests in zip(jobs, wanted)]

    def _pictures(self, job: Job, requests: Requests, bar: tqdm) -> list[GeneratedImage]:
        bar.set_description(job.name)
        images = {place: open_image(file) for place, file in self._kept(job, requests).items()}
        bar.update(len(images))
        lacking: dict[str, tuple[int, ...]] = {}
        for prompt, seed in requests:
            if (prompt, seed) not in images:
                lacking[prompt] = (*lacking.get(prompt, ()), seed)
        groups: dict[tuple[int, ...], list[str]] = {}  # prompts that lack the same seeds are drawn in one go
        for prompt, missing_seeds in lacking.items():
            groups.setdefault(missing_seeds, []).append(prompt)
        names, folder, records = image_names(job.prompts), self._folder(job.name), []
        try:
            for missing_seeds, prompts in groups.items():
                pipeline = self._put_on(job.adapter, job.scale)
                warn_of_truncated_prompts(pipeline, prompts)
                options = self.config.sampling_options() | {"refiner": self._refiner, "progress": bar}
                folder.mkdir(parents=True, exist_ok=True)
                for drawn in generate_images(pipeline, prompts, missing_seeds, **options):
                    request = requests[drawn.prompt, drawn.seed]
                    adapters = {str(job.adapter): 1.0} if job.adapter else {}
                    record = describe(drawn, f"{names[drawn.prompt]}-{request[:8]}.png") | {"request": request}
                    record |= self.config.record(self.config.base, pipeline, adapters, job.scale)
                    write_image(folder, record, drawn.image)
                    records.append(record)
                    images[drawn.prompt, drawn.seed] = drawn.image
        finally:
            if records:
                write_manifest(folder, records)  # also when interrupted: what was drawn need not be drawn again
        return [GeneratedImage(*place, images[place]) for place in requests]

    def _kept(self, job: Job, requests: Requests) -> dict[tuple[str, int], Path]:
        """The files of the pictures that are there."""
        folder = self._folder(job.name)
        files = {record.get("request"): folder / record["file"] for record in read_manifest(folder)}
        return {place: files[one] for place, one in requests.items() if one in files and files[one].is_file()}

    def _folder(self, name: str) -> Path:
        return self.folder / image_names([name])[name]  # a name may hold what a file system doesn't take

    def _requests(self, job: Job, seeds: Sequence[int]) -> Requests:
        wanted: dict[str, Any] = {"dtype": str(self.config.torch_dtype)}
        parts = {"base": self.config.base, "vae": self.config.vae, "refiner": self.config.refiner}
        wanted |= {part: [where, local_state(where)] for part, where in parts.items()}
        wanted |= self.config.sampling_options() | {"batch_size": None}  # which changes no picture
        names = ("scheduler", *(("refiner_start",) if self.config.refiner else ()))
        wanted |= {name: getattr(self.config, name) for name in names}
        wanted |= {name: value for name in ("revision", "variant") if (value := getattr(self.config, name))}
        wanted |= {"adapter": adapter_digest(job.adapter), "scale": job.scale} if job.adapter else {}

        def digest(**place: Any) -> str:
            return hashlib.sha256(json.dumps(wanted | place, sort_keys=True).encode()).hexdigest()

        return {(prompt, seed): digest(prompt=prompt, seed=seed) for prompt in job.prompts for seed in seeds}

    def _put_on(self, adapter: Path | None, scale: float) -> StableDiffusionXLPipeline:
        if self._pipeline is None:
            self._pipeline = self.config.load_pipeline(self.config.base)
            self._refiner = self.config.load_refiner(self._pipeline)
        if adapter is None:
            unload_adapters(self._pipeline)
            self._on = None
        else:
            if self._on is None:
                self._on = adapter, load_adapter(self._pipeline, adapter)
            elif self._on[0] != adapter:
                swap_adapter(self._pipeline, adapter, self._on[1])
                self._on = adapter, self._on[1]
            set_adapter_scale(self._pipeline, self._on[1], scale)
        return self._pipeline


def local_state(path: str | None) -> list[list[str | int]]:
    """Names, sizes and times of the files of a model or of pictures on this disk: models are too large to be read."""
    root = Path(path) if path else None
    if root is None or not root.exists():
        return []
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


_digests: dict[tuple[Path, int, int], str] = {}


def adapter_digest(path: Path) -> str:
    """SHA-256 of the files that an adapter is loaded from; read once as long as they don't change."""
    file = inspect_adapter(path)
    files = sorted(p for part in file.parts.values() for p in part.iterdir() if p.is_file()) or [file.path]
    files += [file.new_word] if file.new_word else []
    digest = hashlib.sha256()
    for one in files:
        state = one.stat()
        key = (one.resolve(), state.st_mtime_ns, state.st_size)
        if key not in _digests:
            _digests[key] = hashlib.sha256(one.read_bytes()).hexdigest()
        digest.update(_digests[key].encode())
    return digest.hexdigest()
