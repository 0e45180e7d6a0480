"""SDXL's own architecture with random weights, to measure time and memory without downloading anything.

    python -m benchmarks.sdxl_shape full out/sdxl-shape      # 3.5 billion parameters, 7 GB
    python -m benchmarks.sdxl_shape quarter out/quarter      # every width a quarter, for 512 × 512 pixels

The folder is a base like any other: for the trainer, for inference, and for --base of the benchmarks.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from inference.base import check_base
from settings.command_line import run_command
from storage.text import home_path

ASSETS = Path(__file__).parent.parent / "assets"
# What each name divides SDXL's widths by. Heads stay as many as they are, so the parts keep about their shares in the
# work (multiply-adds grow with the square of the width in all); the tokenizer is the embedded base's.
SHAPES = {"full": 1, "quarter": 4, "sixteenth": 16}
BASE_HELP = f"a folder, a Hub id, or {' or '.join(SHAPES)}: SDXL's architecture with random weights"


def build_unet(name: str) -> UNet2DConditionModel:
    """SDXL's UNet with random weights, in torch's default dtype and on its default device."""
    part = SHAPES[name]
    return UNet2DConditionModel(
        sample_size=pixels(name) // 8,
        block_out_channels=(320 // part, 640 // part, 1280 // part),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048 // part,
        norm_num_groups=math.gcd(320 // part, 32),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 // part,
        projection_class_embeddings_input_dim=(6 * 256 + 1280) // part,
    )


def pixels(name: str) -> int:
    """A side of the pictures that a shape is for."""
    return 1024 if name == "full" else 512


def build_sdxl_shape(name: str) -> StableDiffusionXLPipeline:
    """SDXL with random weights, in bf16: half of the memory and of the file."""
    part = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-sdxl" / "tokenizer", model_max_length=77)
    words = {f"{word}_token_id": getattr(tokenizer, f"{word}_token_id") for word in ("bos", "eos", "pad")}

    def text_config(width: int, layers: int, heads: int) -> CLIPTextConfig:
        width //= part
        return CLIPTextConfig(
            vocab_size=49408 // part,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            **words,
        )

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = build_unet(name)
        vae = AutoencoderKL(
            block_out_channels=(128 // part, 256 // part, 512 // part, 512 // part),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            norm_num_groups=math.gcd(128 // part, 32),
            sample_size=pixels(name),
            scaling_factor=0.13025,
        )
        text_encoder = CLIPTextModel(text_config(768, 12, 12))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(1280, 32, 20))
    finally:
        torch.set_default_dtype(default)
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )


@contextmanager
def base_folder(base: str) -> Iterator[str]:
    """The base itself, or a temporary one where it is the name of a shape.

    Raises:
        ValueError: if it is neither.
    """
    if base not in SHAPES:
        check_base(base)
        yield base
        return
    with TemporaryDirectory() as folder:
        build_sdxl_shape(base).save_pretrained(folder)
        yield folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=home_path)
    args = parser.parse_args(argv)
    build_sdxl_shape(args.shape).save_pretrained(args.folder)


if __name__ == "__main__":
    run_command(main)
