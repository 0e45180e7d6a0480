"""Train the attribute reader of judging/attributes.py on the drawn world.

    OMP_NUM_THREADS=1 python tools/pretrain_attributes.py

Resumable; the pool of pictures is drawn once. Half of them have been through the base's autoencoder, because every
picture that the reader will judge has (read as drawn alone, an orange belly that the autoencoder softens reads as
brown), and half are soft or noisy, as samples of a diffusion model are. Its accuracy is measured on pictures of another
seed and of kept-out settings, as drawn and through the autoencoder.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain_tiny_clip import weathered
from pretrain_tiny_sdxl import train
from world import (
    ACCESSORIES,
    COLORS,
    KINDS,
    PATTERNS,
    PLACES,
    SIZE,
    VIEWS,
    Picture,
    draw,
    draw_place,
    draw_pose,
    place_words,
    sample,
)
from world.attributes import ACCENT_COLORS, EYE_COLORS, draw_new_subject

from judging.attributes import AttributeReader, reduced, to_pixels

ANSWERS = {
    "kind": list(KINDS),
    "main": list(COLORS),
    "second": list(COLORS),
    "eyes": list(EYE_COLORS),
    "pattern": list(PATTERNS),
    "accessory": list(ACCESSORIES),
    "accent": list(ACCENT_COLORS),
    "view": list(VIEWS),
    "place": list(PLACES),
}
SHIFT = 4
UNSEEN = -100  # the label of what a picture doesn't show: cross-entropy leaves it out


def labels_of(picture: Picture) -> list[int]:
    """One class number for each question of ``ANSWERS``."""
    who = picture.who
    shown = {name: getattr(who, name) for name in ("kind", "main", "second", "eyes", "pattern", "accessory")}
    shown |= {"view": picture.pose.view, "place": picture.place}
    if who.accessory in ("scarf", "hat", "bow"):
        shown["accent"] = who.accent
    return [options.index(shown[name]) if name in shown else UNSEEN for name, options in ANSWERS.items()]


def kept_out_picture(seed: int, index: int) -> Picture:
    """A picture of a setting that no training shows."""
    rng = np.random.default_rng((seed, index, 4))
    who = draw_new_subject(rng, list(KINDS)[index % len(KINDS)])
    pose, place = draw_pose(rng, who.kind), draw_place(rng, who.main)
    return Picture(draw(who, pose, place, rng, SIZE), "", who, pose, place)


@torch.no_grad()
def coded(vae: AutoencoderKL, images: list[Image.Image]) -> list[Image.Image]:
    """The pictures as the autoencoder gives them back."""
    latents = vae.encode(to_pixels(np.stack([np.asarray(image) for image in images]))).latent_dist.mode()
    return VaeImageProcessor().postprocess(vae.decode(latents).sample, output_type="pil")


def pool_of(
    pictures, count: int, vae: AutoencoderKL, share: float, seed: int | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """(N, 64, 64, 3) uint8 and labels (N, questions).

    Args:
        share: of the pictures that go through the autoencoder.
        seed: of the weather; None: none.
    """
    images, labels = [], []
    for start in tqdm(range(0, count, 32), desc="pictures", mininterval=10):
        indices = range(start, min(start + 32, count))
        batch = [pictures(index) for index in indices]
        through = round(share * len(batch))
        seen = [picture.image for picture in batch]
        seen = (coded(vae, seen[:through]) if through else []) + seen[through:]
        for index, image in zip(indices, map(reduced, seen), strict=True):
            weather = np.random.default_rng((seed, index, 2)) if seed is not None else None
            images.append(weathered(Image.fromarray(image), weather) if weather else image)
        labels += map(labels_of, batch)
    return np.stack(images), torch.tensor(labels)


def saved_pool(path: Path, size: int, vae: AutoencoderKL, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    if not path.exists():
        images, labels = pool_of(lambda index: sample(seed, index), size, vae, 0.5, seed)
        with path.with_suffix(".new").open("wb") as file:
            np.savez(file, images=images, labels=labels.numpy())
        path.with_suffix(".new").rename(path)
    pool = np.load(path)
    return pool["images"], torch.from_numpy(pool["labels"])


class Reading(nn.Module):
    """Cross-entropy summed over the questions, as a forward pass."""

    def __init__(self, reader: AttributeReader):
        super().__init__()
        self.reader = reader

    def forward(self, pixels, labels):
        logits = self.reader(pixels)
        return sum(
            nn.functional.cross_entropy(logits[question], labels[:, i], ignore_index=UNSEEN)
            for i, question in enumerate(ANSWERS)
        )


def moved(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W): each mirrored or not, and moved by up to 4 pixels: no answer changes by that."""
    count, _, height, width = pixels.shape
    mirror = torch.rand(count) < 0.5
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(-1), pixels)
    padded = nn.functional.pad(pixels, (SHIFT,) * 4, mode="reflect")
    rows = torch.randint(0, 2 * SHIFT + 1, (count, 1, 1)) + torch.arange(height)[None, :, None]
    columns = torch.randint(0, 2 * SHIFT + 1, (count, 1, 1)) + torch.arange(width)[None, None, :]
    return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(reader: AttributeReader, images: np.ndarray, labels: torch.Tensor) -> dict[str, float]:
    """Share of right answers, by question, over the pictures that show it."""
    logits = [reader(to_pixels(images[i : i + 200])) for i in range(0, len(images), 200)]
    shares = {}
    for i, question in enumerate(ANSWERS):
        found = torch.cat([part[question] for part in logits]).argmax(-1)
        asked = labels[:, i] != UNSEEN
        shares[question] = round((found == labels[:, i])[asked].float().mean().item(), 4)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("assets/tiny-attributes"))
    parser.add_argument("--work_dir", type=Path, default=Path("out/pretrain"), help="checkpoints and the pool")
    parser.add_argument("--base", type=Path, default=Path("assets/tiny-sdxl"), help="whose autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool_size", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--held_out", type=int, default=2000, help="pictures to measure the accuracy on")
    args = parser.parse_args()
    if not (args.base / "vae").is_dir():
        parser.error(f"--base {args.base} is no folder of a base: it has no autoencoder in vae")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    reader = AttributeReader(ANSWERS, {place_words(place): place for place in PLACES})
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae").float().eval()
    pool = args.work_dir / f"attributes-{args.pool_size}.npz"
    images, labels = saved_pool(pool, args.pool_size, vae, args.seed + 20)

    def loss_at(model, step):
        rows = torch.randint(0, len(images), (args.batch_size,))
        return model(moved(to_pixels(images[rows.numpy()])), labels[rows])

    train(Accelerator(cpu=True), Reading(reader), 0.995, args.work_dir / "attributes", args.steps, 1e-3, 100, loss_at)
    reader.eval()
    seed = args.seed + 21
    held_out = {"accuracy": partial(sample, seed), "accuracy_on_kept_out_settings": partial(kept_out_picture, seed)}
    facts = {
        name + suffix: accuracy(reader, *pool_of(pictures, args.held_out, vae, share))
        for name, pictures in held_out.items()
        for suffix, share in (("", 0.0), ("_through_the_autoencoder", 1.0))
    } | {
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
    }
    reader.save(args.output_dir, facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
