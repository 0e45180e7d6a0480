"""Sheets to look at: the drawn world, its base in training, and what became of it.

    python tools/world_sheet.py world.png                          # 96 pictures of the world
    python tools/world_sheet.py vae.png --work_dir out/pretrain    # originals above reconstructions, with the PSNR
    python tools/world_sheet.py base.png --work_dir out/pretrain --stage unet    # 12 prompts x 4 seeds
    python tools/world_sheet.py docs/base.png --base assets/tiny-sdxl            # the same of a finished base

Those of a --work_dir read the averaged weights of the newest checkpoint; the training may go on meanwhile.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from pretrain_tiny_sdxl import Reconstruction, TextConditionedUNet, build_vae, to_pixels
from transformers import CLIPTokenizer
from world import sample
from world.pool import DrawnWorld

PROMPTS = (
    "a photo of a cat in the jungle",
    "a photo of a teal cat wearing a scarf",
    "a photo of a dog on the beach",
    "a photo of a robot in the snow",
    "a photo of a teapot on the grass",
    "a photo of a rabbit at night",
    "a photo of a bear wearing a hat in the desert",
    "a photo of a purple fox in the snow",
    "a photo of a bird on a yellow background",
    "a photo of a car in the desert",
    "a photo of a mug on the beach",
    "a photo of a house at night",
)


def sheet(rows) -> Image.Image:
    """Rows of pictures of one size, two pixels apart."""
    side = rows[0][0].width + 2
    image = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            image.paste(picture, (side * x, side * y))
    return image


def averaged(model: torch.nn.Module, directory: Path) -> None:
    """Put the averaged weights of a checkpoint into the model."""
    model.load_state_dict(torch.load(directory / "model.pt", weights_only=True))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = EMAModel(parameters)
    ema.load_state_dict(torch.load(directory / "ema.pt", weights_only=True))
    ema.copy_to(parameters)
    model.eval()


def load_vae(world: DrawnWorld, work_dir: Path):
    vae = build_vae(world.size, world.vae_channels, world.latent_channels)
    averaged(Reconstruction(vae), work_dir / "vae")
    return vae


@torch.no_grad()
def reconstructions(world: DrawnWorld, work_dir: Path, count: int = 32) -> Image.Image:
    """Pictures of another seed and, below each row, what the autoencoder makes of them."""
    vae = load_vae(world, work_dir)
    originals = [sample(777, index).image for index in range(count)]
    pixels = to_pixels(originals)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (decoded - pixels).square().mean(dim=(1, 2, 3)) / 4
    print(f"{-10 * error.log10().mean():.2f} dB on {count} pictures, {(work_dir / 'vae' / 'step').read_text()} steps")
    arrays = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    found = [Image.fromarray(array) for array in np.ascontiguousarray(arrays)]
    return sheet([part[i : i + 8] for i in range(0, count, 8) for part in (originals, found)])


def newest(world: DrawnWorld, work_dir: Path) -> StableDiffusionXLPipeline:
    """The base of the newest checkpoint of the UNet."""
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    vae = load_vae(world, work_dir)
    # the scale that the training reads from its own held-out pictures
    held_out = to_pixels([world.any_picture(1, index) for index in range(64)])
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(held_out).latent_dist.mean.std().item())
    model = TextConditionedUNet(tokenizer, world.latent_channels)
    averaged(model, work_dir / "unet")
    print(f"{(work_dir / 'unet' / 'step').read_text()} steps")
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def samples(pipeline: StableDiffusionXLPipeline, size: int, seeds: int = 4, steps: int = 30) -> Image.Image:
    """A row for each of ``PROMPTS``."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for prompt in PROMPTS:
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        options = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": size, "width": size}
        rows.append(pipeline([prompt] * seeds, generator=generators, **options).images)
    print("rows, two prompts each:", "; ".join(PROMPTS))
    return sheet([one + other for one, other in zip(rows[::2], rows[1::2])]).quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work_dir", type=Path, help="of tools/pretrain_tiny_sdxl.py")
    parser.add_argument("--stage", choices=["vae", "unet"], default="vae")
    parser.add_argument("--base", type=Path, help="a finished base")
    parser.add_argument("--seed", type=int, default=0, help="of the world's pictures")
    args = parser.parse_args()
    if args.base and not (args.base / "model_index.json").is_file():
        parser.error(f"--base {args.base} is no folder of a base: it has no model_index.json")
    world = DrawnWorld()
    if args.base:
        image = samples(StableDiffusionXLPipeline.from_pretrained(args.base), world.size)
    elif args.work_dir is None:
        image = sheet([[sample(args.seed, 12 * row + i).image for i in range(12)] for row in range(8)])
    elif args.stage == "vae":
        image = reconstructions(world, args.work_dir)
    else:
        image = samples(newest(world, args.work_dir), world.size)
    image.save(args.output, optimize=True)


if __name__ == "__main__":
    main()
