"""A v-prediction base out of one that predicts noise, as one file: its UNet learns velocity on pictures that it draws.

    python -m tools.velocity_base assets/tiny-sdxl out/velocity.safetensors --steps 400

For tests and trials, not for pictures: a base in use is trained so for days.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from tqdm import tqdm

from dreambooth.draws import Batch
from dreambooth.loss import Objective
from inference.base import load_pipeline
from inference.prediction import settle_scheduler
from inference.sampling import encode_prompts, generate_images
from settings.command_line import run_command
from tools.single_file import check_folder, write_single_file

PROMPTS = [
    f"a photo of a {thing} {place}"
    for thing in ("cat", "dog", "robot", "teapot", "red car", "bird", "house", "fruit")
    for place in ("in the jungle", "on a white background", "at night", "in the snow")
]
BATCH = 16


def teach_velocity(
    folder: str | Path, file: Path, *, steps: int, seeds: int, learning_rate: float = 1e-3, keys: bool = True
) -> list[float]:
    """Train all of the UNet on velocity with zero terminal SNR, and write the base; returns each step's loss.

    Args:
        seeds: the base draws so many pictures of its own of each of PROMPTS.
        keys: the file says by its keys what it predicts.
    """
    check_folder(folder)
    pipeline = load_pipeline(folder, torch.float32, "cpu")
    latents, embeds = drawn_latents(pipeline, PROMPTS, seeds)
    objective = Objective(settle_scheduler(pipeline.scheduler, folder, "v_prediction", "on"))
    unet = pipeline.unet.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=learning_rate, weight_decay=0)
    generator, losses = torch.Generator().manual_seed(0), []
    side = float(unet.config.sample_size * pipeline.vae_scale_factor)
    for step in tqdm(range(steps), desc="velocity"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20, 5 * (steps - step) / steps)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        batch = Batch(
            latents[rows],
            torch.randn(latents[rows].shape, generator=generator),
            torch.randint(objective.num_train_timesteps, (BATCH,), generator=generator),
            torch.tensor([[side, side, 0, 0, side, side]]).expand(BATCH, -1),
            rows,
            torch.ones(BATCH, 1, *latents.shape[-2:]),
            torch.ones(BATCH),
            torch.zeros(BATCH, dtype=torch.bool),
        )
        noisy, timesteps = objective.model_input(batch)
        nothing = torch.rand(BATCH, generator=generator) < 0.1  # for guidance
        embedded, pooled = (torch.where(nothing.reshape(-1, *[1] * (e.dim() - 1)), 0.0, e[rows]) for e in embeds)
        added = {"text_embeds": pooled, "time_ids": batch.time_ids}
        loss = objective.loss(unet(noisy, timesteps, embedded, added_cond_kwargs=added).sample, batch, BATCH)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        unet.save_pretrained(Path(copy) / "unet")
        write_single_file(Path(copy), file, v_pred=keys, ztsnr=keys)
    return losses


@torch.no_grad()
def drawn_latents(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], seeds: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents (P, 4, h, w) that a base draws, and what it reads of their prompts: (P, tokens, d) and (P, d2)."""
    encoded = encode_prompts(pipeline, prompts)
    options = {"num_inference_steps": 10, "batch_size": BATCH, "output_type": "latent"}
    drawn = list(generate_images(pipeline, prompts, range(seeds), **options))
    names = ("prompt_embeds", "pooled_prompt_embeds")
    embeds = [torch.cat([encoded[one.prompt][name] for one in drawn]) for name in names]
    return torch.stack([one.image for one in drawn]), embeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--no_keys", action="store_true", help="leave out the keys v_pred and ztsnr")
    args = parser.parse_args()
    losses = teach_velocity(args.folder, args.file, steps=args.steps, seeds=args.seeds, keys=not args.no_keys)
    first, last = (sum(some) / len(some) for some in (losses[:10], losses[-10:]))
    print(f"{args.file}: loss {first:.3f} in the first ten steps, {last:.3f} in the last ten")


if __name__ == "__main__":
    run_command(main)
