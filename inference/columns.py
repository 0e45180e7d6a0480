"""Pictures for galleries and scores: what an earlier command drew is read again, what is missing is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from inference.adapter_files import inspect_adapter, run_checkpoints, trained_steps
from inference.load import load_adapter, set_adapter_scale, swap_adapter, unload_adapters
from inference.manifest import (
    image_names,
    image_record,
    read_manifest,
    remake_command,
    write_image,
    write_manifest,
)
from inference.pipelines import pipeline_for, refiner_for, torch_dtype
from inference.sampling import GeneratedImage, Refiner, generate_images, warn_of_truncated_prompts
from settings.sampling import SamplingConfig
from storage.pictures import open_image, png_text
from storage.state import local_state

Requests = dict[tuple[str, int], str]  # (prompt, seed) -> a digest of all that the picture depends on


def open_listed(files: Mapping[tuple[str, int, float | None], Path]) -> list[GeneratedImage]:
    """The pictures of `inference.manifest.listed_images`."""
    return [
        GeneratedImage(prompt, seed, open_image(file), scale, png_text(file).get("command"))
        for (prompt, seed, scale), file in files.items()
    ]


def picture_folder(output: Path) -> Path:
    """Where a gallery or scores keep their pictures; a command that is run again finds them there."""
    return output.parent / "pictures"


@dataclass(frozen=True)
class AdapterVersion:
    """What a column shows: an adapter at one training step and scale; all None for the base."""

    adapter: Path | None = None
    step: int | None = None
    scale: float | None = None


def adapter_versions(path: Path, scales: Sequence[float], checkpoints: bool) -> list[AdapterVersion]:
    """An adapter at every scale, and its run's checkpoints if asked for; the last is the adapter at the last scale."""
    steps: list[tuple[int | None, Path]] = [(trained_steps(path), path)]
    if checkpoints:
        earlier = [(step, folder) for step, folder in run_checkpoints(path) if step != steps[0][0]]
        steps = [*earlier, *steps]
    return [AdapterVersion(adapter, step, scale) for step, adapter in steps for scale in scales]


class SampleSet(NamedTuple):
    """Pictures of prompts by one model."""

    name: str  # of the folder that they are kept in
    adapter: Path | None  # None: the base
    prompts: Sequence[str]
    scale: float = 1.0


class CachedSampler:
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

    def draw(self, sets: Sequence[SampleSet], seeds: Sequence[int]) -> list[list[GeneratedImage]]:
        """Each set's pictures, every prompt with every seed, prompt by prompt; only what is missing is drawn.

        Raises:
            ValueError: an adapter of another base, before anything is drawn.
        """
        requested = [(samples, self._requests(samples, seeds)) for samples in sets]
        incomplete = [
            samples for samples, requests in requested if self._kept(samples, requests).keys() < requests.keys()
        ]
        for adapter in dict.fromkeys(samples.adapter for samples in incomplete if samples.adapter):
            self._put_on(adapter, 1.0)  # each once: it is refused before an hour of sampling, not after it
        with tqdm(total=sum(len(requests) for _, requests in requested), unit="image") as bar:
            return [self._pictures(samples, requests, bar) for samples, requests in requested]

    def _pictures(self, samples: SampleSet, requests: Requests, bar: tqdm) -> list[GeneratedImage]:
        bar.set_description(samples.name)
        kept = self._kept(samples, requests)
        images = {place: open_image(file) for place, file in kept.items()}
        commands = {place: png_text(file).get("command") for place, file in kept.items()}
        bar.update(len(images))
        missing: dict[str, tuple[int, ...]] = {}  # prompt -> seeds
        for prompt, seed in requests:
            if (prompt, seed) not in images:
                missing[prompt] = (*missing.get(prompt, ()), seed)
        groups: dict[tuple[int, ...], list[str]] = {}  # prompts that lack the same seeds are drawn in one go
        for prompt, missing_seeds in missing.items():
            groups.setdefault(missing_seeds, []).append(prompt)
        adapters = {str(samples.adapter): 1.0} if samples.adapter else {}
        names, folder, records = image_names(samples.prompts), self._folder(samples.name), []
        try:
            for missing_seeds, prompts in groups.items():
                pipeline = self._put_on(samples.adapter, samples.scale)
                warn_of_truncated_prompts(pipeline, prompts)
                options = self.config.sampling_options() | {"refiner": self._refiner, "progress": bar}
                folder.mkdir(parents=True, exist_ok=True)
                for drawn in generate_images(pipeline, prompts, missing_seeds, **options):
                    request = requests[drawn.prompt, drawn.seed]
                    file = f"{names[drawn.prompt]}-{request[:8]}.png"
                    record = image_record(self.config, pipeline, drawn, file, adapters, samples.scale)
                    record["request"] = request
                    write_image(folder, record, drawn.image)
                    records.append(record)
                    images[drawn.prompt, drawn.seed] = drawn.image
                    commands[drawn.prompt, drawn.seed] = remake_command(record)
        finally:
            if records:
                write_manifest(folder, records)  # also when interrupted: what was drawn need not be drawn again
        return [GeneratedImage(*place, images[place], command=commands[place]) for place in requests]

    def _kept(self, samples: SampleSet, requests: Requests) -> dict[tuple[str, int], Path]:
        """The files of the pictures that are there."""
        folder = self._folder(samples.name)
        files = {record.get("request"): folder / record["file"] for record in read_manifest(folder)}
        return {place: files[one] for place, one in requests.items() if one in files and files[one].is_file()}

    def _folder(self, name: str) -> Path:
        return self.folder / image_names([name])[name]  # a name may hold what a file system doesn't take

    def _requests(self, samples: SampleSet, seeds: Sequence[int]) -> Requests:
        config = self.config
        parts = {"base": config.base, "vae": config.vae, "refiner": config.refiner}
        common: dict[str, Any] = {part: [path, local_state(path)] for part, path in parts.items()}
        common |= config.sampling_options() | {"batch_size": None}  # which changes no picture
        for name in ("clip_skip", "guidance_rescale"):  # which had no place in the digests of before
            del common[name]
        common |= config.said_of_base()
        common |= {"dtype": str(torch_dtype(config)), "scheduler": config.scheduler}
        common |= {"refiner_start": config.refiner_start} if config.refiner else {}
        common |= {name: value for name in ("revision", "variant") if (value := getattr(config, name))}
        common |= {"adapter": adapter_digest(samples.adapter), "scale": samples.scale} if samples.adapter else {}

        def digest(**place: Any) -> str:
            return hashlib.sha256(json.dumps(common | place, sort_keys=True).encode()).hexdigest()

        return {(prompt, seed): digest(prompt=prompt, seed=seed) for prompt in samples.prompts for seed in seeds}

    def _put_on(self, adapter: Path | None, scale: float) -> StableDiffusionXLPipeline:
        """The pipeline with this adapter alone; None: with nothing on it."""
        if self._pipeline is None:
            self._pipeline = pipeline_for(self.config)
            self._refiner = refiner_for(self.config, self._pipeline)
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


def draw_versions(
    config: SamplingConfig,
    columns: Mapping[str, Sequence[AdapterVersion]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
) -> Iterator[tuple[str, AdapterVersion, list[GeneratedImage]]]:
    """Column, version and pictures, of every version of every column; see `CachedSampler`."""
    versions = [(name, version) for name, several in columns.items() for version in several]
    sets = [
        SampleSet(name, version.adapter, prompts, 1.0 if version.scale is None else version.scale)
        for name, version in versions
    ]
    for (name, version), drawn in zip(versions, CachedSampler(config, folder).draw(sets, seeds)):
        yield name, version, drawn


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
