"""Sample images: one function for the command, the gallery and the trainer's validation images.

python -m inference.generate --adapter out/cat --prompt "[V] photo of a cat in the jungle" --num_images 4
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from tqdm.auto import tqdm

from inference.adapter_files import DOWNLOAD_OPTIONS, inspect_adapter, recorded_base, recorded_downloads
from inference.base import (
    check_base,
    check_device,
    check_xformers,
    default_device,
    default_dtype,
    load_pipeline,
    load_refiner,
    make_scheduler,
)
from inference.load import adapted_components, load_adapter, set_adapter_scale
from inference.tokens import spell_out
from settings.command_line import parse_config, quiet_libraries, run_command
from storage.files import check_writable_target, write_atomic
from storage.pictures import png_bytes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MANIFEST = "manifest.jsonl"
SIZE_MULTIPLE = 8  # diffusers' SDXL pipeline refuses other heights and widths
MAX_SEED = 2**63 - 1
MAX_SCALE = 100  # beyond it a picture is noise, and in fp16 an overflow


@dataclass(frozen=True)
class GeneratedImage:
    prompt: str
    seed: int
    image: Image.Image | np.ndarray | torch.Tensor  # PIL, (H, W, 3) in [0, 1], or (C, H, W), as output_type says
    scale: float | None = None  # of the adapters, where it is known


Sampling = TypeVar("Sampling", bound="SamplingConfig")
PromptEmbeds = dict[str, torch.Tensor]  # keyword arguments of the pipeline, one prompt's


@dataclass(frozen=True)
class Refiner:
    """SDXL's second model, which takes over for the last steps (SDXL, arXiv 2307.01952, section 2.5)."""

    pipeline: StableDiffusionXLImg2ImgPipeline
    start: float = 0.8  # share of the steps that the base takes


# --- sampling ---------------------------------------------------------------------------------------------------------


def encode_prompts(
    pipeline: StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline,
    prompts: Sequence[str],
    negative_prompt: str | None = None,
) -> dict[str, PromptEmbeds]:
    """Each prompt's embeddings, for `generate_images` on a pipeline whose text encoders will be gone by then.

    Prompts are encoded one by one, because a batched matrix product rounds differently from a single one.

    Returns:
        prompt -> prompt_embeds (1, L, D), pooled_prompt_embeds (1, P), and both of the negative prompt.
    """
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with evaluation_mode(pipeline), torch.no_grad():
        return {
            prompt: dict(
                zip(names, pipeline.encode_prompt(spell_out(pipeline, prompt), negative_prompt=negative_prompt))
            )
            for prompt in prompts
        }


@contextmanager
def evaluation_mode(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """Dropout off in every model of the pipeline, and each put back as it was."""
    training = [
        module
        for model in pipeline.components.values()
        if isinstance(model, torch.nn.Module)
        for module in model.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def generate_images(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.0,
    negative_prompt: str | None = None,
    encoded_prompts: Mapping[str, PromptEmbeds] | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    refiner: Refiner | None = None,
    output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    progress: bool | tqdm = True,
) -> Iterator[GeneratedImage]:
    """Every prompt with every seed, prompt by prompt, yielded batch by batch as they are drawn.

    Each image has its own CPU generator, seeded with its seed, which draws its first latents and any noise the
    scheduler adds; so an image depends on its prompt and seed, and not on the batch it is in or on the device. No
    global random state is read or changed, and models in training mode are put back into it after each batch.

    Args:
        encoded_prompts: of `encode_prompts`, for a pipeline without text encoders; the negative prompt is in it.
        height, width: in pixels, multiples of 8. None: the size the base was trained at.
        batch_size: images at a time; a memory setting, without effect on the images.
        refiner: draws the last steps; it has text encoders of its own, which know no adapter and no new word.
        progress: show a bar over all images, or count them on a bar of the caller's.

    Raises:
        ValueError: a value out of range (at the call, before anything is drawn).
    """
    prompts, seeds = list(prompts), list(seeds)
    native_size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    height, width = height or native_size, width or native_size
    check_sampling(prompts, seeds, num_inference_steps, guidance_scale, height, width, batch_size)
    if encoded_prompts is not None:
        if negative_prompt is not None:
            raise ValueError("encoded_prompts hold their negative prompt: pass it to encode_prompts instead")
        if missing := [prompt for prompt in prompts if prompt not in encoded_prompts]:
            raise ValueError(f"encoded_prompts lack {missing[0]!r}: encode every prompt")
    return _generate_batches(
        pipeline,
        [(prompt, seed) for prompt in prompts for seed in seeds],
        {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "output_type": output_type,
        },
        lambda: encoded_prompts or encode_prompts(pipeline, prompts, negative_prompt),
        batch_size,
        progress,
        refiner,
        lambda: encode_prompts(refiner.pipeline, prompts, negative_prompt) if refiner else {},
    )


def _generate_batches(
    pipeline: StableDiffusionXLPipeline,
    requests: list[tuple[str, int]],
    call_options: dict[str, Any],
    encode: Callable[[], Mapping[str, PromptEmbeds]],
    batch_size: int,
    progress: bool | tqdm,
    refiner: Refiner | None,
    encode_for_refiner: Callable[[], Mapping[str, PromptEmbeds]],
) -> Iterator[GeneratedImage]:
    own_bar = isinstance(progress, bool)
    bar = tqdm(total=len(requests), unit="image", disable=not progress) if own_bar else progress
    scale = pipeline.vae_scale_factor
    latents_shape = (pipeline.unet.config.in_channels, call_options["height"] // scale, call_options["width"] // scale)
    pipeline.set_progress_bar_config(disable=True)  # one bar over the images, not one over the steps of each batch
    as_pil = call_options["output_type"] == "pil"
    call_options = call_options | ({"output_type": "np"} if as_pil else {})  # which can be checked
    base_options = call_options
    if refiner:
        refiner.pipeline.set_progress_bar_config(disable=True)
        base_options = call_options | {"output_type": "latent", "denoising_end": refiner.start}
    try:
        encoded, encoded_for_refiner = encode(), encode_for_refiner()
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
            # (B, 4, H/8, W/8): drawn in fp32 and then cast, so that fp16 and fp32 runs start from the same noise
            latents = torch.stack([torch.randn(latents_shape, generator=generator) for generator in generators])
            try:
                with evaluation_mode(pipeline):
                    images = pipeline(
                        **_stack([encoded[prompt] for prompt, _ in batch]),
                        generator=generators,
                        latents=latents.to(pipeline.unet.dtype),
                        **base_options,
                    ).images
                if refiner:
                    names = ("num_inference_steps", "guidance_scale", "output_type")  # the size is the latents'
                    images = refiner.pipeline(
                        **_stack([encoded_for_refiner[prompt] for prompt, _ in batch]),
                        image=images,
                        denoising_start=refiner.start,
                        generator=generators,
                        **{name: call_options[name] for name in names},
                    ).images
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"out of memory at batch_size={batch_size} and {call_options['width']}×{call_options['height']}: "
                    "lower the batch size or the image size"
                ) from error
            for (prompt, seed), image in zip(batch, images):
                check_finite(image, prompt, seed)
            for (prompt, seed), image in zip(
                batch, pipeline.image_processor.numpy_to_pil(images) if as_pil else images
            ):
                yield GeneratedImage(prompt, seed, image)
            bar.update(len(batch))
    finally:
        if own_bar:
            bar.close()


def check_finite(image: np.ndarray | torch.Tensor, prompt: str, seed: int) -> None:
    """Refuse a picture that is none: as PIL's it would be black.

    Raises:
        ValueError: it has values that are not finite.
    """
    if not bool(torch.as_tensor(image).isfinite().all()):
        raise ValueError(
            f"the picture of {prompt!r} with seed {seed} has values that are not finite: lower the adapter's scale, or "
            "draw in float32 (--dtype fp32) or with another --vae"
        )


def _stack(embeds: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """One batch of several prompts' embeddings; SDXL's refiner has none of a first encoder, and diffusers says None."""
    return {
        name: None if value is None else torch.cat([one[name] for one in embeds]) for name, value in embeds[0].items()
    }


def check_sampling(
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    height: int | None,
    width: int | None,
    batch_size: int,
) -> None:
    """Raise ValueError, with the value and the limit, for what `generate_images` can't draw."""
    if not prompts:
        raise ValueError("no prompt: give at least one, with --prompt or --prompt_file")
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty: write at least one word")
    _check_distinct("prompt", prompts)
    if not seeds:
        raise ValueError("no seed: give at least one")
    _check_distinct("seed", seeds)
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed={seed} must be from 0 to {MAX_SEED}")
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale={guidance_scale} must be a number from 0 up; 1 and less means no guidance")
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < SIZE_MULTIPLE or value % SIZE_MULTIPLE):
            raise ValueError(f"{name}={value} must be a positive multiple of {SIZE_MULTIPLE}")


def _check_distinct(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        repeated = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{name} {repeated!r} is given twice, which would draw the same images twice")


def warn_of_truncated_prompts(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> None:
    """Say which prompts are longer than the text encoders read; diffusers cuts them off."""
    for prompt in prompts:
        tokens = len(pipeline.tokenizer(spell_out(pipeline, prompt)).input_ids)
        limit = pipeline.tokenizer.model_max_length
        if tokens > limit:
            print(f"warning: prompt {prompt!r} has {tokens} tokens, the base reads the first {limit}", file=sys.stderr)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class SamplingConfig:
    """Flags that the commands share."""

    base: str | None = field(
        default=None,
        metadata={"help": "SDXL: a diffusers folder, a .safetensors file or a Hub id. Default: the adapter's own."},
    )
    revision: str | None = field(
        default=None, metadata={"help": "Of the base on the Hub. Default: the adapter's own, without --base."}
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "Of the base's files, such as fp16. Default: the adapter's own, without --base."},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where the base is downloaded to. Default: the adapter's own, without --base."},
    )
    scale: list[float] | None = field(
        default=None,
        metadata={
            "aliases": ["--scales"],
            "action": "extend",
            "help": "Factor on the adapters' update; 0 is the base. Several: every image at each of them. Default: 1.",
        },
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "What to steer away from."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps per image."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance."})
    height: int | None = field(default=None, metadata={"help": "Pixels. Default: what the base was trained at."})
    width: int | None = field(default=None, metadata={"help": "Pixels. Default: what the base was trained at."})
    batch_size: int = field(default=4, metadata={"help": "Images at a time; lower it when memory runs out."})
    dtype: Literal["fp32", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Of all models. Default: fp16 on a GPU, fp32 on a CPU."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cuda:1. Default: a GPU where there is one."})
    scheduler: str | None = field(
        default=None, metadata={"help": "Class of diffusers, such as DPMSolverMultistep. Default: the base's own."}
    )
    vae: str | None = field(default=None, metadata={"help": "Another autoencoder: a folder, a file or a Hub id."})
    refiner: str | None = field(
        default=None, metadata={"help": "SDXL's refiner for the last steps: a folder, a file or a Hub id."}
    )
    refiner_start: float = field(default=0.8, metadata={"help": "Share of the steps before the refiner takes over."})
    enable_xformers_memory_efficient_attention: bool = field(
        default=False, metadata={"help": "xformers' attention instead of PyTorch's (CUDA only)."}
    )

    def check_sampling(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        check_sampling(
            prompts,
            seeds,
            self.num_inference_steps,
            self.guidance_scale,
            self.height,
            self.width,
            self.batch_size,
        )
        for scale in self.scales:
            if not abs(scale) <= MAX_SCALE:
                raise ValueError(f"--scale {scale:g} must be from -{MAX_SCALE} to {MAX_SCALE}; 1 is as trained")
        _check_distinct("--scale", self.scales)
        if not 0 < self.refiner_start < 1:
            raise ValueError(f"--refiner_start {self.refiner_start:g} must be between 0 and 1, such as 0.8")
        if self.refiner_start != SamplingConfig.refiner_start and not self.refiner:
            raise ValueError("--refiner_start has no effect without --refiner: name one, or leave it out")
        device = check_device(self.device)
        if self.enable_xformers_memory_efficient_attention:
            check_xformers(device)

    @property
    def scales(self) -> list[float]:
        return self.scale or [1.0]

    def download_options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` for the base."""
        return {name: value for name in DOWNLOAD_OPTIONS if (value := getattr(self, name)) is not None}

    def load_pipeline(self, base: str) -> StableDiffusionXLPipeline:
        pipeline = load_pipeline(base, self.torch_dtype, self.first_device, self.vae, **self.download_options())
        if self.scheduler:
            pipeline.scheduler = make_scheduler(self.scheduler, pipeline.scheduler)
        if self.enable_xformers_memory_efficient_attention:
            pipeline.enable_xformers_memory_efficient_attention()
        return pipeline

    def load_refiner(self, pipeline: StableDiffusionXLPipeline) -> Refiner | None:
        if not self.refiner:
            return None
        refiner = load_refiner(self.refiner, pipeline, self.torch_dtype, self.first_device)
        if self.enable_xformers_memory_efficient_attention:
            refiner.enable_xformers_memory_efficient_attention()
        return Refiner(refiner, self.refiner_start)

    @property
    def first_device(self) -> str | None:
        """Where models go when they are loaded."""
        return self.device

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype] if self.dtype else default_dtype(check_device(self.device))

    def record(
        self, base: str, pipeline: StableDiffusionXLPipeline, adapters: Mapping[str, float], scale: float
    ) -> dict[str, Any]:
        """What an image depends on besides its prompt, seed and size, under the names of generate's flags."""
        names = ("negative_prompt", "num_inference_steps", "guidance_scale", "vae")
        return {
            "base": base,
            "revision": self.revision,
            "variant": self.variant,
            "adapter": list(adapters) or None,
            "adapter_weights": list(adapters.values()) if set(adapters.values()) - {1.0} else None,
            "scale": scale,
            **{name: getattr(self, name) for name in names},
            "scheduler": type(pipeline.scheduler).__name__,
            "refiner": self.refiner,
            "refiner_start": self.refiner_start if self.refiner else None,
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == pipeline.unet.dtype),
        }

    def sampling_options(self) -> dict[str, Any]:
        """The keyword arguments of `generate_images` that these flags set."""
        names = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "batch_size")
        return {name: getattr(self, name) for name in names}


@dataclass
class GenerateConfig(SamplingConfig):
    """Flags of `python -m inference.generate`."""

    adapter: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--adapters"],
            "action": "extend",
            "help": "Run folders, LoRA files of diffusers or kohya, PEFT folders; together. Default: the base alone.",
        },
    )
    adapter_weights: list[float] | None = field(
        default=None, metadata={"action": "extend", "help": "One for each --adapter, times --scale. Default: 1 each."}
    )
    fuse: bool = field(
        default=False, metadata={"help": "Merge the adapters into the base's weights: no cost per step."}
    )
    offload: Literal["none", "model", "sequential"] = field(
        default="none",
        metadata={"help": "Keep what is not computing in main memory: model by model, or layer by layer (slow)."},
    )
    prompt: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--prompts"], "action": "extend", "help": "One or several; the flag may be repeated."},
    )
    prompt_file: str | None = field(default=None, metadata={"help": "UTF-8 text, one prompt a line."})
    num_images: int | None = field(default=None, metadata={"help": "Images per prompt, from --seed on. Default: 1."})
    seed: int | None = field(default=None, metadata={"help": "Seed of each prompt's first image. Default: 0."})
    seeds: list[int] | None = field(
        default=None, metadata={"action": "extend", "help": "Explicit seeds, instead of --seed and --num_images."}
    )
    output: str | None = field(default=None, metadata={"help": "Folder. Default: ADAPTER/images, or out/images."})

    def all_prompts(self) -> list[str]:
        return [*(self.prompt or []), *(read_prompts(self.prompt_file) if self.prompt_file else [])]

    def weighted_adapters(self) -> dict[str, float]:
        """Path -> weight."""
        paths, weights = self.adapter or [], self.adapter_weights
        _check_distinct("--adapter", paths)
        if weights is not None and len(weights) != len(paths):
            raise ValueError(f"--adapter_weights has {len(weights)} numbers for {len(paths)} adapters: give one each")
        for weight in weights or []:
            if not abs(weight) <= MAX_SCALE:
                raise ValueError(f"--adapter_weights {weight:g} must be from -{MAX_SCALE} to {MAX_SCALE}")
        return dict(zip(paths, weights or [1.0] * len(paths)))

    def all_seeds(self) -> list[int]:
        if self.seeds:
            if self.seed is not None or self.num_images is not None:
                raise ValueError("--seeds says it all: leave --seed and --num_images out")
            return self.seeds
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"--num_images {self.num_images} must be at least 1")
        first = self.seed or 0
        return list(range(first, first + (self.num_images or 1)))

    def check(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        self.check_sampling(prompts, seeds)
        if self.fuse and len(self.scales) > 1:
            raise ValueError("--fuse merges the adapters at one scale: give one --scale, or leave --fuse out")
        if (self.fuse or self.scales != [1]) and not self.adapter:
            flag = "--fuse" if self.fuse else f"--scale {self.scales[0]:g}"
            raise ValueError(f"{flag} needs an adapter: name one with --adapter")
        if self.offload != "none" and check_device(self.device).type == "cpu":
            raise ValueError(f"--offload {self.offload} takes models off a GPU: leave it out on a CPU")

    @property
    def first_device(self) -> str | None:
        return "cpu" if self.offload != "none" else self.device

    def settle(self, pipeline: StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline) -> None:
        """Merge and offload, once the adapters are on: hooks on a module don't follow it into an adapter's layer."""
        if self.fuse and (parts := adapted_components(pipeline)):
            pipeline.fuse_lora(components=parts)
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device or default_device())
        elif self.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=self.device or default_device())

    def output_folder(self) -> Path:
        if self.output:
            return Path(self.output)
        if self.adapter:
            path = Path(self.adapter[0])
            return (path if path.is_dir() else path.parent) / "images"  # not samples: those are the run's own
        return Path("out/images")


def read_prompts(path: str | Path) -> list[str]:
    """The non-blank lines of a UTF-8 text file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt: write one a line")
    return prompts


def choose_base(config: Sampling, adapter: str | None) -> Sampling:
    """The config with its base checked, not loaded: `--base`, or else the base as the adapter's run downloaded it."""
    if config.base:
        check_base(config.base)
        return config
    if adapter is None:
        raise ValueError("no base: name one with --base (a diffusers folder, a .safetensors file or a Hub id)")
    return replace(config, base=recorded_base(adapter), **recorded_downloads(adapter) | config.download_options())


def image_names(prompts: Sequence[str]) -> dict[str, str]:
    """A file-name stem per prompt; prompts whose stems would collide get a hash of their text."""
    slugs = {
        prompt: re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "prompt" for prompt in prompts
    }
    counts = {slug: list(slugs.values()).count(slug) for slug in slugs.values()}
    return {prompt: slug if counts[slug] == 1 else f"{slug}-{_digest(prompt)}" for prompt, slug in slugs.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The images that earlier commands listed in this folder; [] where there is no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        types = {"file": str, "prompt": str, "seed": int}
        if all(isinstance(record[name], kind) for record in records for name, kind in types.items()):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} is not a manifest of this command: move it away, or choose another --output")


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


def describe(drawn: GeneratedImage, file: str) -> dict[str, Any]:
    width, height = drawn.image.size
    return {"file": file, "prompt": drawn.prompt, "seed": drawn.seed, "width": width, "height": height}


def write_image(folder: Path, record: Mapping[str, Any], image: Image.Image) -> None:
    """A PNG that says what it was made with: its line of the manifest, and the command that draws it again."""
    text = {"parameters": json.dumps(record, ensure_ascii=False), "command": remake_command(record)}
    write_atomic(folder / record["file"], png_bytes(image, text))


def run(config: GenerateConfig) -> Path:
    """Draw, save and list the images; returns the folder. Everything is checked before the pipeline is loaded."""
    prompts, seeds, folder = config.all_prompts(), config.all_seeds(), config.output_folder()
    adapters = config.weighted_adapters()
    config.check(prompts, seeds)
    for path in adapters:
        inspect_adapter(path)
    config = choose_base(config, next(iter(adapters), None))
    check_writable_target(folder, "--output", folder=True)
    listed = {record["file"]: record for record in read_manifest(folder)}

    pipeline = config.load_pipeline(config.base)
    # named by number, because folders of two runs may have one name
    names = {
        load_adapter(pipeline, path, weight * config.scales[0], f"adapter_{number}"): path
        for number, (path, weight) in enumerate(adapters.items())
    }
    refiner = config.load_refiner(pipeline)
    for one in (pipeline, *([refiner.pipeline] if refiner else [])):
        config.settle(one)
    warn_of_truncated_prompts(pipeline, prompts)
    stems, records = image_names(prompts), []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for scale in config.scales:
            if not config.fuse:
                for name, path in names.items():
                    set_adapter_scale(pipeline, name, adapters[path] * scale)
            suffix = f"-scale{repr(scale).removesuffix('.0')}" if len(config.scales) > 1 else ""
            for drawn in generate_images(pipeline, prompts, seeds, refiner=refiner, **config.sampling_options()):
                name = f"{stems[drawn.prompt]}-seed{drawn.seed}{suffix}.png"
                record = describe(drawn, name) | config.record(config.base, pipeline, adapters, scale)
                record["fuse"] = config.fuse
                if listed.get(name, record) != record and (folder / name).is_file():
                    record["file"] = f"{Path(name).stem}-{_digest(json.dumps(record))}.png"  # leave the other image
                write_image(folder, record, drawn.image)
                records.append(record)
    finally:
        write_manifest(folder, records)  # also when interrupted: the images drawn so far are listed
    return folder


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


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        GenerateConfig, argv, prog="python -m inference.generate", description="Sample images from SDXL and an adapter."
    )
    quiet_libraries()

    def command() -> None:
        folder = run(config)
        print(f"{folder}: {len(list(folder.glob('*.png')))} images, listed in {MANIFEST}")

    run_command(command)


if __name__ == "__main__":
    main()
