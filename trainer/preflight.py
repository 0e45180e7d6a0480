"""What can be refused before the base is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dreambooth.data import source_flag
from dreambooth.loss import Objective
from dreambooth.prepare import ENCODED, Pictures, check_folders, check_prompt_lengths, read_pictures
from inference.base import attention_line, base_geometry, check_base, check_xformers, load_outline
from inference.prediction import Prediction, prediction_line, prediction_of
from inference.sampling import check_clip_skip
from methods.adapter import Adapter
from methods.components import BEST, RUN_RECORD
from methods.files import approximate_file
from methods.registry import METHODS
from runs.checkpoints import FolderLock, check_earlier_run, find_checkpoint, identity, read_step, recorded_flags
from runs.exports import check_tools_file, results
from runs.record import METRICS, SAMPLES, MetricsLog
from settings.base import BaseOptions
from settings.learning import LoopOptions, LossOptions, OptimizerOptions
from settings.method import TextOptions
from settings.training import INPUTS, SUBJECT_INPUTS, TrainConfig, is_first_process
from settings.watching import OutputOptions, ValidationOptions
from storage.files import check_kept, check_writable_target
from storage.pictures import find_images
from trainer.accelerator import PRECISIONS, check_login, check_one_folder, check_same, make_accelerator
from trainer.memory import import_torchao
from trainer.models import check_fits, make_run_adapter, reserve_new_tokens, trained_names
from trainer.optimizer import check_optimizer, check_rates, scaled_learning_rate
from trainer.sharding import SplittingAccelerator
from trainer.vram import fit_card, run_shape


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
    if config.data.instance_data_dir:
        find_images(config.data.instance_data_dir, "instance_data_dir")  # before anything is asked of the Hub
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
    return config, pictures


def inputs(flags: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, Path]]:
    """(flag, path) of everything on this disk that a run reads: what flags name, and each picture, maybe a link."""
    named = [(f"--{name}", Path(path)) for name in INPUTS if name not in SUBJECT_INPUTS and (path := flags[name])]
    for concept in pictures.concepts:
        named += [(f"--{name}", Path(path)) for name in SUBJECT_INPUTS if (path := getattr(concept, name))]
    examples = [one.example for one in (*pictures.instance, *pictures.classes, *pictures.held_out)]
    named += [("the picture", one.image) for one in examples if isinstance(one.image, Path)]
    named += [("the mask", one.mask) for one in examples if one.mask is not None]
    return [(flag, path) for flag, path in named if path.exists()]


def written_places(output_dir: Path) -> list[Path]:
    """What a run replaces or clears in its folder."""
    names = [output_dir / name for name in (*results(output_dir), METRICS, SAMPLES, BEST, ENCODED)]
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
    if checkpoint and (recorded := recorded_flags(checkpoint).get("method_args")):
        config = config.replace(method_args=config.method.as_recorded(recorded).method_args)
    names = [*results(output_dir), SAMPLES, BEST]
    if config.output.writes_tools_file(METHODS[config.method.name].low_rank):
        check_tools_file(output_dir)
    check_earlier_run(output_dir, names, RUN_RECORD, METRICS, resumes=checkpoint is not None)
    accelerator = make_accelerator(
        config.hardware, config.output, accumulation=loop.gradient_accumulation_steps, trains_text=config.text.learns
    )
    if config.hardware.enable_xformers_memory_efficient_attention:
        check_xformers(accelerator.device)
    check_one_folder(accelerator, output_dir, f"--output_dir {output_dir}")
    if config.prior.draws_class_images:
        for number, concept in enumerate(pictures.concepts):
            flag = source_flag(config.data.concepts_list, number, "class_data_dir")
            check_one_folder(accelerator, Path(concept.class_data_dir), f"--{flag} {concept.class_data_dir}")
    check_same(accelerator, pictures.hash(), "pictures or captions")
    # asked before there is a prompt by default
    samples_every = config.validation.sampling_steps(
        pictures.epoch_steps(loop.samples_per_step(accelerator.num_processes))
    )
    records = (loop, config.optimizer, config.text, config.validation)
    settled = settled_flags(*records, pictures, accelerator.num_processes)
    config = config.replace(**settled, mixed_precision=accelerator.mixed_precision)
    prompts = config.validation.validation_prompt or ()
    outline = check_fits_base(config.base, config.loss, config.text, make_run_adapter(config), pictures, prompts)
    if is_first_process():
        named = config.base.pretrained_model_name_or_path, config.base.prediction_type
        print(prediction_line(outline.scheduler, *named))
        for warning in zero_snr_warnings(config.loss, prediction_of(outline.scheduler)):
            print(f"warning: {warning}", file=sys.stderr)
        print(attention_line(accelerator.device, config.hardware.enable_xformers_memory_efficient_attention))
    samples = loop.train_batch_size * (2 if config.prior.with_prior_preservation else 1)
    dtype = PRECISIONS[accelerator.mixed_precision]
    shape = run_shape(outline, config.text, make_run_adapter(config), pictures, samples, dtype)
    splits = isinstance(accelerator, SplittingAccelerator)
    hardware, said = fit_card(config.hardware, shape, accelerator.device, may_quantize=not splits)
    if said and is_first_process():
        print(said)
    if hardware.quantize_base == "int8":
        import_torchao()
    config = config.replace(**dict(hardware))
    if checkpoint:
        content: dict[str, Any] = {"number_of_processes": accelerator.num_processes}
        if not config.prior.draws_class_images:
            content["pictures_and_prompts"] = pictures.hash()
        flags = config.flags() | prediction_of(outline.scheduler).flags()
        identity_now = identity(flags, config.plans_ahead(), **content)
        step = read_step(checkpoint, identity_now, config.loop.max_train_steps)
        MetricsLog(output_dir / METRICS, enabled=False, after=step)  # which refuses damaged lines
    return accelerator, config, checkpoint, samples_every


def zero_snr_warnings(loss: LossOptions, predicts: Prediction) -> Iterator[str]:
    """What is said of losses that don't go well with a last timestep of noise alone."""
    if not predicts.zero_snr:
        return
    if loss.noise_offset:
        yield f"--noise_offset {loss.noise_offset:g} is for bases without zero terminal SNR, which this one has"
    for flag, given in (("snr_gamma", loss.snr_gamma is not None), ("debiased_estimation", loss.debiased_estimation)):
        if given:
            yield f"--{flag} gives the last timestep, at which drawing begins and the SNR is zero, no weight"


def settled_flags(
    loop: LoopOptions,
    optimizer: OptimizerOptions,
    text: TextOptions,
    validation: ValidationOptions,
    pictures: Pictures,
    num_processes: int,
) -> dict[str, Any]:
    """Flags that follow from the number of pictures and processes; warns of rates at which nothing is learned.

    Raises:
        ValueError: for too many steps, too few of the text encoders, or a schedule that can't be.
    """
    samples_per_step = loop.samples_per_step(num_processes)
    total_steps = loop.total_steps(pictures.epoch_steps(samples_per_step))
    text.steps(total_steps)  # refuses a share that leaves none
    rate = scaled_learning_rate(optimizer, samples_per_step)
    for warning in check_rates(optimizer.replace(learning_rate=rate), total_steps):
        if is_first_process():
            print(f"warning: {warning}", file=sys.stderr)
    prompts = validation.validation_prompt or pictures.instance_prompts
    return {"max_train_steps": total_steps, "learning_rate": rate, "validation_prompt": prompts}


def check_fits_base(
    base: BaseOptions,
    loss: LossOptions,
    text: TextOptions,
    adapter: Adapter,
    pictures: Pictures,
    prompts: Sequence[str],
) -> StableDiffusionXLPipeline:
    """Refuse prompts, words, ranks and losses that this base can't have, before its weights are read.

    Returns the base's outline.

    Args:
        prompts: that are drawn, beside those that are trained on.

    Raises:
        ValueError: with the limit.
    """
    options = {"vae": base.pretrained_vae_model_name_or_path, **base.loading_options()}
    outline = load_outline(base.pretrained_model_name_or_path, **options)
    check_clip_skip([outline.text_encoder, outline.text_encoder_2], base.clip_skip)
    Objective.from_options(outline.scheduler, loss)
    check_fits(adapter, {name: getattr(outline, name) for name in trained_names(text)}, text)
    check_prompt_lengths(outline, pictures, prompts, reserve_new_tokens(outline, text))
    return outline


def end_dry_run(output: OutputOptions, report: str) -> Path:
    """Refuse what the run would have refused where it writes, and say what it would train on; returns its folder."""
    if (folder := Path(output.output_dir)).is_dir():
        with FolderLock() as lock:
            lock.take(folder)
    if output.push_to_hub:
        check_login(output.hub_token)
    if is_first_process():
        print(report)
    return folder


def check_hub(output: OutputOptions) -> None:
    """Raise ValueError for a repository's name that the hub would refuse at the end."""
    if output.push_to_hub:
        try:
            validate_repo_id(output.hub_model_id or Path(output.output_dir).resolve().name)
        except HFValidationError as error:
            raise ValueError(f"--push_to_hub needs another --hub_model_id: {error}") from error
