"""The command line of the trainer, as one typed and checked record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from diffusers.optimization import SchedulerType

# (outer rank, rank, inner init) of method.md's presets; an outer rank of None is 8 x rank, or what a layer can hold.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"rank": 16, "outer_rank": None, "inner_init": "matched"},
    "paper": {"rank": 32, "outer_rank": 64, "inner_init": "normal"},
    "tiny": {"rank": 8, "outer_rank": None, "inner_init": "matched"},
}
LORA_RANK = 4
NORA_DEFAULTS = {
    "outer_init": "awsvd",
    "awsvd_gamma": 0.5,
    "sigma_side": "B",
    "inner_std": 0.01,
    "calibration_passes": 32,
}
NORA_OPTIONS = ("preset", "outer_rank", "inner_init", *NORA_DEFAULTS)
PRIOR_DEFAULTS = {"num_class_images": 100, "prior_loss_weight": 1.0}
PRIOR_OPTIONS = ("class_data_dir", "class_prompt", *PRIOR_DEFAULTS)
POSITIVE = (
    "rank",
    "outer_rank",
    "resolution",
    "num_class_images",
    "sample_batch_size",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "calibration_passes",
    "validation_steps",
    "num_inference_steps",
)
# piecewise_constant needs rules that no flag gives.
LR_SCHEDULES = [schedule.value for schedule in SchedulerType if schedule is not SchedulerType.PIECEWISE_CONSTANT]
WHICH_BASE = "SDXL: a diffusers folder, a Hub id or a .safetensors file."


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Flags of ``train_dreambooth_nora_sdxl.py``; the defaults are the paper's subject-driven run.

    `resolved` fills in what depends on other flags; `check` refuses what can't be trained.
    """

    pretrained_model_name_or_path: str = field(metadata={"help": WHICH_BASE})
    instance_data_dir: str = field(metadata={"help": "Folder with the pictures of the subject."})
    instance_prompt: str = field(metadata={"help": 'What they show, such as "a photo of [V] cat".'})
    output_dir: str = _option("lora-dreambooth-model", "Folder for the adapter, its record and its samples.")
    seed: int = _option(0, "Every random draw is a function of it.")

    method: Literal["nora", "lora"] = _option("nora", "What is trained.")
    preset: Literal["default", "paper", "tiny"] | None = _option(
        None, "Ranks and inner init of NoRA: default (8 x 16, 16), paper (64, 32, normal), tiny (8 x 8, 8)."
    )
    rank: int | None = _option(None, "Rank of the update. Default: 16 for NoRA (or the preset's), 4 for LoRA.")
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
    train_text_encoder: bool = _option(False, "Adapt the attention of both text encoders too.")

    resolution: int | None = _option(None, "Side of the square that is trained on, pixels. Default: the base's own.")
    random_flip: bool = _option(False, "Mirror every picture half of the time.")
    with_prior_preservation: bool = _option(False, "Train on class images too, so that the class is not forgotten.")
    class_data_dir: str | None = _option(None, "Folder with class images; what is missing is generated.")
    class_prompt: str | None = _option(None, 'What the class images show, such as "a photo of a cat".')
    num_class_images: int | None = _option(None, "Class images wanted. Default: 100.")
    prior_loss_weight: float | None = _option(None, "Weight of the class images' loss. Default: 1.")
    sample_batch_size: int = _option(4, "Pictures at a time when class and validation images are drawn.")

    max_train_steps: int = _option(500, "Optimiser steps.")
    train_batch_size: int = _option(4, "Pictures per step and process.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimiser step.")
    learning_rate: float = _option(1e-4, "Peak learning rate.")
    lr_scheduler: str = _option("constant", f"One of {', '.join(LR_SCHEDULES)}.")
    lr_warmup_steps: int = _option(0, "Warm-up steps of schedules that have one.")
    adam_beta1: float = _option(0.9, "AdamW's beta 1.")
    adam_beta2: float = _option(0.999, "AdamW's beta 2.")
    adam_weight_decay: float = _option(1e-4, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.")
    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = _option(
        None, "Of the frozen base; what is trained stays fp32. Default: accelerate's configuration, or fp16 on a GPU."
    )
    gradient_checkpointing: bool = _option(False, "Trade time for memory.")
    enable_xformers_memory_efficient_attention: bool = _option(False, "xformers' attention (CUDA only).")

    validation_prompt: list[str] | None = _option(None, "Prompts for sample images. Default: the instance prompt.")
    num_validation_images: int = _option(4, "Sample images per prompt; 0 draws none.")
    validation_steps: int | None = _option(None, "Draw them every so many steps too. Default: only at the end.")
    num_inference_steps: int = _option(50, "Denoising steps per sample image.")
    report_to: Literal["tensorboard", "none"] = _option("tensorboard", "Where losses and samples are logged.")
    logging_dir: str = _option("logs", "Folder of the logs, inside --output_dir.")

    def resolved(self) -> TrainConfig:
        """A copy with the defaults that depend on method and preset filled in.

        Raises:
            ValueError: for a flag of NoRA's with another method.
        """
        if self.with_prior_preservation:
            given = {name: getattr(self, name) for name in PRIOR_DEFAULTS if getattr(self, name) is not None}
            self = replace(self, **{**PRIOR_DEFAULTS, **given})
        if self.method == "lora":
            for name in NORA_OPTIONS:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} {getattr(self, name)} is an option of NoRA: leave it out with --method lora"
                    )
            return replace(self, rank=LORA_RANK if self.rank is None else self.rank)
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
        """Refuse wrong values and contradictions, before anything is read.

        Raises:
            ValueError: with the value, the limit and the fix.
        """
        for name in ("pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{name} is empty: it must say something")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        for name in ("num_validation_images", "lr_warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0")
        if self.seed >= 2**32:
            raise ValueError(f"--seed {self.seed} must be below 2**32")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} {value} must be a finite number")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")
        for name in ("prior_loss_weight", "adam_weight_decay"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.lr_scheduler not in LR_SCHEDULES:
            raise ValueError(f"--lr_scheduler {self.lr_scheduler} is not known: choose {', '.join(LR_SCHEDULES)}")
        if self.rank is not None and self.outer_rank is not None and self.rank > self.outer_rank:
            raise ValueError(
                f"--rank {self.rank} exceeds --outer_rank {self.outer_rank}: the update lives between the outer "
                "factors, so lower the one or raise the other"
            )
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"--resolution {self.resolution} must be a multiple of 8")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("--mixed_precision fp16 needs a GPU, and this machine shows none: use bf16 or no")
        if self.validation_prompt is not None and not all(prompt.strip() for prompt in self.validation_prompt):
            raise ValueError("--validation_prompt has an empty prompt: it must say something")
        for prompt in self.sample_prompts:
            if self.sample_prompts.count(prompt) > 1:
                raise ValueError(f"--validation_prompt has {prompt!r} twice: once is enough")
        if self.num_validation_images == 0 and (self.validation_prompt or self.validation_steps):
            raise ValueError("--num_validation_images 0 draws nothing: leave --validation_prompt and _steps out")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} has no effect with --lr_scheduler constant: use "
                "constant_with_warmup"
            )
        self._check_prior()

    def _check_prior(self) -> None:
        if self.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if not (getattr(self, name) or "").strip():
                    raise ValueError(f"--with_prior_preservation needs --{name}")
            return
        for name in PRIOR_OPTIONS:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} has no effect alone: add --with_prior_preservation or leave it out")

    @property
    def sample_prompts(self) -> list[str]:
        return self.validation_prompt or [self.instance_prompt]
