"""Encoding once against encoding at every step: whole-run time and peak memory of the two loop shapes.

    python -m benchmarks.loop_shape --base assets/tiny-sdxl --steps 100 --batch 4 --repeats 3
    python -m benchmarks.loop_shape --base quarter --steps 20 --batch 1 --repeats 3

One side is the trainer as it is. The other has the shape of diffusers' train_dreambooth_lora_sdxl.py with captions: the
autoencoder and both text encoders stay in memory and encode the batch at every step. Same base, pictures, method (LoRA
of rank 4), steps and batch; each run is a process of its own, the two take turns, and medians are compared as ratios.
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
from peft import LoraConfig, get_peft_model_state_dict

from benchmarks.sdxl_shape import ASSETS, BASE_HELP, base_folder
from dreambooth.data import folder_examples
from dreambooth.encode import CropSettings, cut_picture, encode_prompts, inspect_picture, scale_latents, tokenize
from dreambooth.loss import Objective
from inference.base import load_pipeline
from methods.components import FOLDED_WEIGHTS, TARGETS
from methods.files import write_diffusers_file
from settings.command_line import quiet_libraries, run_command
from settings.training import TrainConfig
from storage.pictures import open_image
from storage.text import expand_home
from train_dreambooth_nora_sdxl import train

SUBJECT = ASSETS / "subjects" / "robot"
PROMPT = "a photo of [V] robot"


def encode_once(base: str, steps: int, batch: int, folder: str) -> None:
    train(
        TrainConfig.of(
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
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(TARGETS["unet"])))
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
    lora = {f"unet.{key}": weight for key, weight in get_peft_model_state_dict(unet).items()}
    write_diffusers_file(lora, Path(folder) / FOLDED_WEIGHTS)


SHAPES = {"once": encode_once, "every_step": encode_every_step}


def measure(shape: str, base: str, steps: int, batch: int) -> tuple[float, float]:
    """Seconds (of a CPU: its own work) and peak MB of one run in a process of its own, imports not counted."""
    flags = ["--base", base, "--steps", str(steps), "--batch", str(batch), "--one", shape]
    command = [sys.executable, "-m", "benchmarks.loop_shape", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["seconds"], result["peak_mb"]


def compare(base: str, steps: int, batch: int, repeats: int) -> tuple[float, float]:
    """Time and peak memory of encoding once, as multiples of encoding at every step; medians."""
    runs: dict[str, list[tuple[float, float]]] = {shape: [] for shape in SHAPES}
    with base_folder(base) as folder:
        for _ in range(repeats):
            for shape in SHAPES:
                runs[shape].append(measure(shape, folder, steps, batch))
    once, every = ([statistics.median(column) for column in zip(*figures)] for figures in runs.values())
    return once[0] / every[0], once[1] / every[1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default=str(ASSETS / "tiny-sdxl"), help=BASE_HELP)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=SHAPES, help=argparse.SUPPRESS)  # a single run, for `measure`
    args = parser.parse_args(argv)
    quiet_libraries()
    if args.one:
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        started = clock()
        with tempfile.TemporaryDirectory() as folder:
            SHAPES[args.one](args.base, args.steps, args.batch, folder)
        seconds = clock() - started
        peak = (
            torch.cuda.max_memory_allocated() / 1e6
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        )
        print(json.dumps({"seconds": seconds, "peak_mb": peak}))
        return
    seconds, peak = compare(args.base, args.steps, args.batch, args.repeats)
    print("| loop | whole run, ratio | peak memory, ratio |\n|---|---|---|")
    print(f"| once | {seconds:.2f} | {peak:.2f} |\n| every_step | 1.00 | 1.00 |")


if __name__ == "__main__":
    run_command(main)
