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

from dreambooth.config import TrainConfig
from dreambooth.data import find_images, open_image
from dreambooth.draws import INSTANCE, training_batch
from dreambooth.encode import encode_images, encode_prompts, tokenize
from dreambooth.loss import denoising_loss, training_scheduler, training_target
from inference.cli import quiet_libraries
from inference.load import load_adapter, load_pipeline, unload_adapters
from train_dreambooth_nora_sdxl import train

SUBJECTS = Path(__file__).parent.parent / "assets" / "subjects"


@torch.no_grad()
def heldout_loss(pipeline: StableDiffusionXLPipeline, folder: Path, prompt: str, samples: int = 256) -> float:
    """Mean squared error of the noise (or velocity) prediction over ``samples`` draws from the folder's pictures."""
    resolution = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    images = encode_images(
        pipeline.vae, [open_image(path) for path in find_images(folder, "subject")], resolution, False
    )
    tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], [prompt])
    prompts = encode_prompts([pipeline.text_encoder, pipeline.text_encoder_2], tokens)
    scheduler, total, size = training_scheduler(pipeline.scheduler), 0.0, 32
    pipeline.unet.eval()
    for first in range(0, samples, size):
        batch = training_batch(
            {INSTANCE: images},
            pipeline.device,
            seed=12345,
            step=0,
            slots=range(first, first + size),
            slots_per_step=samples,
            num_train_timesteps=scheduler.config.num_train_timesteps,
        )
        conditioning = prompts.each(size)
        prediction = pipeline.unet(
            scheduler.add_noise(batch.latents, batch.noise, batch.timesteps).to(pipeline.unet.dtype),
            batch.timesteps,
            conditioning.prompt_embeds,
            added_cond_kwargs={"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": batch.time_ids},
        ).sample
        total += denoising_loss(prediction, training_target(scheduler, batch), None).item() * size
    return total / samples


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="assets/tiny-sdxl")
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
    for method in ("lora", "nora"):
        ratios = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                options = {"method": method, "seed": seed, "max_train_steps": args.steps, "num_validation_images": 0}
                train(
                    TrainConfig(
                        args.base,
                        str(SUBJECTS / args.subject),
                        prompt,
                        folder,
                        learning_rate=args.learning_rate,
                        report_to="none",
                        **options,
                    )
                )
                load_adapter(pipeline, folder)
                ratios.append(heldout_loss(pipeline, heldout, prompt) / base)
                unload_adapters(pipeline)
        print(f"| {method} | " + " | ".join(f"{r:.3f}" for r in ratios) + f" | {np.mean(ratios):.3f} |", flush=True)


if __name__ == "__main__":
    main()
