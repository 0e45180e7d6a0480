"""Teach SDXL a subject from a few pictures, with NoRA (nested low-rank adaptation, arXiv 2408.10280) or LoRA.

accelerate launch train_dreambooth_nora_sdxl.py \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --instance_data_dir my_cat --instance_prompt "a photo of [V] cat" --output_dir out/cat
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, free_memory
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from dreambooth.calibration import GENERIC_PROMPTS, run_unet_passes
from dreambooth.config import TrainConfig
from dreambooth.data import find_images, open_image
from dreambooth.draws import CLASS, INSTANCE, training_batch
from dreambooth.encode import (
    EncodedImages,
    EncodedPrompts,
    Tokens,
    check_prompts,
    encode_images,
    encode_prompts,
    tokenize,
)
from dreambooth.loss import denoising_loss, training_scheduler, training_target
from dreambooth.record import Clock, MetricsLog, model_card, module_fingerprint, reset_peak_memory, run_record
from inference.cli import parse_config, quiet_libraries, run_command
from inference.components import FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD, adapter_components
from inference.files import check_writable_target, write_atomic
from inference.generate import generate_images, image_names, png_bytes
from inference.load import check_base, check_xformers, load_pipeline
from nora import NoraConfig, NoraLinear, calibration_mask, check_targets, fold_nora, preprocess_nora, save_inner

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
METRICS = "metrics.jsonl"
MODEL_CARD = "README.md"
SAMPLES = "samples"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Sample(NamedTuple):
    prompt: str
    file: str  # name of the PNG
    image: Image.Image


class Encoded(NamedTuple):
    """What training needs of the pictures and prompts, made once by the frozen models."""

    streams: dict[int, EncodedImages]  # INSTANCE and, with prior preservation, CLASS
    prompts: EncodedPrompts  # the instance prompt's and, with prior preservation, the class prompt's
    unconditional: EncodedPrompts
    tokens: list[Tokens]  # of the prompts, per text encoder: for encoding anew where the text encoders are trained
    calibration_tokens: list[Tokens]


# --- the run ----------------------------------------------------------------------------------------------------------


def train(config: TrainConfig) -> Path:
    """Train one adapter and write it, its record and its samples; returns the folder.

    Raises:
        ValueError: for anything wrong with the configuration, the pictures or the base; nothing is written then.
    """
    clock = Clock()
    # 1. What can be refused without the base is refused before it is loaded.
    config = config.resolved()
    config.check()
    components = ["unet", *(TEXT_ENCODERS if config.train_text_encoder else ())]
    adapter_configs = {name: adapter_config(config, name) for name in components}
    pictures = [open_image(path) for path in find_images(config.instance_data_dir, "instance_data_dir")]
    if config.with_prior_preservation:
        check_writable_target(config.class_data_dir, "--class_data_dir", folder=True)
        for path in class_images(config):
            open_image(path)
    check_base(config.pretrained_model_name_or_path)
    output_dir = Path(config.output_dir)
    check_writable_target(output_dir, "--output_dir", folder=True)
    accelerator = make_accelerator(config, output_dir)
    set_seed(config.seed)

    # 2. The frozen base.
    dtype = DTYPES[accelerator.mixed_precision]
    pipeline = load_pipeline(config.pretrained_model_name_or_path, dtype, accelerator.device)
    scheduler = training_scheduler(pipeline.scheduler)
    for model in (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False)
    trained = {name: getattr(pipeline, name) for name in components}
    check_fits(config, trained, adapter_configs)
    config = replace(  # what the base and accelerate decided belongs into the record
        config,
        resolution=config.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        mixed_precision=accelerator.mixed_precision,
        validation_prompt=config.sample_prompts,
    )
    base_fingerprints = {name: module_fingerprint(model) for name, model in trained.items()}

    # 3. Pictures and prompts are encoded once, and what encoded them is freed unless it is trained.
    encoded = encode(config, accelerator, pipeline, pictures)
    pipeline = model = None
    free_memory()
    clock.lap("encode_seconds")

    # 4. The adapters go in, all starting at the base model; NoRA first measures what its layers see.
    for name, model in trained.items():
        if config.method == "nora":
            passes = unet_passes if name == "unet" else text_encoder_passes
            preprocess_nora(model, adapter_configs[name], passes(config, accelerator, name, model, encoded, scheduler))
        model.add_adapter(adapter_configs[name])
        cast_training_params(model, dtype=torch.float32)
        model.train()  # a text encoder's dropout is 0 in SDXL; gradient checkpointing asks for training mode
        if config.gradient_checkpointing:
            enable_checkpointing(model)
    parameters = [p for model in trained.values() for p in model.parameters() if p.requires_grad]
    clock.lap("inject_seconds")

    # 5. The loop.
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    models = {name: accelerator.prepare(model) for name, model in trained.items()}
    optimizer = accelerator.prepare(optimizer)
    slots_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    prior_loss_weight = config.prior_loss_weight if config.with_prior_preservation else None
    if accelerator.is_main_process:
        clear_earlier_run(output_dir)
    accelerator.wait_for_everyone()
    reset_peak_memory()
    accelerator.init_trackers(
        "dreambooth", {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str))}
    )
    progress = tqdm(
        range(config.max_train_steps), desc="training", unit="step", disable=not accelerator.is_main_process
    )
    with MetricsLog(output_dir / METRICS, enabled=accelerator.is_main_process) as metrics:
        for step in progress:
            step_started, step_loss = time.perf_counter(), 0.0
            for micro_step in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(*models.values()):
                    first = (
                        micro_step * accelerator.num_processes + accelerator.process_index
                    ) * config.train_batch_size
                    batch = training_batch(
                        encoded.streams,
                        accelerator.device,
                        seed=config.seed,
                        step=step,
                        slots=range(first, first + config.train_batch_size),
                        slots_per_step=slots_per_step,
                        num_train_timesteps=scheduler.config.num_train_timesteps,
                    )
                    prompts = encoded.prompts
                    if config.train_text_encoder:
                        prompts = encode_prompts([models[name] for name in TEXT_ENCODERS], encoded.tokens)
                    prompts = prompts.each(config.train_batch_size)  # instance × B, then class × B, as the pictures
                    noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
                    prediction = models["unet"](
                        noisy_latents.to(dtype),
                        batch.timesteps,
                        prompts.prompt_embeds,
                        added_cond_kwargs={"text_embeds": prompts.pooled_prompt_embeds, "time_ids": batch.time_ids},
                    ).sample
                    loss = denoising_loss(prediction, training_target(scheduler, batch), prior_loss_weight)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                step_loss += accelerator.reduce(loss.detach(), "mean").item() / config.gradient_accumulation_steps
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            metrics.write(step + 1, step_loss, learning_rate, time.perf_counter() - step_started)
            accelerator.log({"loss": step_loss, "learning_rate": learning_rate}, step=step + 1)
            progress.set_postfix(loss=f"{step_loss:.4f}", lr=f"{learning_rate:.1e}")
            if (
                config.validation_steps
                and (step + 1) % config.validation_steps == 0
                and step + 1 < config.max_train_steps
            ):
                with clock.pause():  # looking is not training
                    samples = draw_samples(config, accelerator, trained, dtype)
                    keep_samples(accelerator, samples, output_dir / SAMPLES / f"step-{step + 1:06d}", step + 1)
    accelerator.wait_for_everyone()
    clock.lap("train_seconds")
    clock.timings["seconds_per_step"] = metrics.median_seconds

    # 6. Adapter and record are saved before anything is drawn: running out of memory there must not lose the run.
    if accelerator.is_main_process:
        save_adapter(config, trained, output_dir)
        record = run_record(
            config,
            base_fingerprints=base_fingerprints,
            trainable_parameters={
                name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in trained.items()
            },
            outer_ranks=sorted({r for model in trained.values() for r in outer_ranks(model)}),
            timings=clock.timings | {"total_seconds": clock.total},
            files={name: (output_dir / name).stat().st_size for name in adapter_files(config)},
            device=accelerator.device,
            dtype=dtype,
            num_processes=accelerator.num_processes,
        )
        write_atomic(output_dir / RUN_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_atomic(output_dir / MODEL_CARD, model_card(record, []))
    samples = draw_samples(config, accelerator, trained, dtype)
    keep_samples(accelerator, samples, output_dir / SAMPLES, config.max_train_steps)
    if accelerator.is_main_process:
        card = model_card(record, [(sample.prompt, f"{SAMPLES}/{sample.file}") for sample in samples])
        write_atomic(output_dir / MODEL_CARD, card)
    accelerator.end_training()
    return output_dir


# --- the adapter ------------------------------------------------------------------------------------------------------


def adapter_config(config: TrainConfig, component: str) -> PeftConfig:
    """PEFT's configuration for one component: unet, text_encoder or text_encoder_2."""
    targets = UNET_TARGETS if component == "unet" else TEXT_ENCODER_TARGETS
    if config.method == "lora":
        return LoraConfig(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=targets)
    return NoraConfig(
        r=config.rank,
        outer_r=config.outer_rank,
        target_modules=targets,
        outer_init=config.outer_init,
        awsvd_gamma=config.awsvd_gamma,
        sigma_side=config.sigma_side,
        inner_init=config.inner_init,
        inner_std=config.inner_std,
    )


def check_fits(config: TrainConfig, trained: dict[str, nn.Module], adapter_configs: dict[str, PeftConfig]) -> None:
    """Refuse ranks that a layer can't hold, before anything is drawn, measured or written."""
    if config.method == "nora":
        for name, model in trained.items():
            try:
                check_targets(model, adapter_configs[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error} (r is --rank, outer_r is --outer_rank)") from error


def outer_ranks(model: nn.Module) -> set[int]:
    """The outer ranks that the model's NoRA layers got; empty for another method."""
    layers = [module for module in model.modules() if isinstance(module, NoraLinear)]
    return {inner.in_features for layer in layers for inner in layer.nora_inner_A.values()}


def adapter_files(config: TrainConfig) -> list[str]:
    return [FOLDED_WEIGHTS, INNER_WEIGHTS] if config.method == "nora" else [FOLDED_WEIGHTS]


def save_adapter(config: TrainConfig, trained: dict[str, nn.Module], folder: Path) -> None:
    """The adapter as a diffusers LoRA file and, for NoRA, its inner factors alone; each file is whole or not there."""
    components = adapter_components(trained)  # key prefix -> model
    layers: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for prefix, model in components.items():
        weights = fold_nora(model) if config.method == "nora" else get_peft_model_state_dict(model)
        component, _, level = prefix.partition(".")  # in "text_encoder.text_model" the level belongs to the keys
        layers[component] = {f"{level}.{key}" if level else key: value for key, value in weights.items()}
    with tempfile.TemporaryDirectory() as fresh:
        StableDiffusionXLPipeline.save_lora_weights(
            fresh,
            unet_lora_layers=layers["unet"],
            text_encoder_lora_layers=layers["text_encoder"],
            text_encoder_2_lora_layers=layers["text_encoder_2"],
            weight_name=FOLDED_WEIGHTS,
        )
        write_atomic(folder / FOLDED_WEIGHTS, (Path(fresh) / FOLDED_WEIGHTS).read_bytes())
    if config.method == "nora":
        save_inner(folder / INNER_WEIGHTS, components)


# --- before the loop --------------------------------------------------------------------------------------------------


def make_accelerator(config: TrainConfig, output_dir: Path) -> Accelerator:
    mixed_precision = config.mixed_precision
    if mixed_precision is None and torch.cuda.is_available():
        # SDXL in fp32 fits few cards, and an accelerate that was never configured says "no".
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        mixed_precision = "fp16" if configured == "no" else configured
    accelerator = Accelerator(
        mixed_precision="no" if mixed_precision == "fp32" else mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / config.logging_dir)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # NoRA's frozen factors are buffers, the same in every process
                # SDXL reads the last but one layer of its first text encoder: adapters above it get no gradient.
                find_unused_parameters=config.train_text_encoder,
            )
        ],
    )
    if accelerator.mixed_precision not in DTYPES:
        raise ValueError(
            f"accelerate is configured for {accelerator.mixed_precision}, which is not supported here: add "
            "--mixed_precision no, fp16 or bf16"
        )
    if config.enable_xformers_memory_efficient_attention:
        check_xformers(accelerator.device)
    return accelerator


def encode(
    config: TrainConfig, accelerator: Accelerator, pipeline: StableDiffusionXLPipeline, pictures: list[Image.Image]
) -> Encoded:
    """Latents of the pictures (class images are drawn first where some are missing) and embeddings of the prompts."""
    if config.enable_xformers_memory_efficient_attention:
        pipeline.enable_xformers_memory_efficient_attention()
    prompts = [config.instance_prompt, *([config.class_prompt] if config.with_prior_preservation else [])]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    check_prompts(pipeline.tokenizer, [*prompts, *config.sample_prompts])
    tokens = tokenize(tokenizers, prompts)
    with torch.no_grad():
        encoded_prompts = encode_prompts(text_encoders, tokens)  # (P, tokens, d), (P, d2): P = 1, 2 with class images
        unconditional = encode_prompts(text_encoders, tokenize(tokenizers, [""]))
    if pipeline.config.force_zeros_for_empty_prompt:  # SDXL's own way of saying nothing
        unconditional = EncodedPrompts(*map(torch.zeros_like, unconditional))
    if config.with_prior_preservation:
        draw_class_images(config, accelerator, pipeline)
        class_pictures = [open_image(path) for path in class_images(config)[: config.num_class_images]]
    streams = {INSTANCE: encode_images(pipeline.vae, pictures, config.resolution, config.random_flip)}
    if config.with_prior_preservation:
        streams[CLASS] = encode_images(pipeline.vae, class_pictures, config.resolution, config.random_flip)
    calibration_tokens = tokenize(tokenizers, [*prompts, *GENERIC_PROMPTS])
    return Encoded(streams, encoded_prompts, unconditional, tokens, calibration_tokens)


def class_images(config: TrainConfig) -> list[Path]:
    """The class images that are there already."""
    folder = Path(config.class_data_dir)
    return find_images(folder, "class_data_dir") if folder.is_dir() and any(folder.iterdir()) else []


def draw_class_images(config: TrainConfig, accelerator: Accelerator, pipeline: StableDiffusionXLPipeline) -> None:
    """Fill ``class_data_dir`` up to ``num_class_images`` with the base's own pictures of the class."""
    folder, name = Path(config.class_data_dir), "class-seed{:06d}.png"
    names = {path.name for path in class_images(config)}
    own = len([one for one in names if not one.startswith("class-seed")])  # the user's own pictures count
    seeds = [seed for seed in range(config.num_class_images - own) if name.format(seed) not in names]
    accelerator.wait_for_everyone()  # all have looked before the first writes
    seeds = seeds[accelerator.process_index :: accelerator.num_processes]
    if seeds:
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(seeds), desc="class images", unit="image", disable=not accelerator.is_main_process)
        options = {"num_inference_steps": config.num_inference_steps, "batch_size": config.sample_batch_size}
        for image in generate_images(pipeline, [config.class_prompt], seeds, progress=bar, **options):
            write_atomic(folder / name.format(image.seed), png_bytes(image.image))
    accelerator.wait_for_everyone()


def unet_passes(config, accelerator, name, unet, encoded: Encoded, scheduler: DDPMScheduler):
    """The passes that measure what the UNet's attention sees."""
    return lambda: run_unet_passes(
        unet,
        encoded.streams[INSTANCE],
        encoded.prompts,
        encoded.unconditional,
        scheduler,
        passes=config.calibration_passes,
        batch_size=config.train_batch_size,
        seed=config.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def text_encoder_passes(config, accelerator, name, text_encoder, encoded: Encoded, scheduler):
    """One pass over the user's and some everyday prompts; padding does not count."""
    tokens = encoded.calibration_tokens[TEXT_ENCODERS.index(name)]

    def run() -> None:
        with calibration_mask(tokens["attention_mask"].to(accelerator.device)):
            text_encoder(tokens["input_ids"].to(accelerator.device))

    return run


def enable_checkpointing(model: nn.Module) -> None:
    """diffusers and transformers name it differently."""
    (getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable)()


# --- what a run shows -------------------------------------------------------------------------------------------------


def draw_samples(
    config: TrainConfig, accelerator: Accelerator, trained: dict[str, nn.Module], dtype: torch.dtype
) -> list[Sample]:
    """Pictures by the adapter as it is now: inference's own function, on the live modules. Main process only."""
    if config.num_validation_images == 0 or not accelerator.is_main_process:
        return []
    # What is frozen is loaded anew, because it was freed after encoding. The trained models are put in afterwards:
    # load_pipeline casts all it holds, and their adapters must stay fp32.
    absent = dict.fromkeys(trained)
    pipeline = load_pipeline(config.pretrained_model_name_or_path, dtype, accelerator.device, **absent)
    pipeline.register_modules(**trained)
    names = image_names(config.sample_prompts)
    seeds = range(config.seed, config.seed + config.num_validation_images)
    bar = tqdm(total=len(names) * len(seeds), desc="samples", unit="image")
    options = {"num_inference_steps": config.num_inference_steps, "batch_size": config.sample_batch_size}
    # What is trained computes in mixed precision by itself; SDXL's autoencoder overflows in fp16.
    pipeline.vae.float()
    drawn = list(generate_images(pipeline, config.sample_prompts, seeds, progress=bar, **options))
    return [Sample(one.prompt, f"{names[one.prompt]}-seed{one.seed}.png", one.image) for one in drawn]


def keep_samples(accelerator: Accelerator, samples: Sequence[Sample], folder: Path, step: int) -> None:
    """Write the pictures into the folder and to TensorBoard."""
    for sample in samples:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / sample.file, png_bytes(sample.image))
        for tracker in accelerator.trackers:
            tracker.writer.add_image(sample.file, np.asarray(sample.image), step, dataformats="HWC")


def clear_earlier_run(folder: Path) -> None:
    """Make the folder, and take away what an earlier run left: its record must not stand beside new weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD, MODEL_CARD):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(TrainConfig, argv, description=__doc__.split("\n")[0])
    quiet_libraries()

    def command() -> None:
        try:
            print(f"{train(config)}: adapter, samples and record are there")
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with --train_batch_size {config.train_batch_size}: lower it, add "
                "--gradient_checkpointing, or use --mixed_precision fp16"
            ) from error

    run_command(command)


if __name__ == "__main__":
    main()
