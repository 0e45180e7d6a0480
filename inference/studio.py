"""Pictures for galleries and scores: what an earlier command drew is read again, what is missing is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tqdm.auto import tqdm

from inference.adapter_files import inspect_adapter
from inference.components import EMBEDDINGS
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


class Studio:
    """One pipeline, loaded when the first picture has to be drawn, and one adapter at a time on it.

    Args:
        config: how pictures are drawn.
        folder: where they are kept, each model's in a folder of its own with a manifest.
    """

    def __init__(self, config: SamplingConfig, base: str, folder: Path) -> None:
        self.config, self.base, self.folder = config, base, folder
        self._pipeline: StableDiffusionXLPipeline | None = None
        self._refiner: Refiner | None = None
        self._on: tuple[Path, str] | None = None  # the adapter on the pipeline, and its name there

    def missing(
        self, adapter: Path | None, name: str, prompts: Sequence[str], seeds: Sequence[int], scale: float
    ) -> int:
        """How many pictures would have to be drawn."""
        return len(prompts) * len(seeds) - len(self._kept(adapter, name, prompts, seeds, scale))

    def check_adapters(self, adapters: Sequence[Path]) -> None:
        """Load each once: an adapter of another base is refused before an hour of sampling, not after it."""
        for path in adapters:
            self._put_on(path, 1.0)

    def pictures(
        self,
        adapter: Path | None,
        name: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        scale: float = 1.0,
        bar: tqdm | None = None,
    ) -> list[GeneratedImage]:
        """Every prompt with every seed, prompt by prompt, by the adapter, or by the base if it is None.

        Args:
            name: of the folder that the pictures are in.
        """
        kept = self._kept(adapter, name, prompts, seeds, scale)
        if bar:
            bar.update(len(kept))
        names, folder, records = image_names(prompts), self._folder(name), []
        try:
            groups: dict[tuple[int, ...], list[str]] = {}  # prompts that lack the same seeds are drawn in one go
            for prompt in prompts:
                lacking = tuple(seed for seed in seeds if (prompt, seed) not in kept)
                groups.setdefault(lacking, []).append(prompt)
            groups.pop((), None)
            for lacking, several in groups.items():
                pipeline = self._put_on(adapter, scale)
                warn_of_truncated_prompts(pipeline, several)
                options = self.config.sampling_options() | {"refiner": self._refiner, "progress": bar or False}
                folder.mkdir(parents=True, exist_ok=True)
                for drawn in generate_images(pipeline, several, lacking, **options):
                    request = self._request(adapter, drawn.prompt, drawn.seed, scale)
                    adapters = {str(adapter): 1.0} if adapter else {}
                    record = describe(drawn, f"{names[drawn.prompt]}-{request[:8]}.png") | {"request": request}
                    record |= self.config.record(self.base, pipeline, adapters, scale)
                    write_image(folder, record, drawn.image)
                    records.append(record)
                    kept[drawn.prompt, drawn.seed] = drawn.image
        finally:
            if records:
                write_manifest(folder, records)  # also when interrupted: what was drawn need not be drawn again
        return [GeneratedImage(prompt, seed, kept[prompt, seed]) for prompt in prompts for seed in seeds]

    def _kept(
        self, adapter: Path | None, name: str, prompts: Sequence[str], seeds: Sequence[int], scale: float
    ) -> dict[tuple[str, int], Image.Image]:
        folder = self._folder(name)
        files = {record.get("request"): record["file"] for record in read_manifest(folder)}
        kept = {}
        for prompt in prompts:
            for seed in seeds:
                file = folder / files.get(self._request(adapter, prompt, seed, scale), "nothing")
                if file.is_file():
                    kept[prompt, seed] = open_image(file)
        return kept

    def _folder(self, name: str) -> Path:
        return self.folder / image_names([name])[name]  # a name may hold what a file system doesn't take

    def _request(self, adapter: Path | None, prompt: str, seed: int, scale: float) -> str:
        """A digest of all that a picture depends on, the adapter's bytes among it."""
        wanted: dict[str, Any] = {"prompt": prompt, "seed": seed, "dtype": str(self.config.torch_dtype)}
        parts = {"base": self.base, "vae": self.config.vae, "refiner": self.config.refiner}
        wanted |= {part: [where, local_state(where)] for part, where in parts.items()}
        wanted |= self.config.sampling_options() | {"batch_size": None}  # which changes no picture
        names = ("scheduler", *(("refiner_start",) if self.config.refiner else ()))
        wanted |= {name: getattr(self.config, name) for name in names}
        wanted |= {"adapter": adapter_digest(adapter), "scale": scale} if adapter else {}
        return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()

    def _put_on(self, adapter: Path | None, scale: float) -> StableDiffusionXLPipeline:
        if self._pipeline is None:
            self._pipeline = self.config.load_pipeline(self.base)
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
    """Names, sizes and times of files where a model or pictures lie on this disk, because models are too large to read."""
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
    words = (file.path if file.path.is_dir() else file.path.parent) / EMBEDDINGS
    files += [words] if words.is_file() else []
    digest = hashlib.sha256()
    for one in files:
        state = one.stat()
        key = (one.resolve(), state.st_mtime_ns, state.st_size)
        if key not in _digests:
            _digests[key] = hashlib.sha256(one.read_bytes()).hexdigest()
        digest.update(_digests[key].encode())
    return digest.hexdigest()
