"""Pretrain the embedded base: a tiny SDXL from nothing but captioned drawings.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 tools/pretrain_tiny_sdxl.py

The drawings are the parametric figures of tools/world: 128 pixels, an autoencoder of factor 8 as SDXL's, latents of
8 x 16 x 16.

Four stages, each resumable: tokenizer, autoencoder, a pool of encoded pictures, and text encoders with UNet jointly
(noise prediction on SDXL's scaled-linear schedule, min-SNR weighting, arXiv 2303.09556). Everything random is a
function of (seed, step, process). The learning rate warms up, stays constant, and falls to zero over the last fifth,
so that a run given more steps before the fall is the run that had them from the start.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world.pool import DrawnWorld

LATENT_SIDE = 16
MAX_TOKENS = 24
SAVE_EVERY = 120  # seconds


def world_texts(world: DrawnWorld) -> list[str]:
    """What the tokenizer learns its words from: captions, and the world's other words."""
    return [world.sample(0, index)[1] for index in range(4000)] + world.other_words()


def build_tokenizer(texts: Iterable[str], directory: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's file format, with its special tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # CLIP's words carry no space before them: merges learned with one would never apply
    words = Regex(r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2200,
        min_frequency=4,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    # CLIP's files hold the alphabet twice, bare and with the end-of-word mark, so that any byte can end a word.
    vocab = {token: i for i, token in enumerate(t for t in trained["vocab"] if not t.startswith("<|"))}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        for token in (letter, f"{letter}</w>"):
            vocab.setdefault(token, len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    clip.save_pretrained(directory)
    return CLIPTokenizer.from_pretrained(directory)


def build_vae(size: int, channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """(B, 3, size, size) in [-1, 1] <-> (B, latent_channels, 16, 16); each level but the last halves the side."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


class TextConditionedUNet(nn.Module):
    """Both text encoders and the UNet, wired as in SDXL: one module, so that data parallelism wraps them together."""

    def __init__(self, tokenizer: CLIPTokenizer, latent_channels: int):
        super().__init__()
        vocabulary = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "num_hidden_layers": 3,
        }
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=64, intermediate_size=256, num_attention_heads=2, projection_dim=64, **vocabulary
            )
        )
        self.text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=96,
                intermediate_size=384,
                num_attention_heads=3,
                projection_dim=96,
                hidden_act="gelu",
                **vocabulary,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=(48, 96, 160),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 4, 8),
            cross_attention_dim=64 + 96,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=6 * 32 + 96,
            use_linear_projection=True,
            norm_num_groups=16,
        )
        # SDXL reads the last but one hidden state of each encoder: what lies above it in the first gets no gradient.
        self.text_encoder.requires_grad_(False)
        for name, parameter in self.text_encoder.named_parameters():
            parameter.requires_grad_("layers.2." not in name and "final_layer_norm" not in name)
        self.text_encoder_2.requires_grad_(True)

    def forward(self, input_ids, noisy_latents, timesteps, time_ids):
        """input_ids (B, 24), noisy_latents (B, C, 16, 16), timesteps (B,), time_ids (B, 6) -> predicted noise."""
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids, output_hidden_states=True)
        prompt_embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)  # (B, 24, 160)
        added = {"text_embeds": second.text_embeds, "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added).sample


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Warm-up, constant, and a linear fall over the last fifth."""
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.2 * steps)))


class Checkpoint:
    """Weights, optimizer and EMA of one stage in ``directory``; written whole (temporary name, then rename)."""

    def __init__(self, directory: Path, **parts):
        self.directory, self.parts = directory, parts

    def load(self) -> int:
        """Restore the parts; returns the number of steps done."""
        if not (self.directory / "step").exists():
            return 0
        for name, part in self.parts.items():
            part.load_state_dict(torch.load(self.directory / f"{name}.pt", weights_only=True))
        return int((self.directory / "step").read_text())

    def save(self, step: int) -> None:
        fresh = self.directory.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, part in self.parts.items():
            torch.save(part.state_dict(), fresh / f"{name}.pt")
        (fresh / "step").write_text(str(step))
        old = self.directory.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(old)
        fresh.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)


def to_pixels(images) -> torch.Tensor:
    """PIL images -> (B, 3, H, W) in [-1, 1]."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


def train(accelerator, model, ema_decay, directory, steps, peak_lr, warmup, loss_at):
    """The loop both trainings share. ``loss_at(model, step) -> scalar``. Leaves the averaged weights in ``model``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    checkpoint = Checkpoint(directory, model=model, optimizer=optimizer, ema=ema)
    start = checkpoint.load()
    wrapped = accelerator.prepare_model(model)
    progress = tqdm(
        range(start, steps), initial=start, total=steps, disable=not accelerator.is_main_process, mininterval=10
    )
    running, log = 0.0, directory.with_suffix(".jsonl")
    saved = time.monotonic()
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr, warmup)
        torch.manual_seed(1_000_003 * (accelerator.process_index + 1) + step)
        loss = loss_at(wrapped, step)
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if accelerator.is_main_process and (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{running:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}")
            with log.open("a") as file:
                # "cpu": seconds of this process alone since it started
                facts = {"step": step + 1, "loss": round(running, 5), "time": round(time.time())}
                file.write(json.dumps(facts | {"cpu": round(time.process_time())}) + "\n")
        if accelerator.is_main_process and (time.monotonic() - saved > SAVE_EVERY or step + 1 == steps):
            checkpoint.save(step + 1)
            saved = time.monotonic()
    accelerator.wait_for_everyone()
    ema.copy_to(parameters)


class Reconstruction(nn.Module):
    """The autoencoder as one forward pass, so that data parallelism sees all of it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels):
        """pixels (B, 3, H, W) -> reconstruction (B, 3, H, W) and KL per latent number (scalar)."""
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample()
        return self.vae.decode(latents).sample, posterior.kl().sum() / latents.numel()


def train_vae(accelerator, world, args) -> AutoencoderKL:
    """L1 on pixels and on their differences, and a light KL; scaling_factor = 1 / std of the latents, as in SDXL."""
    torch.manual_seed(args.seed)
    vae = build_vae(world.size, world.vae_channels, world.latent_channels).to(memory_format=torch.channels_last)
    per_process = args.vae_batch_size // accelerator.num_processes

    def loss_at(model, step):
        first = (step * accelerator.num_processes + accelerator.process_index) * per_process
        pixels = to_pixels([world.any_picture(args.seed, first + i) for i in range(per_process)])
        reconstruction, kl = model(pixels.contiguous(memory_format=torch.channels_last))
        error = reconstruction - pixels
        return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean() + 1e-3 * kl

    train(accelerator, Reconstruction(vae), 0.995, args.work_dir / "vae", args.vae_steps, 1e-3, 100, loss_at)
    vae.eval().requires_grad_(False)
    held_out = to_pixels([world.any_picture(args.seed + 1, i) for i in range(64)])
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mean
        error = (vae.decode(latents).sample.clamp(-1, 1) - held_out).square().mean(dim=(1, 2, 3)) / 4
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    accelerator.print(f"autoencoder: {-10 * error.log10().mean():.2f} dB on held-out pictures")
    return vae


@torch.no_grad()
def encode_pool(accelerator, world, vae, tokenizer, args) -> dict[str, torch.Tensor]:
    """``pool_size`` pictures as scaled latents (N, C, 16, 16) in fp16 with token ids (N, 24), encoded once."""
    path = args.work_dir / "pool.safetensors"
    if not path.exists():
        mine = range(accelerator.process_index, args.pool_size, accelerator.num_processes)
        latents, input_ids = [], []
        for start in tqdm(
            range(0, len(mine), 64), disable=not accelerator.is_main_process, desc="pool", mininterval=10
        ):
            pictures, captions = zip(*(world.sample(args.seed, i) for i in mine[start : start + 64]))
            latents.append(
                (vae.encode(to_pixels(pictures)).latent_dist.mean * vae.config.scaling_factor).half().contiguous()
            )
            input_ids.append(tokenize(tokenizer, captions))
        part = {"latents": torch.cat(latents), "input_ids": torch.cat(input_ids).int()}
        save_file(part, f"{path}.{accelerator.process_index}")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            parts = [load_file(f"{path}.{i}") for i in range(accelerator.num_processes)]
            save_file({name: torch.cat([p[name] for p in parts]) for name in part}, f"{path}.new")
            os.replace(f"{path}.new", path)
        accelerator.wait_for_everyone()
        Path(f"{path}.{accelerator.process_index}").unlink()
    return load_file(path)


def tokenize(tokenizer, captions) -> torch.Tensor:
    return tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def random_time_ids(count: int, size: int) -> torch.Tensor:
    """(B, 6): original size, crop, target size. Half of the sizes are anything: users' pictures come in all sizes."""
    time_ids = torch.tensor([size, size, 0, 0, size, size], dtype=torch.float32).repeat(count, 1)
    anything = torch.rand(count) < 0.5
    time_ids[anything, :2] = torch.randint(size // 2, 2048, (int(anything.sum()), 2)).float()
    cropped = torch.rand(count) < 0.2
    time_ids[cropped, 2:4] = torch.randint(0, size, (int(cropped.sum()), 2)).float()
    return time_ids


def train_unet(accelerator, pool, tokenizer, size, args) -> TextConditionedUNet:
    """Noise prediction with min-SNR weights (gamma 5) and 10 % empty prompts; the text encoders learn along."""
    torch.manual_seed(args.seed)
    model = TextConditionedUNet(tokenizer, pool["latents"].shape[1])
    model.unet.to(memory_format=torch.channels_last)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    per_process = args.batch_size // accelerator.num_processes
    empty = tokenize(tokenizer, [""])

    def loss_at(model, step):
        rows = torch.randint(0, len(pool["latents"]), (per_process,))
        latents = pool["latents"][rows].float()  # (B, C, 16, 16)
        input_ids = torch.where(torch.rand(per_process, 1) < 0.1, empty, pool["input_ids"][rows].long())
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (per_process,))
        noisy = schedule.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        predicted = model(input_ids, noisy, timesteps, random_time_ids(per_process, size))
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        snr = compute_snr(schedule, timesteps)
        return (error * snr.clamp(max=5.0) / snr).mean()

    train(accelerator, model, 0.999, args.work_dir / "unet", args.steps, args.learning_rate, 500, loss_at)
    return model.eval()


def save_pipeline(vae, model, tokenizer, directory: Path) -> None:
    """The diffusers folder, weights stored in fp16."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet.half(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.text_encoder.half()
    pipeline.text_encoder_2.half()
    pipeline.save_pretrained(directory)
    # transformers loads in the dtype that the config names, diffusers in fp32: without this the two would not meet.
    for name in ("text_encoder", "text_encoder_2"):
        path = directory / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=lambda text: Path(text).expanduser(), default=Path("assets/tiny-sdxl"))
    parser.add_argument(
        "--work_dir",
        type=lambda text: Path(text).expanduser(),
        default=Path("out/pretrain"),
        help="checkpoints and the pool",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=5000)
    parser.add_argument("--vae_batch_size", type=int, default=8)
    parser.add_argument("--pool_size", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # a process that is paused for hours keeps the others waiting, not failing
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    args.work_dir.mkdir(parents=True, exist_ok=True)
    world = DrawnWorld()
    with accelerator.main_process_first():  # it writes the tokenizer before the others read it
        if (args.work_dir / "tokenizer").exists():  # a resumed run keeps the token ids that it has learned
            tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
        else:
            tokenizer = build_tokenizer(world_texts(world), args.work_dir / "tokenizer")
    vae = train_vae(accelerator, world, args)
    pool = encode_pool(accelerator, world, vae, tokenizer, args)
    model = train_unet(accelerator, pool, tokenizer, world.size, args)
    if accelerator.is_main_process:
        save_pipeline(vae, model, tokenizer, args.output_dir)
        facts = {
            **world.facts(),
            "settings": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
            "processes": accelerator.num_processes,
        }
        (args.output_dir / "training.json").write_text(json.dumps(facts, indent=1))
        print(f"saved to {args.output_dir}: {sum(f.stat().st_size for f in args.output_dir.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
