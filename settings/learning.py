"""How it learns: loss, optimizer, steps, and what the hardware holds."""

from __future__ import annotations

from typing import Annotated, Literal

from settings.record import (
    MOST,
    AtLeast0,
    BelowOne,
    Count,
    FilePath,
    Fraction,
    NotNegative,
    Positive,
    Record,
    Steps,
    option,
    within,
)

PAPER_STEPS = 500
POLYNOMIAL_END = 1e-7  # where diffusers' polynomial schedule ends
# diffusers' schedules; piecewise_constant needs rules that no flag gives. A test compares them with the library.
UNPLANNED = ("constant", "constant_with_warmup")  # schedules whose rates don't depend on how many steps there are
LR_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
LOW_VRAM = "8"  # the --vram that --low_vram stands for
# Pictures of a megapixel from which --compile auto compiles: a minute of warm-up against a seventh of .25 s a picture.
# Taken from what others report of their cards, not measured here.
COMPILE_PAYS = 2000


class LossOptions(Record):
    """Loss"""

    do_edm_style_training: bool = option(False, "EDM's noise levels and weights (arXiv 2206.00364).")
    snr_gamma: Positive | None = option(None, "Min-SNR weights (arXiv 2303.09556); 5.0 is usual.")
    debiased_estimation: bool = option(False, "Debiased-estimation weights (arXiv 2310.08442).")
    loss_type: Literal["l2", "huber"] = option("l2", "Squared error, or pseudo-Huber (arXiv 2403.16728).")
    huber_c: Positive = option(0.1, "Where pseudo-Huber turns from square to linear.")
    noise_offset: Fraction = option(
        0.0, "Noise added to a channel's mean, for darker and lighter pictures; 0.05 is usual."
    )


class OptimizerOptions(Record):
    """Optimizer"""

    optimizer: str = option("AdamW", "AdamW, prodigy, or a class of torch.optim.")
    optimizer_args: list[str] | None = option(None, "key=value arguments of the optimizer, beside those with a flag.")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit states (bitsandbytes).")
    learning_rate: Positive = option(1e-4, "Peak learning rate.")
    scale_lr: bool = option(False, "Multiply it by batch, accumulation and processes.")
    lr_scheduler: str = option("constant", f"One of {', '.join(LR_SCHEDULES)}.")
    lr_warmup_steps: AtLeast0 = option(0, "Warm-up steps of schedules that have one.")
    lr_num_cycles: Count = option(1, "Hard restarts of cosine_with_restarts.")
    lr_power: Positive = option(1.0, "Power of the polynomial schedule.")
    adam_beta1: BelowOne = option(0.9, "AdamW's and Prodigy's beta 1.")
    adam_beta2: BelowOne = option(0.999, "AdamW's and Prodigy's beta 2.")
    adam_weight_decay: NotNegative = option(1e-4, "Weight decay of the UNet's adapter.")
    adam_weight_decay_text_encoder: NotNegative = option(1e-3, "Weight decay of the text encoders' adapters.")
    adam_epsilon: Positive = option(1e-8, "AdamW's and Prodigy's epsilon.")
    prodigy_beta3: BelowOne | None = option(None, "Prodigy's beta 3. Default: the square root of beta 2.")
    prodigy_decouple: bool = option(True, "Prodigy decays weights as AdamW does.")
    prodigy_use_bias_correction: bool = option(True, "Prodigy corrects Adam's bias.")
    prodigy_safeguard_warmup: bool = option(True, "Prodigy leaves warm-up out of its estimate.")
    max_grad_norm: Positive = option(1.0, "Gradients are clipped to this norm.")
    ema_decay: BelowOne | None = option(None, "Save an exponential moving average of the adapter, such as 0.99.")

    @property
    def is_prodigy(self) -> bool:
        return self.optimizer.lower() == "prodigy"


class LoopOptions(Record):
    """Steps"""

    seed: Annotated[int, within(least=0, most=2**32 - 1)] = option(0, "Every random draw is a function of it.")
    max_train_steps: Steps | None = option(None, f"Optimiser steps. Default: {PAPER_STEPS}, or what the epochs give.")
    num_train_epochs: Steps | None = option(None, "Times that every picture is seen, where no steps are given.")
    train_batch_size: Count = option(4, "Pictures per step and process.")
    gradient_accumulation_steps: Count = option(1, "Batches per optimiser step.")
    checkpointing_steps: Count = option(500, "Save the state of the run every so many steps.")
    checkpoints_total_limit: Count | None = option(None, "Keep so many of these; the oldest go first.")
    resume_from_checkpoint: FilePath | None = option(
        None, 'Go on from "latest", or from a checkpoint folder; those of later steps go once the run saves its own.'
    )

    def samples_per_step(self, num_processes: int) -> int:
        """Of an optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def total_steps(self, epoch_steps: int) -> int:
        """Optimiser steps of the run.

        Raises:
            ValueError: if the epochs have too many.
        """
        if self.max_train_steps is not None:
            return self.max_train_steps
        epochs = self.num_train_epochs or 1
        if epochs * epoch_steps > MOST:
            raise ValueError(
                f"--num_train_epochs {epochs} of {epoch_steps} steps each are more than {MOST} steps: lower it"
            )
        return epochs * epoch_steps


class HardwareOptions(Record):
    """Hardware"""

    mixed_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "Of the frozen base; what is trained stays fp32. Default: accelerate's configuration, or fp16 on a GPU."
    )
    gradient_checkpointing: bool = option(False, "Trade time for memory.")
    selective_checkpointing: Literal["none", "activation", "feed_forward"] = option(
        "none",
        "Trade less time for less memory in the UNet's transformer blocks: compute again GEGLU's activation, a fifth "
        "of what they keep, or their feed-forward layers, half of it. Both keep layer norms' inputs in half "
        "precision where the base is.",
    )
    compile: Literal["auto", "on", "off"] = option(
        "off",
        "Compile the repeated blocks (torch.compile), in the first step. auto: on CUDA with a whole and plain base, "
        f"from {COMPILE_PAYS} pictures of 1024 × 1024 in all. Where it fails, the run goes on without.",
    )
    quantize_base: Literal["none", "int8"] | None = option(None, "Keep the frozen base in 8 bits (torchao).")
    vram: Literal["auto", "8", "12", "16", "24"] | None = option(
        None,
        "GB of the card that the run is to fit, or auto for the one that is there: sets the cheapest of "
        "--selective_checkpointing, --gradient_checkpointing and --quantize_base that will do, by what the base's "
        "shapes need. Those that are given stay.",
    )
    low_vram: bool = option(False, f"The same as --vram {LOW_VRAM}.")
    allow_tf32: bool = option(False, "Matrix products in TF32 on Ampere GPUs and later.")
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers' attention (CUDA only).")
    local_rank: int = option(-1, "Set by old launchers; the environment's LOCAL_RANK counts.")
