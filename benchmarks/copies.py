"""Does the detector of copies find copies, and nothing else? Hits by kind of copy, and false alarms.

    python -m benchmarks.copies --base assets/tiny-sdxl --subjects assets/subjects

A folder of --subjects has a folder for each subject, and held-out pictures of it in heldout/NAME, there or beside.
Without held-out pictures each is held out in turn. Compared are the detector (judging/copies.py), the thumbnails that
it took the place of, and patch features of an image encoder. All is looked at in the base's size, as drawn ones are.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch.nn import functional

from inference.base import load_pipeline
from inference.sampling import generate_images
from judging.copies import SAME, Copies, CopyDetector
from judging.scores import ImageEncoder
from settings.command_line import quiet_libraries, run_command
from storage.pictures import find_images, open_image

SCENES = (
    "a photo of a {}",
    "a photo of a {} in the jungle",
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
)
SEEDS = (11, 12, 13)


class Detector(Protocol):
    def copied(self, images: Sequence[Image.Image]) -> list[bool]: ...


# --- what is compared with the detector -------------------------------------------------------------------------------


class Thumbnails:
    """The alarm of before: 16 × 16 colours, nearer to a training image than the median of these among themselves."""

    def __init__(self, instances: Sequence[Image.Image]) -> None:
        views = torch.stack([self._small(instances), self._small([ImageOps.mirror(one) for one in instances])], dim=1)
        between = torch.einsum("nd,mvd->nmv", views[:, 0], views).amax(dim=2).fill_diagonal_(-1)
        self.views, self.limit = views, float(between.amax(dim=1).median())

    def copied(self, images: Sequence[Image.Image]) -> list[bool]:
        nearest = torch.einsum("nd,mvd->nmv", self._small(images), self.views).amax(dim=(1, 2))
        return (nearest > self.limit).tolist()

    @staticmethod
    def _small(images: Sequence[Image.Image]) -> torch.Tensor:
        small = [
            np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float64).reshape(-1, 3) for image in images
        ]
        return functional.normalize(torch.from_numpy(np.stack([(one - one.mean(axis=0)).ravel() for one in small])))


class Patches:
    """Patch features of an encoder: the mean over a training image's patches of the nearest one's cosine."""

    def __init__(self, encoder: ImageEncoder, instances: Sequence[Image.Image]) -> None:
        self.encoder = encoder
        self.own = [self._patches(one) for image in instances for one in (image, ImageOps.mirror(image))]
        alike = torch.tensor([self._nearest(image, (row,)) for row, image in enumerate(instances)])
        self.limit = float(alike.max() + 0.5 * (1 - alike.max()))

    def copied(self, images: Sequence[Image.Image]) -> list[bool]:
        return [self._nearest(image) > self.limit for image in images]

    def _nearest(self, image: Image.Image, but: Sequence[int] = ()) -> float:
        found = self._patches(image)
        others = [own for place, own in enumerate(self.own) if place // 2 not in but]
        return max(float((own @ found.T).amax(dim=1).mean()) for own in others)

    @torch.no_grad()
    def _patches(self, image: Image.Image) -> torch.Tensor:
        pixels = self.encoder.processor(images=[image], return_tensors="pt").pixel_values
        return functional.normalize(self.encoder.model(pixel_values=pixels).last_hidden_state[0, 1:], dim=-1)


# --- copies -----------------------------------------------------------------------------------------------------------


def copies(image: Image.Image, number: int, background: Image.Image) -> dict[str, Image.Image]:
    """Copies of a picture by kind, the side that they go to depending on its number.

    Args:
        background: the subject before another background.
    """
    side = 1 if number % 2 else -1
    return {
        "the same": image,
        "JPEG": _jpeg(image),
        "soft and noisy": _soft(image, number),
        "moved by 1/8": _moved(image, side / 8, 0 if number % 3 else side / 8),
        "magnified 1.25": _magnified(image, 1.25, (0.5, 0.5)),
        "mirrored": ImageOps.mirror(image),
        "another hue": _recoloured(image, 0.33, 1, 1),
        "brighter, paler": _recoloured(image, 0.05, 0.4, 1.3),
        "mirrored, moved, recoloured": _moved(ImageOps.mirror(_recoloured(image, 0.2, 1, 1)), -side / 10, 0),
        "a corner of 2/3": _magnified(image, 1.5, (0.2 if number % 2 else 0.7, 0.3)),
        "another background": background,
        "another background, soft and noisy": _soft(background, number),
        "another background, mirrored, moved": _moved(ImageOps.mirror(background), 0.08, 0),
    }


def _jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.resize((128, 128)).save(stream, "JPEG", quality=40)
    return Image.open(stream).convert("RGB")


def _soft(image: Image.Image, seed: int) -> Image.Image:
    small = image.resize((64, 64), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.7))
    noise = np.random.default_rng(seed).normal(0, 10, (64, 64, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


def _moved(image: Image.Image, across: float, down: float) -> Image.Image:
    """By shares of the width and height; what comes in is the mirror image of what is at the edge."""
    pixels = np.asarray(image)
    x, y = round(across * image.width), round(down * image.height)
    padded = np.pad(pixels, ((abs(y), abs(y)), (abs(x), abs(x)), (0, 0)), mode="reflect")
    top, left = abs(y) - y, abs(x) - x
    return Image.fromarray(padded[top : top + image.height, left : left + image.width])


def _magnified(image: Image.Image, factor: float, centre: tuple[float, float]) -> Image.Image:
    width, height = image.width / factor, image.height / factor
    left, top = (image.width - width) * centre[0], (image.height - height) * centre[1]
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def _recoloured(image: Image.Image, turn: float, colour: float, brightness: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.merge("HSV", (hue.point(lambda one: (one + int(turn * 256)) % 256), saturation, value)).convert(
        "RGB"
    )
    return ImageEnhance.Brightness(ImageEnhance.Color(turned).enhance(colour)).enhance(brightness)


def _cut_out(image: Image.Image, background: Image.Image) -> Image.Image:
    """The middle of a picture, where its subject is, before a background."""
    mask = Image.new("L", image.size)
    width, height = image.size
    ImageDraw.Draw(mask).ellipse((0.14 * width, 0.14 * height, 0.86 * width, 0.9 * height), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(width / 40))
    return Image.composite(image, background.resize(image.size, Image.Resampling.BICUBIC), mask)


def redrawn(folder: Path) -> list[Image.Image] | None:
    """A sample subject's figures in their own poses, each before another scene; None for other subjects."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    from make_subjects import PLACES, pictures_of, poses_of
    from world import SUBJECTS

    if folder.parent.name != "subjects" or folder.name not in SUBJECTS:
        return None
    who = SUBJECTS[folder.name]
    pictures = pictures_of(who, 0, poses_of(who, 0, len(PLACES)), [*PLACES[1:], PLACES[0]])
    return [image.resize((256, 256), Image.Resampling.LANCZOS) for image in pictures]


# --- measuring --------------------------------------------------------------------------------------------------------


def square_pictures(folder: Path) -> list[Image.Image]:
    images = [open_image(path).convert("RGB") for path in find_images(str(folder), "subjects")]
    return [ImageOps.fit(image, (256, 256), Image.Resampling.LANCZOS) for image in images]


@torch.no_grad()
def through_autoencoder(pipeline: StableDiffusionXLPipeline, images: Sequence[Image.Image]) -> list[Image.Image]:
    """As well as the base could draw them: encoded and decoded."""
    pixels = pipeline.image_processor.preprocess(list(images))
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded)


def base_pictures(
    pipeline: StableDiffusionXLPipeline, classes: Sequence[str], seeds: Sequence[int] = SEEDS, steps: int = 20
) -> dict[str, list[Image.Image]]:
    """Class -> the base's own pictures of it."""
    options = {"num_inference_steps": steps, "batch_size": 4, "progress": False}
    return {
        name: [one.image for one in generate_images(pipeline, [s.format(name) for s in SCENES], seeds, **options)]
        for name in classes
    }


def held_out(folder: Path) -> list[Image.Image]:
    places = (folder.parent / "heldout" / folder.name, folder.parent.parent / "heldout" / folder.name)
    return next((square_pictures(place) for place in places if place.is_dir()), [])


def twins(images: Sequence[Image.Image]) -> set[int]:
    """Pictures that are so like another one that they are no other picture of the subject, such as two of a burst."""
    detector = CopyDetector(images)
    found = detector.likenesses(images)[..., 0]
    found.fill_diagonal_(0)
    return set((found > SAME).any(dim=1).nonzero().flatten().tolist())


def measure(
    make: Mapping[str, Callable[[Sequence[Image.Image]], Detector]],
    folders: Sequence[Path],
    pipeline: StableDiffusionXLPipeline,
) -> dict[str, Counter[str]]:
    """Candidate -> counts: a column's "name" and, of how many, "name of"."""
    drawn = base_pictures(pipeline, ("robot", "cat", "dog", "teapot"))
    size = drawn["robot"][0].size
    counts: dict[str, Counter[str]] = {name: Counter() for name in make}

    def small(images: Sequence[Image.Image]) -> list[Image.Image]:
        return [image.resize(size, Image.Resampling.LANCZOS) for image in images]

    def count(name: str, column: str, found: Sequence[bool]) -> None:
        counts[name][column] += sum(found)
        counts[name][f"{column} of"] += len(found)

    for folder in folders:
        train, heldout, figures = square_pictures(folder), held_out(folder), redrawn(folder)
        others = [image for name, images in drawn.items() if name != folder.name for image in images]
        kinds: dict[str, list[Image.Image]] = {}
        for number, image in enumerate(train):
            before = figures[number] if figures else _cut_out(image, others[number])
            for kind, copy in copies(image, number, before).items():
                kinds.setdefault(kind, []).append(copy)
        kinds["through the base's autoencoder"] = through_autoencoder(pipeline, small(train))
        alone = twins(train)
        for name, maker in make.items():
            detector: Detector = maker(train)
            if heldout:
                found = detector.copied(small(heldout))
                count(name, "held out", found)
                alarm = sum(found) > len(found) / 2 if maker is Thumbnails else Copies.of(sum(found), len(found)).alarm
                count(name, "alarms of held-out sets", [alarm])
            else:
                for row in set(range(len(train))) - alone:
                    rest = maker([image for place, image in enumerate(train) if place != row])
                    count(name, "held out in turn", rest.copied(small(train[row : row + 1])))
            count(name, "the base's own", detector.copied([*drawn.get(folder.name, ()), *others[::4]]))
            for kind, images in kinds.items():
                count(name, kind, detector.copied(small(images)))
        print(f"{folder}: done", flush=True)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="assets/tiny-sdxl", help="draws pictures of the subjects' classes")
    parser.add_argument("--dino", default="assets/tiny-dino", help="for the patch features")
    parser.add_argument("--subjects", nargs="+", default=["assets/subjects"])
    args = parser.parse_args(argv)
    quiet_libraries()
    folders = [one for place in args.subjects for one in sorted(Path(place).iterdir()) if one.is_dir()]
    folders = [folder for folder in folders if folder.name != "heldout"]
    encoder = ImageEncoder(args.dino, torch.device("cpu"))
    pipeline = load_pipeline(args.base, torch.float32, "cpu")
    make = {"thumbnails": Thumbnails, "patches": lambda instances: Patches(encoder, instances), "parts": CopyDetector}
    counts = measure(make, folders, pipeline)
    columns = [column for column in counts["parts"] if f"{column} of" in counts["parts"]]
    print("| | " + " | ".join(make) + " |\n" + "|---" * (len(make) + 1) + "|")
    for column in columns:
        print(
            f"| {column} | " + " | ".join(f"{own[column]} of {own[column + ' of']}" for own in counts.values()) + " |"
        )


if __name__ == "__main__":
    run_command(main)
