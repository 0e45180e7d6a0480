"""What is trained on: pictures and captions of the subject, and maybe of its class."""

from __future__ import annotations

from typing import Annotated, Literal

from settings.record import BelowOne, Count, FilePath, Record, Steps, option, within

INTERPOLATION_MODES = ("lanczos", "bilinear", "bicubic", "box", "nearest", "hamming")


class DataOptions(Record):
    """Pictures"""

    instance_data_dir: FilePath | None = option(None, "Folder with the pictures, and maybe captions, of the subject.")
    instance_prompt: str | None = option(None, 'What a picture without a caption shows, such as "a photo of [V] cat".')
    dataset_name: FilePath | None = option(
        None, "A Hugging Face dataset, on the Hub or in a folder, instead of a folder."
    )
    dataset_config_name: str | None = option(None, "Configuration of that dataset.")
    image_column: str = option("image", "The dataset's column of pictures.")
    caption_column: str | None = option(None, "Column of captions, of the dataset or of the folder's metadata.jsonl.")
    concepts_list: FilePath | None = option(
        None, "JSON or YAML list of subjects, each with instance_data_dir and instance_prompt, maybe the class's."
    )
    repeats: Steps = option(1, "How often a picture counts in an epoch.")
    mask_data_dir: FilePath | None = option(
        None, "Folder of masks named like the pictures; the loss counts where white."
    )
    alpha_mask: bool = option(False, "The loss counts where a picture is opaque.")
    resolution: Count | None = option(None, "Side of the square trained on, pixels. Default: the base's own (1024).")
    aspect_ratio_buckets: str | None = option(
        None, 'Shapes trained on: "sdxl", or height,width pairs such as "1024,1024;832,1216". Default: a square.'
    )
    center_crop: bool = option(False, "Cut the middle out, not a random place.")
    random_flip: bool = option(False, "Mirror every picture half of the time.")
    cache_variants: Count | None = option(
        None, "Crops and mirror images encoded of each picture. Default: 4 where they can differ."
    )
    image_interpolation_mode: Literal[INTERPOLATION_MODES] = option("lanczos", "How pictures are resized.")  # type: ignore[valid-type]
    caption_dropout: BelowOne = option(0.0, "Share of the samples trained without their prompt.")
    encoded_cache_dir: FilePath | None = option(
        None, "Where encoded pictures and prompts are kept for other runs. Default: inside --output_dir."
    )
    dataloader_num_workers: Annotated[int, within(least=0)] = option(
        0, "Processes that read pictures while others are encoded."
    )
    dry_run: bool = option(False, "Refuse what the run would, say what would be trained on, and stop.")

    @property
    def varies(self) -> bool:
        """Whether a picture's crops can differ."""
        return self.random_flip or not self.center_crop


class PriorOptions(Record):
    """Prior preservation"""

    with_prior_preservation: bool = option(False, "Train on the class too, so that it is not forgotten.")
    class_data_dir: FilePath | None = option(
        None, "Folder for class images; what is missing is drawn. Needed unless --prior_teacher."
    )
    class_prompt: str | None = option(None, 'What the class images show, such as "a photo of a cat".')
    num_class_images: Count = option(100, "Class images wanted.")
    prior_loss_weight: Annotated[float, within(least=0, most=1000)] = option(1.0, "Weight of the class's loss.")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = option(
        None, "Of the generation of class images. Default: fp16 on a GPU, fp32 else."
    )
    prior_teacher: bool = option(
        False, "With --with_prior_preservation: the base's prediction for --class_prompt, instead of class images."
    )
    sample_batch_size: Count = option(4, "Pictures at a time when class and validation images are drawn.")

    @property
    def draws_class_images(self) -> bool:
        return self.with_prior_preservation and not self.prior_teacher
