"""Does an adapter know the subject? Its denoising loss on pictures of the subject that it was not trained on.

    python -m benchmarks.heldout_loss --base assets/tiny-sdxl --subject cat --steps 300 --seeds 0 1 2

Trains NoRA and LoRA with each seed and prints, beside the base's, the loss on the held-out pictures over the same
timesteps and noise. The base is the yardstick: figures are ratios to it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from dreambooth.data import folder_examples
from dreambooth.encode import (
    CropSettings,
    EncodedPicture,
    EncodedPrompts,
    cut_picture,
    encode_pictures,
    encode_prompts,
    inspect_picture,
    tokenize,
)
from dreambooth.encoded_cache import EncodedCache
from dreambooth.loss import Objective
from dreambooth.validation import validation_loss
from inference.base import load_pipeline
from inference.load import load_adapter, unload_adapters
from judging.statistics import differences
from runs.interval import describe_difference
from settings.command_line import quiet_libraries
from settings.training import TrainConfig
from storage.text import expand_home
from train_dreambooth_nora_sdxl import train

BATCH = 32
SUBJECTS = Path(__file__).parent.parent / "assets" / "subjects"


@torch.no_grad()
def encode_folder(
    pipeline: StableDiffusionXLPipeline, folder: Path, prompt: str
) -> tuple[list[EncodedPicture], EncodedPrompts]:
    """The folder's pictures, whole, and their captions, or the prompt where there is none beside a picture."""
    resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    settings = CropSettings([(resolution, resolution)], center_crop=True, variants=1)
    examples = folder_examples(folder, prompt, flag="subject")
    cuts = [cut_picture(inspect_picture(example), settings) for example in examples]
    captions = list(dict.fromkeys(example.prompt for example in examples))
    numbers = [captions.index(example.prompt) for example in examples]
    with tempfile.TemporaryDirectory() as cache:
        pictures = encode_pictures(pipeline.vae, "", cuts, numbers, settings, EncodedCache(cache))
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], captions)
    prompts = encode_prompts([pipeline.text_encoder, pipeline.text_encoder_2], tokens)
    return pictures, prompts


def heldout_loss(pipeline: StableDiffusionXLPipeline, folder: Path, prompt: str, samples: int = 256) -> float:
    """Mean squared error of the noise (or velocity) prediction over ``samples`` draws from the folder's pictures."""
    pictures, prompts = encode_folder(pipeline, folder, prompt)
    return validation_loss(pipeline.unet, pictures, prompts, Objective(pipeline.scheduler), BATCH, samples)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default="assets/tiny-sdxl")
    parser.add_argument("--subject", default="cat", help="a folder of assets/subjects")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    quiet_libraries()
    prompt, heldout = f"a photo of [V] {args.subject}", SUBJECTS / "heldout" / args.subject
    pipeline = load_pipeline(args.base, torch.float32)
    base = heldout_loss(pipeline, heldout, prompt)
    print(f"base: {base:.4f}")
    print("| method | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean, ratio to the base |")
    print("|---" * (len(args.seeds) + 2) + "|")
    measured: dict[str, dict[int, float]] = {}
    for method in ("lora", "nora"):
        ratios = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                options = {"method": method, "seed": seed, "max_train_steps": args.steps, "num_validation_images": 0}
                train(
                    TrainConfig.of(
                        pretrained_model_name_or_path=args.base,
                        instance_data_dir=str(SUBJECTS / args.subject),
                        instance_prompt=prompt,
                        output_dir=folder,
                        learning_rate=args.learning_rate,
                        report_to="none",
                        **options,
                    )
                )
                load_adapter(pipeline, folder)
                ratios.append(heldout_loss(pipeline, heldout, prompt) / base)
                unload_adapters(pipeline)
        print(f"| {method} | " + " | ".join(f"{r:.3f}" for r in ratios) + f" | {np.mean(ratios):.3f} |", flush=True)
        measured[method] = dict(zip(args.seeds, ratios))
    draws = {method: {seed: {prompt: {0: one}} for seed, one in own.items()} for method, own in measured.items()}
    for difference in differences(draws["lora"], {"nora": draws["nora"]}).values():
        print(describe_difference("nora", "lora", "the loss on held-out pictures", difference))


if __name__ == "__main__":
    main()
