"""How well pictures show a subject and follow their prompts: the field's scores, on features of frozen encoders.

All features have unit length, so that a product is a cosine. DINO and CLIP-I are those of DreamBooth (arXiv 2208.12242,
section 4.2): the mean cosine between a picture and every picture of the subject. CLIP-T is the cosine between a picture
and its prompt. Drift is that of PEFT's image-generation benchmark: (1 - cosine) / 2 between pictures of one prompt and
seed with the adapter and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from storage.text import first_line

BATCH_SIZE = 32


class ImageEncoder:
    """An image model of transformers, such as DINO or DINOv2: pictures -> the class token's features.

    Args:
        path: folder or Hub id.
        flag: what messages call it.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(self, path: str, device: torch.device, flag: str = "--dino") -> None:
        self.device = device
        try:
            self.processor = AutoImageProcessor.from_pretrained(path)
            self.model = AutoModel.from_pretrained(path, use_safetensors=True).to(device).eval()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            where = "" if Path(path).exists() else ", which is no folder here either,"
            reason = first_line(error)
            raise ValueError(f"{flag} {path}{where} could not be loaded: {reason}") from error

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (N, D), fp32, of unit length.

        Pictures are encoded in batches of a fixed size, so that a score can be had again to the last bit.
        """
        features = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [image.convert("RGB") for image in images[start : start + BATCH_SIZE]]
            pixels = self.processor(images=batch, return_tensors="pt").pixel_values.to(self.device)
            features.append(self._features(pixels).float().cpu())
        return torch.nn.functional.normalize(torch.cat(features), dim=-1)

    def _features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if hasattr(self.model, "get_image_features"):  # CLIP and its relatives: the tower for images
            return self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return self.model(pixel_values=pixel_values).last_hidden_state[:, 0]


class ClipEncoder(ImageEncoder):
    """A CLIP: pictures and prompts -> features in one space.

    Raises:
        ValueError: if there is no such model, or if it is no CLIP.
    """

    def __init__(self, path: str, device: torch.device, flag: str = "--clip") -> None:
        super().__init__(path, device, flag)
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{flag} {path} is a {type(self.model).__name__}, which reads no prompts: name a CLIP")
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features (N, D), fp32, of unit length; a prompt is cut where the model's text ends."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        features = self.model.get_text_features(**tokens).pooler_output.float().cpu()
        return torch.nn.functional.normalize(features, dim=-1)


# --- scores -----------------------------------------------------------------------------------------------------------


def subject_fidelity(images: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
    """(N,) mean cosine of each picture with every instance image; images (N, D), instances (M, D)."""
    return (images @ instances.T).mean(dim=1)


def prompt_fidelity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(N,) cosine of each picture with its own prompt; both (N, D)."""
    return (images * texts).sum(dim=1)


def drift(adapted: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """(N,) (1 - cosine) / 2 between each picture and the base's of the same prompt and seed; both (N, D)."""
    return ((1 - (adapted * base).sum(dim=1)) / 2).clamp(min=0)  # rounding takes a cosine past 1


def diversity(images: torch.Tensor) -> float:
    """Mean of 1 - cosine over the pairs of different pictures of one prompt; images (N, D), N >= 2."""
    count = len(images)
    cosines = images @ images.T
    return max(0.0, float(1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))))


class Memorisation(NamedTuple):
    """How close pictures come to the training images, which the prompts did not ask for."""

    nearest: float  # median over the pictures: cosine with the training image that each is nearest to
    between_instances: float  # the same among the training images themselves
    share: float  # of the pictures, those nearer to a training image than training images are to each other
    alarm: bool


THUMBNAIL = 16
SAME = 0.99  # cosine from which two training images are one that is there twice
# What stands in where a lone training image has no other to be compared with; a choice, not a measurement.
LONE_REFERENCE = 0.8


def memorisation(images: Sequence[Image.Image], instances: Sequence[Image.Image]) -> Memorisation:
    """Alarm where more than half of the pictures are nearer to a training image than these are to each other.

    What is compared is the whole picture in small, background included: an adapter that draws the subject elsewhere
    changes most of it, one that has learned the pictures by heart does not. A training image is what can be trained on
    of it: crops of the picture's shape, and their mirror images.
    """
    closest, reference = torch.empty(2, len(images), dtype=torch.float64)
    for size in {image.size for image in images}:
        rows = [row for row, image in enumerate(images) if image.size == size]
        views = _views(instances, size)
        copies = thumbnails([images[row] for row in rows], size)
        closest[rows] = _nearest(copies, views).max(dim=1).values
        reference[rows] = _between(views)
    share = float((closest > reference).double().mean())
    return Memorisation(float(closest.median()), float(reference.median()), share, share > 0.5)


def _views(instances: Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
    """(M, 6, D) thumbnails of what training sees of each: crops at the centre and both ends, and mirror images."""
    mirrored = [ImageOps.mirror(image) for image in instances]
    crops = [thumbnails(side, size, place) for place in (0.5, 0, 1) for side in (instances, mirrored)]
    return torch.stack(crops, dim=1)


def _nearest(images: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
    """(N, M) cosine of each picture with the nearest view of each training image; (N, D) and (M, V, D)."""
    return torch.einsum("nd,mvd->nmv", images, views).max(dim=2).values


def _between(views: torch.Tensor) -> float:
    """Median over the training images: cosine with the nearest other one; one that is there twice counts once."""
    between = _nearest(views[:, 0], views)
    kept: list[int] = []
    for row in range(len(between)):
        if not (between[row, kept] > SAME).any():
            kept.append(row)
    if len(kept) < 2:
        return LONE_REFERENCE
    return float(between[kept][:, kept].fill_diagonal_(-1).max(dim=1).values.median())


def thumbnails(images: Sequence[Image.Image], size: tuple[int, int], place: float = 0.5) -> torch.Tensor:
    """(N, 3 · 16 · 16) colours of each picture in small, without their mean, of unit length.

    Args:
        size: width and height whose shape the pictures are cropped to.
        place: of the crop, from 0 (left or upper end) to 1.
    """
    rows = []
    for image in images:
        factor = min(image.width / size[0], image.height / size[1])
        width, height = min(size[0] * factor, image.width), min(size[1] * factor, image.height)
        left, top = (image.width - width) * place, (image.height - height) * place
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, box)
        colours = np.asarray(small, dtype=np.float64).reshape(-1, 3)
        rows.append((colours - colours.mean(axis=0)).ravel())
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)), dim=-1)
