"""What can be refused before the base is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dreambooth.prepare import ENCODED, Pictures, check_folders, read_pictures
from inference.base import base_geometry, check_base, check_xformers
from methods.components import BEST, RUN_RECORD
from methods.files import approximate_file
from methods.registry import METHODS
from runs.checkpoints import check_earlier_run, find_checkpoint, identity, read_step
from runs.exports import RESULTS
from runs.record import METRICS, SAMPLES
from settings.training import TrainConfig, is_first_process
from settings.watching import OutputOptions
from storage.files import check_kept, check_writable_target
from trainer.accelerator import make_accelerator
from trainer.optimizer import check_optimizer, scaled_learning_rate

FOLDERS = ("instance_data_dir", "class_data_dir")  # of a subject
INPUTS = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "dataset_name", "concepts_list",
    "mask_data_dir", "validation_data_dir", "eval_protocol", "clip", "dino",
)  # fmt: skip


def preflight(config: TrainConfig) -> tuple[TrainConfig, Pictures]:
    """The flags with what follows from the base's configuration, and the pictures; writes nothing.

    Raises:
        ValueError: for anything wrong with the machine, the pictures or the base's configuration.
    """
    if config.hardware.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU, and this machine shows none: use bf16 or no")
    for warning in check_optimizer(config.optimizer, METHODS[config.method.name].vectors):
        if is_first_process():
            print(f"warning: {warning}", file=sys.stderr)
    check_hub(config.output)
    base = config.base.pretrained_model_name_or_path
    check_base(base)
    check_writable_target(Path(config.output.output_dir), "--output_dir", folder=True)
    check_folders(
        config.output.output_dir, config.data, config.prior, held_out_dir=config.validation.validation_data_dir
    )
    resolution, granularity = base_geometry(base, **config.base.download_options())
    config = config.replace(resolution=config.data.resolution or resolution)
    pictures = read_pictures(
        config.data,
        config.prior,
        granularity,
        seed=config.loop.seed,
        cache_dir=config.base.cache_dir,
        held_out_dir=config.validation.validation_data_dir,
        new_word=config.text.token_abstraction if config.text.train_text_encoder_ti else None,
    )
    check_kept(inputs(config.flags(), pictures), written_places(Path(config.output.output_dir)))
    if config.data.dry_run and is_first_process():
        print(pictures.report(config.loop, config.prior, config.text.token_abstraction))
    return config, pictures


def inputs(flags: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, Path]]:
    """(flag, path) of everything on this disk that a run reads: what flags name, and each picture, maybe a link."""
    named = [(f"--{name}", Path(path)) for name in INPUTS if (path := flags[name])]
    for concept in pictures.concepts:
        named += [(f"--{name}", Path(path)) for name in FOLDERS if (path := getattr(concept, name))]
    examples = [one.example for one in (*pictures.instance, *pictures.classes, *pictures.held_out)]
    named += [("the picture", one.image) for one in examples if isinstance(one.image, Path)]
    named += [("the mask", one.mask) for one in examples if one.mask is not None]
    return [(flag, path) for flag, path in named if path.exists()]


def written_places(output_dir: Path) -> list[Path]:
    """What a run replaces or clears in its folder."""
    names = [output_dir / name for name in (*RESULTS, METRICS, SAMPLES, BEST, ENCODED)]
    patterns = ("checkpoint-*", ".checkpoint-*", approximate_file("*"))
    return names + [path for pattern in patterns for path in output_dir.glob(pattern)]


def open_run(config: TrainConfig, pictures: Pictures) -> tuple[Accelerator, TrainConfig, Path | None, int]:
    """The accelerator, the flags as they will be in force, the checkpoint to go on from, and steps between samples.

    Raises:
        ValueError: for a folder that holds something else, a checkpoint of another run, or what can't run here.
    """
    output_dir, loop = Path(config.output.output_dir), config.loop
    checkpoint = find_checkpoint(loop.resume_from_checkpoint, output_dir)
    if loop.resume_from_checkpoint and checkpoint is None:
        print(f"{output_dir} has no checkpoint yet: starting from the beginning")
    check_earlier_run(output_dir, [*RESULTS, SAMPLES, BEST], RUN_RECORD, METRICS, resumes=checkpoint is not None)
    accelerator = make_accelerator(
        config.hardware, config.output, accumulation=loop.gradient_accumulation_steps, trains_text=config.text.learns
    )
    if config.hardware.enable_xformers_memory_efficient_attention:
        check_xformers(accelerator.device)
    samples_per_step = loop.samples_per_step(accelerator.num_processes)
    epoch_steps = pictures.epoch_steps(samples_per_step)
    samples_every = config.validation.sampling_steps(epoch_steps)
    total_steps = loop.total_steps(epoch_steps)
    config.text.steps(total_steps)  # refuses a share that leaves none
    config = config.replace(
        max_train_steps=total_steps,
        learning_rate=scaled_learning_rate(config.optimizer, samples_per_step),
        mixed_precision=accelerator.mixed_precision,
        validation_prompt=config.validation.validation_prompt or pictures.instance_prompts,
    )
    if checkpoint:
        read_step(checkpoint, identity(config.flags()), total_steps)
    return accelerator, config, checkpoint, samples_every


def check_hub(output: OutputOptions) -> None:
    """Raise ValueError for a repository's name that the hub would refuse at the end."""
    if output.push_to_hub:
        try:
            validate_repo_id(output.hub_model_id or Path(output.output_dir).resolve().name)
        except HFValidationError as error:
            raise ValueError(f"--push_to_hub needs another --hub_model_id: {error}") from error
