"""Pretrain the embedded judges: a tiny CLIP and a tiny image encoder, on pictures like those of the embedded base.

    OMP_NUM_THREADS=2 python tools/pretrain_tiny_clip.py

CLIP (arXiv 2103.00020) learns from pictures and their captions. The image encoder, in the layout of DINO's (a ViT whose
class token is the feature), learns from pictures alone: two pictures of one figure, in other poses and before other
backgrounds, shall be near, and those of other figures far (SimCLR, arXiv 2002.05709; with a twin task instead of DINO's
self-distillation, because it needs fewer pictures). Half of the pictures are made soft or noisy,
as samples of a diffusion model are. Both trainings are resumable, and random draws are functions of (seed, step).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageFilter
from pretrain_tiny_sdxl import MAX_TOKENS, tokenize, train
from torch import nn
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from world.pool import DrawnWorld

SIZE = 64  # pixels of a side: enough for the judges, and a quarter of the base's cost
MEAN = STD = [0.5, 0.5, 0.5]
VISION = {"image_size": SIZE, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
HEADS = 4


def weathered(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8; half of the pictures softer or noisier than they were drawn."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2)))
        noise = rng.normal(0, rng.uniform(0, 8), (*image.size[::-1], 3))
        return (np.asarray(image, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8)
    return np.asarray(image)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], what both image processors make of a picture."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- CLIP -------------------------------------------------------------------------------------------------------------


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    }
    vision = VISION | {"num_attention_heads": HEADS}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


class Contrast(nn.Module):
    """CLIP's own loss as a forward pass."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids, pixel_values):
        return self.clip(input_ids=input_ids, pixel_values=pixel_values, return_loss=True).loss


def caption_pool(world: DrawnWorld, seed: int, size: int) -> tuple[np.ndarray, list[str]]:
    """(N, 64, 64, 3) uint8 and N captions."""
    pictures, captions = [], []
    for index in tqdm(range(size), desc="pictures", mininterval=10):
        picture, caption = world.sample(seed, index)
        pictures.append(weathered(picture, np.random.default_rng((seed, index, 2))))
        captions.append(caption)
    return np.stack(pictures), captions


def train_clip(accelerator: Accelerator, world: DrawnWorld, tokenizer: CLIPTokenizer, args) -> CLIPModel:
    torch.manual_seed(args.seed)
    clip = build_clip(tokenizer)
    pictures, captions = caption_pool(world, args.seed + 10, args.pool_size)  # other pictures than the base's
    input_ids = tokenize(tokenizer, captions)

    def loss_at(model, step):
        rows = torch.randint(0, len(pictures), (args.batch_size,))
        return model(input_ids[rows], normalised(pictures[rows.numpy()]))

    train(accelerator, Contrast(clip), 0.99, args.work_dir / "clip", args.steps, args.learning_rate, 100, loss_at)
    return clip.eval()


@torch.no_grad()
def retrieval(clip: CLIPModel, world: DrawnWorld, tokenizer: CLIPTokenizer, seed: int, count: int = 200) -> dict:
    """Share of held-out pictures whose own caption is the nearest of ``count``, and of captions whose picture is.

    Captions are all different, so that there is one right answer; chance is 1 / count.
    """
    pictures, captions, index = [], [], 0
    while len(captions) < count:
        picture, caption = world.sample(seed, index)
        index += 1
        if caption not in captions:
            pictures.append(np.asarray(picture))
            captions.append(caption)
    scores = clip(
        input_ids=tokenize(tokenizer, captions), pixel_values=normalised(np.stack(pictures))
    ).logits_per_image  # (count, count)
    right = torch.arange(count)
    ranked = scores.topk(5, dim=1).indices
    return {
        "pictures": count,
        "picture_to_caption_top1": round((scores.argmax(1) == right).float().mean().item(), 3),
        "picture_to_caption_top5": round((ranked == right[:, None]).any(1).float().mean().item(), 3),
        "caption_to_picture_top1": round((scores.argmax(0) == right).float().mean().item(), 3),
    }


# --- the image encoder ------------------------------------------------------------------------------------------------


class Twins(nn.Module):
    """Two views of N drawings -> the normalised-temperature cross-entropy of finding each one's twin among 2N - 2."""

    def __init__(self, vit: ViTModel, temperature: float = 0.1):
        super().__init__()
        width = vit.config.hidden_size
        self.vit, self.temperature = vit, temperature
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))  # not kept

    def forward(self, pixel_values):
        """pixel_values (2N, 3, H, W), first views and then second ones."""
        features = self.vit(pixel_values).last_hidden_state[:, 0]
        features = nn.functional.normalize(self.head(features), dim=-1)
        scores = (features @ features.T / self.temperature).fill_diagonal_(-torch.inf)
        count = len(features)
        return nn.functional.cross_entropy(scores, (torch.arange(count) + count // 2) % count)


def twin_pool(world: DrawnWorld, seed: int, size: int) -> np.ndarray:
    """(N, 2, 64, 64, 3) uint8: two pictures of one setting of "who" in two poses and places."""
    pictures = []
    for index in tqdm(range(size), desc="twins", mininterval=10):
        rng = np.random.default_rng((seed, index, 4))
        pictures.append([weathered(image, rng) for image in world.twins(seed, index)])
    return np.stack(pictures)


def train_image_encoder(accelerator: Accelerator, world: DrawnWorld, args) -> ViTModel:
    torch.manual_seed(args.seed)
    vit = ViTModel(ViTConfig(**VISION, num_attention_heads=HEADS), add_pooling_layer=False)
    pool = twin_pool(world, args.seed + 10, args.pool_size // 2)

    def loss_at(model, step):
        rows = torch.randint(0, len(pool), (args.batch_size // 2,)).numpy()
        return model(normalised(np.concatenate([pool[rows, 0], pool[rows, 1]])))

    train(accelerator, Twins(vit), 0.99, args.work_dir / "vit", args.steps, args.learning_rate, 100, loss_at)
    return vit.eval()


@torch.no_grad()
def twin_accuracy(vit: ViTModel, world: DrawnWorld, seed: int, count: int = 200) -> dict:
    """Share of held-out drawings whose other picture is the nearest of ``count``; chance is 1 / count."""
    pool = twin_pool(world, seed, count)
    first, second = (
        nn.functional.normalize(vit(normalised(pool[:, side])).last_hidden_state[:, 0], dim=-1) for side in (0, 1)
    )
    found = (first @ second.T).argmax(1) == torch.arange(count)
    return {"pictures": count, "twin_top1": round(found.float().mean().item(), 3)}


# --- files ------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base",
        type=lambda text: Path(text).expanduser(),
        default=Path("assets/tiny-sdxl"),
        help="whose tokenizer is used",
    )
    parser.add_argument("--clip_dir", type=lambda text: Path(text).expanduser(), default=Path("assets/tiny-clip"))
    parser.add_argument("--dino_dir", type=lambda text: Path(text).expanduser(), default=Path("assets/tiny-dino"))
    parser.add_argument(
        "--work_dir",
        type=lambda text: Path(text).expanduser(),
        default=Path("out/pretrain"),
        help="checkpoints",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool_size", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    return parser.parse_args()


def save(model, processor, directory: Path, facts: dict) -> None:
    """Weights in fp16, loaded as fp32."""
    model.half().save_pretrained(directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True))
    processor.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{directory}: {sum(f.stat().st_size for f in directory.rglob('*')) / 1e6:.1f} MB, {facts['held_out']}")


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(cpu=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    world = DrawnWorld(SIZE)
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    sizes = {
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
        "image_mean": MEAN,
        "image_std": STD,
    }
    clip = train_clip(accelerator, world, tokenizer, args)
    facts = {"held_out": retrieval(clip, world, tokenizer, args.seed + 11), "concepts": len(world.facts()["concepts"])}
    save(clip, CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer), args.clip_dir, facts | {"settings": settings})

    vit = train_image_encoder(accelerator, world, args)
    facts = {"held_out": twin_accuracy(vit, world, args.seed + 11)}
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
    save(vit, processor, args.dino_dir, facts | {"settings": settings})


if __name__ == "__main__":
    main()
