"""What a run shows while it trains, and what it leaves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from settings.record import AtLeast0, Count, FilePath, Record, option


class ValidationOptions(Record):
    """Samples and validation loss"""

    validation_prompt: list[str] | None = option(None, "Prompts for sample images. Default: the instance prompt.")
    num_validation_images: AtLeast0 = option(4, "Sample images per prompt; 0 draws none.")
    validation_epochs: Count = option(50, "With --validation_prompt, draw them every so many epochs, and at the end.")
    validation_steps: Count | None = option(None, "Draw them every so many steps instead.")
    num_inference_steps: Count = option(50, "Denoising steps per sample image.")
    validation_data_dir: FilePath | None = option(
        None, "Folder of held-out pictures for --validation_loss_steps. Default: the instance pictures."
    )
    validation_loss_steps: Count | None = option(
        None, "Measure the loss on fixed timesteps and noise every so many steps."
    )

    def sampling_steps(self, epoch_steps: int) -> int:
        """Sample images are drawn every so many steps; 0 where they come at the end only."""
        if self.validation_steps is not None:
            return self.validation_steps
        return self.validation_epochs * epoch_steps if self.validation_prompt else 0


class EvaluationOptions(Record):
    """Scores while training"""

    eval_steps: Count | None = option(
        None,
        "Draw and score the subject every so many steps (DINO, CLIP-I, CLIP-T), and keep the best adapter in best/.",
    )
    best_by: Literal["dino", "clip_i", "clip_t", "val_loss"] = option(
        "dino",
        "The best adapter's highest score, or lowest loss; one that draws its training images is never the best.",
    )
    early_stopping_patience: Count | None = option(None, "Stop after so many evaluations without a better one.")
    eval_protocol: FilePath = option("scenes", "Prompts that are scored: as --protocol of judging.evaluate.")
    num_eval_images: Count = option(2, "Scored images per prompt.")
    clip: FilePath | None = option(None, "A CLIP of transformers: folder or Hub id. Default: that of judging.evaluate.")
    dino: FilePath | None = option(None, "An image encoder likewise. Default: that of judging.evaluate.")


class OutputOptions(Record):
    """Output"""

    output_dir: FilePath = option("lora-dreambooth-model", "Folder for the adapter, its record and its samples.")
    output_kohya_format: bool | None = option(
        None,
        "The file for ComfyUI, A1111, Forge and kohya's scripts, named as --output_dir is; False leaves it out. "
        "Default: written where the update is a pair of factors.",
    )
    output_kohya_dtype: Literal["fp16", "bf16", "fp32"] = option("fp16", "Of the numbers in that file.")
    license: str | None = option(
        None, "Licence that the file's header and the model card name. Default: SDXL's own, for its base on the Hub."
    )
    output_peft_format: bool = option(
        True, "A PEFT folder for each trained component; False leaves it out where there is a LoRA file."
    )
    convert_to_lora: Count | None = option(
        None, "Where the update is no pair of factors: also write the nearest LoRA of this rank, named approximate."
    )
    report_to: str = option("tensorboard", "Trackers of accelerate, such as tensorboard, wandb, all or none.")
    logging_dir: FilePath = option("logs", "Folder of the logs, inside --output_dir.")
    push_to_hub: bool = option(False, "Upload the adapter and its card, never the checkpoints.")
    hub_token: str | None = Field(default=None, description="Token for that; better: hf auth login.", repr=False)
    hub_model_id: str | None = option(None, "Repository for that. Default: the output folder's name.")

    def writes_tools_file(self, low_rank: bool) -> bool:
        """Whether there is a file for drawing programs.

        Args:
            low_rank: the method's update is a pair of factors.
        """
        return low_rank and self.output_kohya_format is not False
