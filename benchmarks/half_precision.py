"""Which form of NoRA's layer follows float32 better in half precision: one frozen factor, or two?

    OMP_NUM_THREADS=2 python -m benchmarks.half_precision --dtypes bfloat16 float16 --steps 200 --seeds 0 1 2

Trains the UNet on the same batches in float32, and under autocast over a frozen base in half precision, once as
``W (x + s R B' A' A x)`` and once as ``W x + s B B' A' A x``. The nearer a form's loss curve and its final weights stay
to float32's, the better it follows. Float16 has a loss scale, as accelerate gives it.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model_state_dict

from benchmarks.heldout_loss import SUBJECTS, encode_folder
from dreambooth.draws import INSTANCE, fixed_batches
from dreambooth.encode import EncodedPicture, EncodedPrompts
from dreambooth.loss import Objective
from inference.base import load_pipeline
from methods.components import TARGETS
from nora import NoraConfig
from nora.model import nora_layers
from settings.command_line import quiet_libraries, run_command
from storage.text import expand_home

BATCH = 4
LEARNING_RATE = 1e-3
FORMS = ("one factor", "two factors")


def nora_unet(unet: UNet2DConditionModel, dtype: torch.dtype, form: str, seed: int) -> UNet2DConditionModel:
    """A copy of the frozen UNet in that dtype with a NoRA adapter, decomposed in float32, trained in float32."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(seed)
    unet.add_adapter(NoraConfig(r=16, target_modules=list(TARGETS["unet"]), outer_init="svd"))
    layers = nora_layers(unet, "default").values()
    if form == "two factors":
        for layer in layers:
            layer.hold_both_factors("default")
    unet.to(dtype)
    for layer in layers:
        for factor in (layer.nora_inner_A["default"], layer.nora_inner_B["default"]):
            factor.float()
    return unet.train()


def train(
    unet: UNet2DConditionModel,
    pictures: Sequence[EncodedPicture],
    prompts: EncodedPrompts,
    objective: Objective,
    steps: int,
    seed: int,
) -> tuple[np.ndarray, torch.Tensor]:
    """The loss of every step (steps,), and the trained factors in one vector."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    half = unet.dtype != torch.float32
    scaler = torch.amp.GradScaler("cpu", enabled=unet.dtype == torch.float16)
    slots = np.random.RandomState(seed).permutation(steps * BATCH).reshape(steps, BATCH)  # of the timesteps' strata
    losses = []
    for step in range(steps):
        options = {"seed": seed, "stream": INSTANCE, "total": steps * BATCH}
        count = objective.num_train_timesteps
        (batch,) = fixed_batches(pictures, slots=slots[step].tolist(), num_train_timesteps=count, **options)
        text = prompts.rows(batch.prompts)
        noisy, timesteps = objective.model_input(batch)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": batch.time_ids}
        with torch.autocast("cpu", dtype=unet.dtype, enabled=half):
            prediction = unet(noisy.to(unet.dtype), timesteps, text.prompt_embeds, added_cond_kwargs=added).sample
        loss = objective.loss(prediction.float(), batch, BATCH)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = get_peft_model_state_dict(unet)
    return np.array(losses), torch.cat([weights[key].flatten().double() for key in sorted(weights) if "inner" in key])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=expand_home, default="assets/tiny-sdxl")
    parser.add_argument("--subject", default="robot", help="a folder of assets/subjects")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    quiet_libraries()
    pipeline = load_pipeline(args.base, torch.float32)
    pictures, prompts = encode_folder(pipeline, Path(SUBJECTS) / args.subject, f"a photo of [V] {args.subject}")
    unet, objective = pipeline.unet.requires_grad_(False), Objective(pipeline.scheduler)
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in args.seeds:
        exact, weights = train(
            nora_unet(unet, torch.float32, FORMS[0], seed), pictures, prompts, objective, args.steps, seed
        )
        for name in ("float32", *args.dtypes):
            for form in FORMS:
                if (name, form) == ("float32", FORMS[0]):
                    continue
                model = nora_unet(unet, getattr(torch, name), form, seed)
                losses, found = train(model, pictures, prompts, objective, args.steps, seed)
                off = np.abs(losses / exact - 1)
                distance = ((found - weights).norm() / weights.norm()).item()
                last = losses[-50:].mean() / exact[-50:].mean() - 1
                rows.setdefault((name, form), []).append((off.mean(), last, distance))
                print(f"seed {seed} {name} {form}: {off.mean():.2e} {last:+.2e} {distance:.3f}", flush=True)
    print("| dtype | form | loss, mean distance a step | mean of the last 50 | trained weights, distance |")
    print("|---|---|---|---|---|")
    for (name, form), figures in rows.items():
        step, last, distance = np.mean(figures, axis=0)
        print(f"| {name} | {form} | {100 * step:.3f} % | {100 * last:+.3f} % | {distance:.3f} |")


if __name__ == "__main__":
    run_command(main)
