"""Encoding once against encoding at every step: whole-run time and peak memory of the two loop shapes.

    python -m benchmarks.loop_shape --base assets/tiny-sdxl --steps 100 --batch 4 --repeats 3
    python -m benchmarks.loop_shape --base quarter --steps 20 --batch 1 --repeats 3

One side is the trainer as it is. The other has the shape of diffusers' train_dreambooth_lora_sdxl.py with captions: the
autoencoder and both text encoders stay in memory and encode the batch at every step. Same base, pictures, method (LoRA
of rank 4), steps and batch; each run is a process of its own, the two take turns, and medians are compared as ratios.

`quarter` is SDXL's own architecture at a quarter of every width and half of the resolution, with random weights: its
parts have about the shares in the work that SDXL's have (multiply-adds grow with the square of the width in all).
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth.config import TrainConfig
from dreambooth.data import folder_examples
from dreambooth.encode import CropSettings, cut_picture, encode_prompts, inspect_picture, scale_latents, tokenize
from dreambooth.loss import Objective
from inference.base import load_pipeline
from inference.cli import quiet_libraries
from storage.pictures import open_image
from train_dreambooth_nora_sdxl import train
from trainer.export import folded_lora, write_diffusers_file
from trainer.methods import UNET_TARGETS

ASSETS = Path(__file__).parent.parent / "assets"
SUBJECT = ASSETS / "subjects" / "robot"
PROMPT = "a photo of [V] robot"
QUARTER = "quarter"


def save_quarter_width_base(folder: str) -> None:
    """SDXL with a quarter of its channels everywhere, for 512 × 512 pixels; heads stay as many as they are."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-sdxl" / "tokenizer", model_max_length=77)
    words = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {f"{name}_token_id": id_ for name, id_ in words.items()} | {"vocab_size": len(tokenizer)}
    first = CLIPTextConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=12, projection_dim=192, **text
    )
    second = CLIPTextConfig(
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=320,
        **text,
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(80, 160, 320),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=512,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=6 * 64 + 320,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        sample_size=512,
        scaling_factor=0.13025,
    )
    StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)


def encode_once(base: str, steps: int, batch: int, folder: str) -> None:
    train(
        TrainConfig(
            pretrained_model_name_or_path=base,
            instance_data_dir=str(SUBJECT),
            instance_prompt=PROMPT,
            output_dir=folder,
            method="lora",
            train_batch_size=batch,
            max_train_steps=steps,
            num_validation_images=0,
            mixed_precision="no",
            report_to="none",
        )
    )


def encode_every_step(base: str, steps: int, batch: int, folder: str) -> None:
    pipeline = load_pipeline(base, torch.float32)
    for model in (pipeline.vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False)
    objective, unet, vae = Objective(pipeline.scheduler), pipeline.unet, pipeline.vae
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=UNET_TARGETS))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
    resolution = unet.config.sample_size * pipeline.vae_scale_factor
    settings = CropSettings([(resolution, resolution)], variants=1)
    cuts = [cut_picture(inspect_picture(one), settings) for one in folder_examples(SUBJECT, PROMPT)]
    pictures = [cut.crops[0].of(open_image(cut.picture.example.read()), "lanczos") for cut in cuts]
    pixels = torch.stack([pipeline.image_processor.preprocess(picture)[0] for picture in pictures])  # (N, 3, H, W)
    time_ids = torch.stack([cut.crops[0].time_ids(cut.picture.size) for cut in cuts])
    scheduler = objective.scheduler
    for _ in range(steps):
        rows = torch.randint(len(pixels), (batch,))
        with torch.no_grad():
            latents = scale_latents(vae, vae.encode(pixels[rows].to(vae.device)).latent_dist.sample())
            tokens = tokenize([pipeline.tokenizer, pipeline.tokenizer_2], [PROMPT] * batch)
            text = encode_prompts([pipeline.text_encoder, pipeline.text_encoder_2], tokens)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(objective.num_train_timesteps, (batch,), device=latents.device)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": time_ids[rows].to(latents.device)}
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text.prompt_embeds, added_cond_kwargs=added).sample
        (prediction - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    write_diffusers_file(folded_lora({"unet": unet}), Path(folder) / "pytorch_lora_weights.safetensors")


SHAPES = {"once": encode_once, "every_step": encode_every_step}


def measure(shape: str, base: str, steps: int, batch: int) -> tuple[float, float]:
    """Seconds and peak MB of one run in a process of its own, imports not counted in the time."""
    flags = ["--base", base, "--steps", str(steps), "--batch", str(batch), "--one", shape]
    command = [sys.executable, "-m", "benchmarks.loop_shape", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["seconds"], result["peak_mb"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default=str(ASSETS / "tiny-sdxl"), help=f"a folder, a Hub id, or {QUARTER}")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)  # a single run, for `measure`
    args = parser.parse_args(argv)
    quiet_libraries()
    if args.one:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            SHAPES[args.one](args.base, args.steps, args.batch, folder)
        seconds = time.perf_counter() - started
        peak = (
            torch.cuda.max_memory_allocated() / 1e6
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        )
        print(json.dumps({"seconds": seconds, "peak_mb": peak}))
        return
    runs = {shape: [] for shape in SHAPES}
    with tempfile.TemporaryDirectory() as folder:
        if args.base == QUARTER:
            save_quarter_width_base(folder)
        base = folder if args.base == QUARTER else args.base
        for _ in range(args.repeats):
            for shape in SHAPES:
                runs[shape].append(measure(shape, base, args.steps, args.batch))
    medians = {shape: [statistics.median(column) for column in zip(*figures)] for shape, figures in runs.items()}
    print("| loop | whole run, ratio | peak memory, ratio |\n|---|---|---|")
    for shape, (seconds, peak) in medians.items():
        print(f"| {shape} | {seconds / medians['every_step'][0]:.2f} | {peak / medians['every_step'][1]:.2f} |")


if __name__ == "__main__":
    main()
