"""How well pictures show a subject and follow their prompts: the field's scores, on features of frozen encoders.

All features have unit length, so that a product is a cosine. DINO and CLIP-I are those of DreamBooth (arXiv 2208.12242,
section 4.2): the mean cosine between a picture and every picture of the subject. CLIP-T is the cosine between a picture
and its prompt. Drift is that of PEFT's image-generation benchmark: (1 - cosine) / 2 between pictures of one prompt and
seed with the adapter and without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from inference.base import unloadable

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
            raise unloadable(flag, path, error) from error

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
