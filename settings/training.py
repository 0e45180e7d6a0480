"""The command line of the trainer, as one typed and checked record.

Flags that diffusers' ``train_dreambooth_lora_sdxl.py`` has keep their name, default and meaning; docs/flags.md lists
the few that differ, and why.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.optimization import SchedulerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# (outer rank, rank, inner init) of method.md's presets; an outer rank of None is 8 x rank, or what a layer can hold.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"rank": 16, "outer_rank": None, "inner_init": "matched"},
    "paper": {"rank": 32, "outer_rank": 64, "inner_init": "normal"},
    "tiny": {"rank": 8, "outer_rank": None, "inner_init": "matched"},
}
LORA_RANK = 4
PAPER_STEPS = 500
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NORA_DEFAULTS = {
    "outer_init": "awsvd",
    "awsvd_gamma": 0.5,
    "sigma_side": "B",
    "inner_std": 0.01,
    "calibration_passes": 32,
}
NORA_OPTIONS = ("preset", "outer_rank", "inner_init", *NORA_DEFAULTS)
# What --low_vram sets, unless the command line says otherwise.
LOW_VRAM = {"gradient_checkpointing": True, "quantize_base": "int8"}
POSITIVE = (
    "rank",
    "outer_rank",
    "lora_alpha",
    "resolution",
    "repeats",
    "cache_variants",
    "num_class_images",
    "sample_batch_size",
    "max_train_steps",
    "num_train_epochs",
    "train_batch_size",
    "gradient_accumulation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "calibration_passes",
    "validation_epochs",
    "validation_steps",
    "validation_loss_steps",
    "eval_steps",
    "early_stopping_patience",
    "num_eval_images",
    "num_inference_steps",
    "lr_num_cycles",
    "num_new_tokens_per_abstraction",
)
AT_LEAST_0 = (
    "num_validation_images",
    "lr_warmup_steps",
    "seed",
    "dataloader_num_workers",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
    "text_encoder_lr",
)
ABOVE_0 = (
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "snr_gamma",
    "huber_c",
    "loraplus_lr_ratio",
    "lr_power",
    "inner_std",
)
FRACTIONS = ("train_text_encoder_frac", "train_text_encoder_ti_frac", "caption_dropout", "lora_dropout", "noise_offset")
COUNTS = ("max_train_steps", "num_train_epochs", "repeats")
MOST = 10**6  # of each: every step's picture is decided before the first
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends
BELOW_1 = ("adam_beta1", "adam_beta2", "prodigy_beta3", "ema_decay", "caption_dropout", "lora_dropout")
# piecewise_constant needs rules that no flag gives.
LR_SCHEDULES = [schedule.value for schedule in SchedulerType if schedule is not SchedulerType.PIECEWISE_CONSTANT]
INTERPOLATION_MODES = ("lanczos", "bilinear", "bicubic", "box", "nearest", "hamming")
Idle = Sequence[tuple[Sequence[str], "Callable[[TrainConfig], object]", str]]
# Flags, when they do something, and where they don't. Given there, these are refused:
IDLE: Idle = (
    (("dataset_config_name",), lambda config: config.dataset_name, "without --dataset_name"),
    (
        ("cache_variants",),
        lambda config: config.random_flip or not config.center_crop or config.cache_variants == 1,
        "with --center_crop and without --random_flip: all are one crop",
    ),
    (
        ("class_data_dir", "class_prompt", "prior_teacher", "prior_loss_weight", "num_class_images"),
        lambda config: config.with_prior_preservation,
        "without --with_prior_preservation",
    ),
    (("num_class_images",), lambda config: not config.prior_teacher, "with --prior_teacher, which needs none"),
    (("huber_c",), lambda config: config.loss_type == "huber", "without --loss_type huber"),
    (("train_text_encoder_frac",), lambda config: config.train_text_encoder, "without --train_text_encoder"),
    (
        ("token_abstraction", "num_new_tokens_per_abstraction", "train_text_encoder_ti_frac"),
        lambda config: config.train_text_encoder_ti,
        "without --train_text_encoder_ti",
    ),
    (
        ("validation_data_dir",),
        lambda config: config.validation_loss_steps is not None or config.best_by == "val_loss",
        "without --validation_loss_steps",
    ),
    (
        ("best_by", "early_stopping_patience", "eval_protocol", "num_eval_images", "clip", "dino"),
        lambda config: config.eval_steps is not None,
        "without --eval_steps",
    ),
    (("hub_model_id", "hub_token"), lambda config: config.push_to_hub, "without --push_to_hub"),
)
# diffusers' script takes these without a word, and its commands run here: they get a warning.
IDLE_AS_IN_DIFFUSERS: Idle = (
    (("image_column",), lambda config: config.dataset_name, "without --dataset_name"),
    (
        ("prior_generation_precision",),
        lambda config: config.with_prior_preservation and not config.prior_teacher,
        "where no class images are drawn",
    ),
    (
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        lambda config: config.trains_text,
        "where no text encoder is trained",
    ),
    (
        ("text_encoder_lr",),
        lambda config: not config.trains_text or not config.uses_prodigy,
        "with --optimizer prodigy, which has one learning rate",
    ),
    (
        ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        lambda config: config.uses_prodigy,
        "without --optimizer prodigy",
    ),
    (("adam_beta1", "adam_beta2"), lambda config: config.optimizer_takes("betas", tuple), "with this --optimizer"),
    (("adam_epsilon",), lambda config: config.optimizer_takes("eps", float), "with this --optimizer"),
    (("lr_warmup_steps",), lambda config: config.lr_scheduler != "constant", "with --lr_scheduler constant"),
    (
        ("lr_num_cycles",),
        lambda config: config.lr_scheduler == "cosine_with_restarts",
        "without --lr_scheduler cosine_with_restarts",
    ),
    (("lr_power",), lambda config: config.lr_scheduler == "polynomial", "without --lr_scheduler polynomial"),
    (("num_train_epochs",), lambda config: config.max_train_steps is None, "beside --max_train_steps"),
    (
        ("validation_epochs",),
        lambda config: config.validation_prompt and config.validation_steps is None,
        "without --validation_prompt, or beside --validation_steps",
    ),
)
WHICH_BASE = "SDXL: a diffusers folder, a Hub id or a .safetensors file."


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def is_first_process() -> bool:
    """Of those that were launched, and the one that speaks; known before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(kw_only=True)
class BaseOptions:
    pretrained_model_name_or_path: str = field(metadata={"help": WHICH_BASE})
    pretrained_vae_model_name_or_path: str | None = _option(
        None, "Another autoencoder: a folder or a Hub id, such as madebyollin/sdxl-vae-fp16-fix."
    )
    revision: str | None = _option(None, "Revision of a base on the Hub; not applied to another autoencoder.")
    variant: str | None = _option(
        None, "Variant of the base's files, such as fp16; not applied to another autoencoder."
    )
    cache_dir: str | None = _option(None, "Where downloads are kept.")


@dataclass(kw_only=True)
class DataOptions:
    instance_data_dir: str | None = _option(None, "Folder with the pictures, and maybe captions, of the subject.")
    instance_prompt: str | None = _option(None, 'What a picture without a caption shows, such as "a photo of [V] cat".')
    dataset_name: str | None = _option(None, "A Hugging Face dataset, on the Hub or in a folder, instead of a folder.")
    dataset_config_name: str | None = _option(None, "Configuration of that dataset.")
    image_column: str = _option("image", "The dataset's column of pictures.")
    caption_column: str | None = _option(None, "Column of captions, of the dataset or of the folder's metadata.jsonl.")
    concepts_list: str | None = _option(
        None, "JSON or YAML list of subjects, each with instance_data_dir and instance_prompt, maybe the class's."
    )
    repeats: int = _option(1, "How often a picture counts in an epoch.")
    mask_data_dir: str | None = _option(None, "Folder of masks named like the pictures; the loss counts where white.")
    alpha_mask: bool = _option(False, "The loss counts where a picture is opaque.")
    resolution: int | None = _option(None, "Side of the square trained on, pixels. Default: the base's own (1024).")
    aspect_ratio_buckets: str | None = _option(
        None, 'Shapes trained on: "sdxl", or height,width pairs such as "1024,1024;832,1216". Default: a square.'
    )
    center_crop: bool = _option(False, "Cut the middle out, not a random place.")
    random_flip: bool = _option(False, "Mirror every picture half of the time.")
    cache_variants: int | None = _option(
        None, "Crops and mirror images encoded of each picture. Default: 4 where they can differ."
    )
    image_interpolation_mode: Literal[INTERPOLATION_MODES] = _option("lanczos", "How pictures are resized.")
    caption_dropout: float = _option(0.0, "Share of the samples trained without their prompt.")
    encoded_cache_dir: str | None = _option(
        None, "Where encoded pictures and prompts are kept for other runs. Default: inside --output_dir."
    )
    dataloader_num_workers: int = _option(0, "Processes that read pictures while others are encoded.")
    dry_run: bool = _option(False, "Say what would be trained on, and stop.")


@dataclass(kw_only=True)
class PriorOptions:
    with_prior_preservation: bool = _option(False, "Train on the class too, so that it is not forgotten.")
    class_data_dir: str | None = _option(
        None, "Folder for class images; what is missing is drawn. Needed unless --prior_teacher."
    )
    class_prompt: str | None = _option(None, 'What the class images show, such as "a photo of a cat".')
    num_class_images: int = _option(100, "Class images wanted.")
    prior_loss_weight: float = _option(1.0, "Weight of the class's loss.")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = _option(
        None, "Of the generation of class images. Default: fp16 on a GPU, fp32 else."
    )
    prior_teacher: bool = _option(
        False, "With --with_prior_preservation: the base's prediction for --class_prompt, instead of class images."
    )
    sample_batch_size: int = _option(4, "Pictures at a time when class and validation images are drawn.")


@dataclass(kw_only=True)
class MethodOptions:
    method: Literal["nora", "lora"] | None = _option(None, "What is trained. Default: nora (with --use_dora: lora).")
    preset: Literal["default", "paper", "tiny"] | None = _option(
        None, "Ranks and inner init of NoRA: default (8 x 16, 16), paper (64, 32, normal), tiny (8 x 8, 8)."
    )
    rank: int | None = _option(None, "Rank of the update. Default: 16 for NoRA (or the preset's), 4 for LoRA.")
    lora_alpha: int | None = _option(None, "The update is scaled by alpha / rank. Default: by 1.")
    lora_dropout: float = _option(0.0, "Dropout before the adapters.")
    use_dora: bool = _option(False, "LoRA with a trained magnitude (DoRA).")
    outer_rank: int | None = _option(None, "NoRA's outer rank. Default: 8 x rank, or what a layer can hold.")
    outer_init: Literal["awsvd", "svd", "random"] | None = _option(None, "NoRA's frozen factors. Default: awsvd.")
    awsvd_gamma: float | None = _option(None, "Exponent of the activations in AwSVD. Default: 0.5.")
    sigma_side: Literal["B", "A", "both"] | None = _option(None, "Where the singular values go. Default: B.")
    inner_init: Literal["matched", "normal", "zero_uniform"] | None = _option(
        None, "NoRA's trained factors. Default: the preset's, matched."
    )
    inner_std: float | None = _option(None, "Standard deviation of --inner_init normal. Default: 0.01.")
    calibration_passes: int | None = _option(
        None, "UNet forward passes, a batch each, that measure AwSVD's statistics. Default: 32."
    )


@dataclass(kw_only=True)
class TextOptions:
    train_text_encoder: bool = _option(False, "Adapt the attention of both text encoders too.")
    text_encoder_lr: float = _option(5e-6, "Their learning rate.")
    train_text_encoder_frac: float = _option(1.0, "They learn during this share of the steps.")
    train_text_encoder_ti: bool = _option(False, "Learn new tokens for the abstraction (pivotal tuning).")
    token_abstraction: str = _option("[V]", "The word in prompts and captions that the new tokens stand for.")
    num_new_tokens_per_abstraction: int = _option(2, "How many new tokens it becomes.")
    train_text_encoder_ti_frac: float = _option(0.5, "The new tokens learn during this share of the steps.")


@dataclass(kw_only=True)
class LossOptions:
    do_edm_style_training: bool = _option(False, "EDM's noise levels and weights (arXiv 2206.00364).")
    snr_gamma: float | None = _option(None, "Min-SNR weights (arXiv 2303.09556); 5.0 is usual.")
    debiased_estimation: bool = _option(False, "Debiased-estimation weights (arXiv 2310.08442).")
    loss_type: Literal["l2", "huber"] = _option("l2", "Squared error, or pseudo-Huber (arXiv 2403.16728).")
    huber_c: float = _option(0.1, "Where pseudo-Huber turns from square to linear.")
    noise_offset: float = _option(
        0.0, "Noise added to a channel's mean, for darker and lighter pictures; 0.05 is usual."
    )


@dataclass(kw_only=True)
class OptimizerOptions:
    optimizer: str = _option("AdamW", "AdamW, prodigy, or a class of torch.optim.")
    optimizer_args: list[str] | None = _option(None, "key=value arguments of the optimizer, beside those with a flag.")
    use_8bit_adam: bool = _option(False, "AdamW with 8-bit states (bitsandbytes).")
    learning_rate: float = _option(1e-4, "Peak learning rate.")
    scale_lr: bool = _option(False, "Multiply it by batch, accumulation and processes.")
    loraplus_lr_ratio: float | None = _option(None, "B learns this much faster than A (LoRA+, arXiv 2402.12354).")
    lr_scheduler: str = _option("constant", f"One of {', '.join(LR_SCHEDULES)}.")
    lr_warmup_steps: int = _option(0, "Warm-up steps of schedules that have one.")
    lr_num_cycles: int = _option(1, "Hard restarts of cosine_with_restarts.")
    lr_power: float = _option(1.0, "Power of the polynomial schedule.")
    adam_beta1: float = _option(0.9, "AdamW's and Prodigy's beta 1.")
    adam_beta2: float = _option(0.999, "AdamW's and Prodigy's beta 2.")
    adam_weight_decay: float = _option(1e-4, "Weight decay of the UNet's adapter.")
    adam_weight_decay_text_encoder: float = _option(1e-3, "Weight decay of the text encoders' adapters.")
    adam_epsilon: float = _option(1e-8, "AdamW's and Prodigy's epsilon.")
    prodigy_beta3: float | None = _option(None, "Prodigy's beta 3. Default: the square root of beta 2.")
    prodigy_decouple: bool = _option(True, "Prodigy decays weights as AdamW does.")
    prodigy_use_bias_correction: bool = _option(True, "Prodigy corrects Adam's bias.")
    prodigy_safeguard_warmup: bool = _option(True, "Prodigy leaves warm-up out of its estimate.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    ema_decay: float | None = _option(None, "Save an exponential moving average of the adapter, such as 0.99.")


@dataclass(kw_only=True)
class LoopOptions:
    seed: int = _option(0, "Every random draw is a function of it.")
    max_train_steps: int | None = _option(None, f"Optimiser steps. Default: {PAPER_STEPS}, or what the epochs give.")
    num_train_epochs: int | None = _option(None, "Times that every picture is seen, where no steps are given.")
    train_batch_size: int = _option(4, "Pictures per step and process.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimiser step.")
    checkpointing_steps: int = _option(500, "Save the state of the run every so many steps.")
    checkpoints_total_limit: int | None = _option(None, "Keep so many of these; the oldest go first.")
    resume_from_checkpoint: str | None = _option(
        None, 'Go on from "latest", or from a checkpoint folder; those of later steps go once the run saves its own.'
    )


@dataclass(kw_only=True)
class HardwareOptions:
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = _option(
        None, "Of the frozen base; what is trained stays fp32. Default: accelerate's configuration, or fp16 on a GPU."
    )
    gradient_checkpointing: bool = _option(False, "Trade time for memory.")
    quantize_base: Literal["none", "int8"] | None = _option(None, "Keep the frozen base in 8 bits (torchao).")
    low_vram: bool = _option(False, "Sets " + ", ".join(f"--{name} {value}" for name, value in LOW_VRAM.items()) + ".")
    allow_tf32: bool = _option(False, "Matrix products in TF32 on Ampere GPUs and later.")
    enable_xformers_memory_efficient_attention: bool = _option(False, "xformers' attention (CUDA only).")
    local_rank: int = _option(-1, "Set by old launchers; the environment's LOCAL_RANK counts.")


@dataclass(kw_only=True)
class WatchOptions:
    validation_prompt: list[str] | None = _option(None, "Prompts for sample images. Default: the instance prompt.")
    num_validation_images: int = _option(4, "Sample images per prompt; 0 draws none.")
    validation_epochs: int = _option(50, "With --validation_prompt, draw them every so many epochs, and at the end.")
    validation_steps: int | None = _option(None, "Draw them every so many steps instead.")
    num_inference_steps: int = _option(50, "Denoising steps per sample image.")
    validation_data_dir: str | None = _option(
        None, "Folder of held-out pictures for --validation_loss_steps. Default: the instance pictures."
    )
    validation_loss_steps: int | None = _option(
        None, "Measure the loss on fixed timesteps and noise every so many steps."
    )
    eval_steps: int | None = _option(
        None,
        "Draw and score the subject every so many steps (DINO, CLIP-I, CLIP-T), and keep the best adapter in best/.",
    )
    best_by: Literal["dino", "clip_i", "clip_t", "val_loss"] = _option(
        "dino",
        "The best adapter's highest score, or lowest loss; one that draws its training images is never the best.",
    )
    early_stopping_patience: int | None = _option(None, "Stop after so many evaluations without a better one.")
    eval_protocol: str = _option("scenes", "Prompts that are scored: as --protocol of judging.evaluate.")
    num_eval_images: int = _option(2, "Scored images per prompt.")
    clip: str | None = _option(None, "A CLIP of transformers: folder or Hub id. Default: that of judging.evaluate.")
    dino: str | None = _option(None, "An image encoder likewise. Default: that of judging.evaluate.")
    report_to: str = _option("tensorboard", "Trackers of accelerate, such as tensorboard, wandb, all or none.")
    logging_dir: str = _option("logs", "Folder of the logs, inside --output_dir.")


@dataclass(kw_only=True)
class OutputOptions:
    output_dir: str = _option("lora-dreambooth-model", "Folder for the adapter, its record and its samples.")
    output_kohya_format: bool = _option(False, "Also write the adapter with kohya's, A1111's and ComfyUI's key names.")
    output_peft_format: bool = _option(False, "Also write a PEFT folder for each trained component.")
    push_to_hub: bool = _option(False, "Upload the adapter and its card, never the checkpoints.")
    hub_token: str | None = _option(None, "Token for that; better: hf auth login.")
    hub_model_id: str | None = _option(None, "Repository for that. Default: the output folder's name.")


@dataclass(kw_only=True)
class TrainConfig(
    OutputOptions,
    WatchOptions,
    HardwareOptions,
    LoopOptions,
    OptimizerOptions,
    LossOptions,
    TextOptions,
    MethodOptions,
    PriorOptions,
    DataOptions,
    BaseOptions,
):
    """Flags of ``train_dreambooth_nora_sdxl.py``; the defaults are the paper's subject-driven run.

    `resolved` fills in what depends on other flags; `check` refuses what can't be trained.
    """

    @property
    def trains_text(self) -> bool:
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def uses_prodigy(self) -> bool:
        return self.optimizer.lower() == "prodigy"

    def optimizer_takes(self, argument: str, kind: type) -> bool:
        """Whether ``--optimizer`` has an argument of that kind; one that is not of torch.optim has Adam's."""
        classes = {name.lower(): found for name, found in vars(torch.optim).items() if isinstance(found, type)}
        found = classes.get(self.optimizer.lower(), torch.optim.Adam)
        parameter = inspect.signature(found).parameters.get(argument)
        return parameter is not None and isinstance(parameter.default, kind)

    def download_options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` for the base."""
        names = ("revision", "variant", "cache_dir")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def sampling_steps(self, epoch_steps: int) -> int:
        """Sample images are drawn every so many steps; 0 where they come at the end only."""
        if self.validation_steps is not None:
            return self.validation_steps
        return self.validation_epochs * epoch_steps if self.validation_prompt else 0

    def total_steps(self, epoch_steps: int) -> int:
        """Optimiser steps of the run.

        Raises:
            ValueError: if the epochs have too many.
        """
        if self.max_train_steps is None and self.num_train_epochs * epoch_steps > MOST:
            raise ValueError(
                f"--num_train_epochs {self.num_train_epochs} of {epoch_steps} steps each are more than {MOST} steps: "
                "lower it"
            )
        return self.max_train_steps or self.num_train_epochs * epoch_steps

    @property
    def text_steps(self) -> int:
        """The first so many steps teach the text encoders; max_train_steps is known.

        Raises:
            ValueError: if they would get none.
        """
        flag, fraction = "train_text_encoder_frac", self.train_text_encoder_frac
        if self.train_text_encoder_ti:
            flag, fraction = "train_text_encoder_ti_frac", self.train_text_encoder_ti_frac
        steps = round(self.max_train_steps * fraction)
        if self.trains_text and steps == 0:
            raise ValueError(
                f"--{flag} {fraction} of {self.max_train_steps} steps leave the text encoders none: raise it"
            )
        return steps

    def resolved(self) -> TrainConfig:
        """A copy with the defaults that depend on other flags filled in.

        Raises:
            ValueError: for a flag of NoRA's with another method, or of LoRA's with NoRA.
        """
        self = replace(self, method=self.method or ("lora" if self.use_dora else "nora"))
        if self.low_vram:
            self = replace(self, **{name: value for name, value in LOW_VRAM.items() if not getattr(self, name)})
        self = replace(self, quantize_base=self.quantize_base or "none")
        if self.max_train_steps is None and self.num_train_epochs is None:
            self = replace(self, max_train_steps=PAPER_STEPS)
        if self.method == "lora":
            for name in NORA_OPTIONS:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} {getattr(self, name)} is an option of NoRA: leave it out with --method lora"
                    )
            return replace(self, rank=LORA_RANK if self.rank is None else self.rank)
        if self.use_dora:
            raise ValueError("--use_dora is an option of LoRA: leave it out with --method nora")
        preset = self.preset or "default"
        wanted = {**NORA_DEFAULTS, **PRESETS[preset]}
        given = {name: getattr(self, name) for name in wanted if getattr(self, name) is not None}
        outer_init, inner_init = ({**wanted, **given}[name] for name in ("outer_init", "inner_init"))
        for name, needed, value in (
            ("awsvd_gamma", "outer_init awsvd", outer_init),
            ("calibration_passes", "outer_init awsvd", outer_init),
            ("inner_std", "inner_init normal", inner_init),
        ):
            if name in given and not needed.endswith(f" {value}"):
                raise ValueError(f"--{name} {given[name]} has no effect with {value}: add --{needed} or leave it out")
        return replace(self, preset=preset, **{**wanted, **given})

    def check(self) -> None:
        """Refuse wrong values and contradictions, before anything is read; say which of diffusers' flags do nothing.

        Raises:
            ValueError: with the value, the limit and the fix.
        """
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"--{name} is empty: it must say something")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} {value} must be a finite number")
        for names, limit, wrong in (
            (POSITIVE, "at least 1", lambda value: value < 1),
            (AT_LEAST_0, "at least 0", lambda value: value < 0),
            (ABOVE_0, "above 0", lambda value: value <= 0),
            (BELOW_1, "at least 0 and below 1", lambda value: not 0 <= value < 1),
            (FRACTIONS, "from 0 to 1", lambda value: not 0 <= value <= 1),
            (("awsvd_gamma",), "from 0 to 4", lambda value: not 0 <= value <= 4),
            (("prior_loss_weight",), "from 0 to 1000", lambda value: not 0 <= value <= 1000),
            (COUNTS, f"at most {MOST}", lambda value: value > MOST),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and wrong(value):
                    raise ValueError(f"--{name} {value} must be {limit}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed {self.seed} must be below 2**32")
        if self.rank is not None and self.outer_rank is not None and self.rank > self.outer_rank:
            raise ValueError(
                f"--rank {self.rank} exceeds --outer_rank {self.outer_rank}: the update lives between the outer "
                "factors, so lower the one or raise the other"
            )
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("--mixed_precision fp16 needs a GPU, and this machine shows none: use bf16 or no")
        self._check_data()
        self._check_prior()
        self._check_loss()
        self._check_optimizer()
        self._check_text()
        self._check_watching()
        self._check_idle()

    def _check_data(self) -> None:
        sources = {name: getattr(self, name) for name in ("instance_data_dir", "dataset_name", "concepts_list")}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(f'--{name}' for name in given) or 'no pictures'}: name exactly one of "
                + ", ".join(f"--{name}" for name in sources)
            )
        if self.concepts_list is None and not (self.instance_prompt or "").strip():
            raise ValueError('--instance_prompt is empty: say what the pictures show, such as "a photo of [V] cat"')
        if self.concepts_list is not None:
            for name in ("instance_prompt", "class_prompt", "class_data_dir"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} belongs into the entries of --concepts_list: leave the flag out")
        if self.mask_data_dir is not None and (self.alpha_mask or self.instance_data_dir is None):
            raise ValueError("--mask_data_dir goes with --instance_data_dir and without --alpha_mask: choose one")
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"--resolution {self.resolution} must be a multiple of 8")

    def _check_prior(self) -> None:
        if not self.with_prior_preservation:
            return
        if self.prior_teacher and self.class_data_dir:
            raise ValueError("--prior_teacher needs no class images: leave --class_data_dir out, or --prior_teacher")
        if self.concepts_list is None:
            for name in ("class_prompt",) if self.prior_teacher else ("class_data_dir", "class_prompt"):
                if not (getattr(self, name) or "").strip():
                    raise ValueError(f"--with_prior_preservation needs --{name}")

    def _check_loss(self) -> None:
        if self.snr_gamma is not None and self.debiased_estimation:
            raise ValueError("--snr_gamma and --debiased_estimation weight the same loss: choose one")
        if self.do_edm_style_training and (self.snr_gamma is not None or self.debiased_estimation):
            raise ValueError("--do_edm_style_training has weights of its own: leave the other ones out")

    def _check_optimizer(self) -> None:
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"--learning_rate {self.learning_rate} must be above {POLYNOMIAL_END}, where --lr_scheduler polynomial "
                "ends"
            )
        if self.lr_scheduler not in LR_SCHEDULES:
            raise ValueError(f"--lr_scheduler {self.lr_scheduler} is not known: choose {', '.join(LR_SCHEDULES)}")
        if self.uses_prodigy and self.loraplus_lr_ratio is not None:
            raise ValueError("--loraplus_lr_ratio needs learning rates of its own, and --optimizer prodigy has one")
        if self.use_8bit_adam and self.optimizer.lower() != "adamw":
            raise ValueError(f"--use_8bit_adam is AdamW's, not --optimizer {self.optimizer}'s: leave one out")

    def _check_text(self) -> None:
        if self.train_text_encoder and self.train_text_encoder_ti:
            raise ValueError(
                "--train_text_encoder and --train_text_encoder_ti both teach the text encoders: choose one"
            )
        if self.use_dora and self.train_text_encoder:
            raise ValueError(
                "--use_dora with --train_text_encoder makes a file that diffusers reads without the text encoders' "
                "magnitudes: leave one out"
            )
        if self.use_dora and self.output_kohya_format:
            raise ValueError("--use_dora has no kohya names in diffusers: leave --output_kohya_format out")

    def _check_watching(self) -> None:
        if self.validation_prompt is not None and not all(prompt.strip() for prompt in self.validation_prompt):
            raise ValueError("--validation_prompt has an empty prompt: it must say something")
        for prompt in self.validation_prompt or ():
            if self.validation_prompt.count(prompt) > 1:
                raise ValueError(f"--validation_prompt has {prompt!r} twice: once is enough")
        if self.num_validation_images == 0 and (self.validation_prompt or self.validation_steps):
            raise ValueError("--num_validation_images 0 draws nothing: leave --validation_prompt and _steps out")
        if self.eval_steps is not None and self.concepts_list:
            raise ValueError("--eval_steps scores one subject: leave it out with --concepts_list")
        folder = Path(self.output_dir).resolve()
        if self.push_to_hub:
            try:
                validate_repo_id(self.hub_model_id or folder.name)
            except HFValidationError as error:
                raise ValueError(f"--push_to_hub needs another --hub_model_id: {error}") from error
        if not Path(os.path.normpath(folder / self.logging_dir)).is_relative_to(folder):
            raise ValueError(f"--logging_dir {self.logging_dir} must be inside --output_dir: name a folder there")

    def _check_idle(self) -> None:
        for name, where in self._idle(IDLE):
            raise ValueError(f"--{name} has no effect {where}: leave it out, or change that")
        for name, where in self._idle(IDLE_AS_IN_DIFFUSERS):
            if is_first_process():
                print(f"warning: --{name} has no effect {where}", file=sys.stderr)

    def _idle(self, table: Idle) -> list[tuple[str, str]]:
        """(name, where) of a table's flags that were given and do nothing."""
        defaults = {f.name: f.default for f in fields(self)}
        idle = [(name, where) for names, works, where in table if not works(self) for name in names]
        return [(name, where) for name, where in idle if getattr(self, name) != defaults[name]]
