"""Flags of the commands that draw pictures, as plain records. Imports no torch: a wrong flag is refused at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from settings.base import BASE_CONFIG_HELP, CLIP_SKIP_HELP, PREDICTION_TYPE_HELP, ZERO_SNR_HELP
from settings.record import FilePath, check_texts
from storage.text import expand_home, read_text

SIZE_MULTIPLE = 8  # diffusers' SDXL pipeline refuses other heights and widths
MAX_SEED = 2**63 - 1
MAX_SCALE = 100  # beyond it a picture is noise, and in fp16 an overflow
# Flags that say how a base is loaded, under the names of `inference.base.load_pipeline`
DOWNLOAD_OPTIONS = ("revision", "variant", "cache_dir", "base_config")
PREDICTION_OPTIONS = {"prediction_type": "auto", "zero_terminal_snr": "auto"}  # with their defaults


def _is_path(hint: Any) -> bool:
    return hint == FilePath or any(_is_path(part) for part in get_args(hint))


def _at_home(path: str, name: str) -> str:
    try:
        return expand_home(path)
    except ValueError as error:
        raise ValueError(f"--{name} {path} {error}") from error


def settle_texts(config: Any) -> None:
    """Check a dataclass's texts as a record's, and take ``~`` in its paths as the home folder.

    Raises:
        ValueError: for a text that can't be recorded, or a home folder that is not known.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        check_texts(name, value)
        if value is None or not _is_path(hint):
            continue
        several = [_at_home(str(path), name) for path in (value if isinstance(value, list) else [value])]
        setattr(config, name, several if isinstance(value, list) else several[0])


@dataclass
class SamplingConfig:
    """Flags that all of these commands share."""

    base: FilePath | None = field(
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
    cache_dir: FilePath | None = field(
        default=None,
        metadata={"help": "Where the base is downloaded to. Default: the adapter's own, without --base."},
    )
    base_config: FilePath | None = field(default=None, metadata={"help": BASE_CONFIG_HELP})
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = field(
        default="auto", metadata={"help": PREDICTION_TYPE_HELP}
    )
    zero_terminal_snr: Literal["auto", "on", "off"] = field(default="auto", metadata={"help": ZERO_SNR_HELP})
    clip_skip: int | None = field(
        default=None, metadata={"help": f"{CLIP_SKIP_HELP} Default: as the adapter was trained, else 0."}
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
    guidance_rescale: float | None = field(
        default=None,
        metadata={
            "help": "Share of the guided prediction that is scaled back to its size without guidance, which keeps "
            "colours of bases with zero-terminal SNR (arXiv 2305.08891). Default: 0.7 for these, else 0."
        },
    )
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
    vae: FilePath | None = field(default=None, metadata={"help": "Another autoencoder: a folder, a file or a Hub id."})
    refiner: FilePath | None = field(
        default=None, metadata={"help": "SDXL's refiner for the last steps: a folder, a file or a Hub id."}
    )
    refiner_start: float = field(default=0.8, metadata={"help": "Share of the steps before the refiner takes over."})
    enable_xformers_memory_efficient_attention: bool = field(
        default=False, metadata={"help": "xformers' attention instead of PyTorch's (CUDA only)."}
    )

    def __post_init__(self) -> None:
        """As a record's: texts that can be recorded, and ``~`` as the home folder.

        Raises:
            ValueError: for another text, or a home folder that is not known.
        """
        settle_texts(self)

    @property
    def scales(self) -> list[float]:
        return self.scale or [1.0]

    @property
    def load_device(self) -> str | None:
        """Where models go when they are loaded."""
        return self.device

    def check_ranges(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Raise ValueError for a flag out of range; devices and files are checked by `inference`."""
        check_sampling(
            prompts,
            seeds,
            self.num_inference_steps,
            self.guidance_scale,
            self.height,
            self.width,
            self.batch_size,
        )
        if self.guidance_rescale is not None and not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"--guidance_rescale {self.guidance_rescale:g} must be from 0 to 1; 0.7 is usual")
        if self.clip_skip is not None and self.clip_skip < 0:
            raise ValueError(f"--clip_skip {self.clip_skip} must be at least 0, which is SDXL's own")
        for scale in self.scales:
            if not abs(scale) <= MAX_SCALE:
                raise ValueError(f"--scale {scale:g} must be from -{MAX_SCALE} to {MAX_SCALE}; 1 is as trained")
        check_distinct("--scale", self.scales)
        if not 0 < self.refiner_start < 1:
            raise ValueError(f"--refiner_start {self.refiner_start:g} must be between 0 and 1, such as 0.8")
        if self.refiner_start != SamplingConfig.refiner_start and not self.refiner:
            raise ValueError("--refiner_start has no effect without --refiner: name one, or leave it out")

    def download_options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` for the base."""
        return {name: value for name in DOWNLOAD_OPTIONS if (value := getattr(self, name)) is not None}

    def loading_options(self) -> dict[str, str]:
        """The same, and what the base predicts: keyword arguments of `inference.base.load_pipeline`."""
        return self.download_options() | {name: getattr(self, name) for name in PREDICTION_OPTIONS}

    def said_of_base(self) -> dict[str, Any]:
        """Flags about the base and its prompts that are not at their defaults: part of what a picture depends on."""
        names = {"base_config": None, **PREDICTION_OPTIONS, "clip_skip": None, "guidance_rescale": None}
        return {name: value for name, default in names.items() if (value := getattr(self, name)) != default}

    def sampling_options(self) -> dict[str, Any]:
        """The keyword arguments of `inference.sampling.generate_images` that these flags set."""
        names = ("num_inference_steps", "guidance_scale", "negative_prompt", "height", "width", "batch_size")
        return {name: getattr(self, name) for name in names} | {
            "guidance_rescale": self.guidance_rescale,
            "clip_skip": self.clip_skip or 0,
        }


@dataclass
class GenerateConfig(SamplingConfig):
    """Flags of `python -m inference.generate`."""

    adapter: list[FilePath] | None = field(
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
    prompt_file: FilePath | None = field(default=None, metadata={"help": "UTF-8 text, one prompt a line."})
    num_images: int | None = field(default=None, metadata={"help": "Images per prompt, from --seed on. Default: 1."})
    seed: int | None = field(default=None, metadata={"help": "Seed of each prompt's first image. Default: 0."})
    seeds: list[int] | None = field(
        default=None, metadata={"action": "extend", "help": "Explicit seeds, instead of --seed and --num_images."}
    )
    output: FilePath | None = field(default=None, metadata={"help": "Folder. Default: ADAPTER/images, or out/images."})

    @property
    def load_device(self) -> str | None:
        return "cpu" if self.offload != "none" else self.device

    def all_prompts(self) -> list[str]:
        """Of --prompt and --prompt_file."""
        return [*(self.prompt or []), *(read_prompts(self.prompt_file) if self.prompt_file else [])]

    def weighted_adapters(self) -> dict[str, float]:
        """Path of each --adapter -> its weight."""
        paths, weights = self.adapter or [], self.adapter_weights
        check_distinct("--adapter", paths)
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

    def check_ranges(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        super().check_ranges(prompts, seeds)
        if self.fuse and len(self.scales) > 1:
            raise ValueError("--fuse merges the adapters at one scale: give one --scale, or leave --fuse out")
        if (self.fuse or self.scales != [1]) and not self.adapter:
            flag = "--fuse" if self.fuse else f"--scale {self.scales[0]:g}"
            raise ValueError(f"{flag} needs an adapter: name one with --adapter")

    def output_folder(self) -> Path:
        if self.output:
            return Path(self.output)
        if self.adapter:
            path = Path(self.adapter[0])
            return (path if path.is_dir() else path.parent) / "images"  # not samples: those are the run's own
        return Path("out/images")


def read_prompts(path: str | Path) -> list[str]:
    """The non-blank lines of a UTF-8 text file."""
    prompts = [line.strip() for line in read_text(path, "prompt file").split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt: write one a line")
    return prompts


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
    check_distinct("prompt", prompts)
    if not seeds:
        raise ValueError("no seed: give at least one")
    check_distinct("seed", seeds)
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


def check_distinct(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        repeated = next(value for value, count in Counter(values).items() if count > 1)
        raise ValueError(f"{name} {repeated!r} is given twice, which would draw the same images twice")
