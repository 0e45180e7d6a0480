"""Scores of pictures of a subject, by frozen encoders that are loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from inference.sampling import GeneratedImage
from judging.prompts import without_identifier
from judging.scores import (
    ClipEncoder,
    ImageEncoder,
    diversity,
    drift,
    memorisation,
    prompt_fidelity,
    subject_fidelity,
)
from judging.statistics import Spread, spread


class Scorer:
    """The image encoders, and their features of the subject's pictures.

    Args:
        clip, dino: folders or Hub ids.

    Raises:
        ValueError: if one of them can't be loaded.
    """

    def __init__(self, clip: str, dino: str, instances: Sequence[Image.Image], device: torch.device) -> None:
        self.clip, self.dino = ClipEncoder(clip, device), ImageEncoder(dino, device)
        self.instances = list(instances)
        self.clip_instances, self.dino_instances = self.clip.images(instances), self.dino.images(instances)

    def score(self, drawn: Sequence[GeneratedImage]) -> dict[str, Any]:
        """Scores of pictures of the subject: name of the score -> its spread, and "memorisation" -> its figures."""
        images = [one.image for one in drawn]
        clip, dino = self.clip.images(images), self.dino.images(images)
        texts = self.clip.texts([without_identifier(one.prompt) for one in drawn])
        by_prompt: dict[str, list[int]] = {}
        for row, one in enumerate(drawn):
            by_prompt.setdefault(one.prompt, []).append(row)
        scores = {
            "dino": spread_by_seed(drawn, subject_fidelity(dino, self.dino_instances)),
            "clip_i": spread_by_seed(drawn, subject_fidelity(clip, self.clip_instances)),
            "clip_t": spread_by_seed(drawn, prompt_fidelity(clip, texts)),
        }
        several = [rows for rows in by_prompt.values() if len(rows) > 1]
        if several:
            # its spread is between prompts
            scores["diversity"] = spread({prompt: [diversity(dino[rows])] for prompt, rows in enumerate(several)})
        scores["memorisation"] = memorisation(images, self.instances)
        return scores

    def features(self, drawn: Sequence[GeneratedImage]) -> torch.Tensor:
        """(N, D) features that drift is measured between."""
        return self.dino.images([one.image for one in drawn])

    def drift(self, adapted: Sequence[GeneratedImage], base: torch.Tensor) -> Spread:
        """Of pictures with the adapter from those without, of the same prompts and seeds in the same order.

        Args:
            base: `features` of those without.
        """
        return spread_by_seed(adapted, drift(self.features(adapted), base))


def spread_by_seed(drawn: Sequence[GeneratedImage], values: torch.Tensor) -> Spread:
    """Values (N,), one a picture, as mean and spread over the pictures' seeds."""
    scores: dict[int, list[float]] = {}
    for one, value in zip(drawn, values.tolist()):
        scores.setdefault(one.seed, []).append(value)
    return spread(scores)
