"""Scores of pictures of a subject, by frozen encoders that are loaded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from inference.sampling import GeneratedImage
from judging.attributes import SubjectReading
from judging.copies import Copies, CopyDetector
from judging.prompts import without_identifier
from judging.scores import ClipEncoder, ImageEncoder, diversity, drift, prompt_fidelity, subject_fidelity
from judging.statistics import Draws, by_prompt


class Scorer:
    """The image encoders, and their features of the subject's pictures.

    Args:
        clip, dino: folders or Hub ids.
        reading: what in a picture can be read as the subject's.

    Raises:
        ValueError: if one of them can't be loaded.
    """

    def __init__(
        self,
        clip: str,
        dino: str,
        instances: Sequence[Image.Image],
        device: torch.device,
        reading: SubjectReading | None = None,
    ) -> None:
        self.clip, self.dino = ClipEncoder(clip, device), ImageEncoder(dino, device)
        self.clip_instances, self.dino_instances = self.clip.images(instances), self.dino.images(instances)
        self.instances, self.reading = list(instances), reading
        self._detector: CopyDetector | None = None

    def score(self, drawn: Sequence[GeneratedImage]) -> dict[str, Draws]:
        """Each picture's scores of the subject, by name of the score; diversity is one value a prompt."""
        images = [one.image for one in drawn]
        clip, dino = self.clip.images(images), self.dino.images(images)
        texts = self.clip.texts([without_identifier(one.prompt) for one in drawn])
        rows: dict[str, list[int]] = {}
        for row, one in enumerate(drawn):
            rows.setdefault(one.prompt, []).append(row)
        scores = {
            "dino": by_prompt(drawn, subject_fidelity(dino, self.dino_instances).tolist()),
            "clip_i": by_prompt(drawn, subject_fidelity(clip, self.clip_instances).tolist()),
            "clip_t": by_prompt(drawn, prompt_fidelity(clip, texts).tolist()),
        }
        several = {prompt: own for prompt, own in rows.items() if len(own) > 1}
        if several:
            scores["diversity"] = {prompt: {0: diversity(dino[own])} for prompt, own in several.items()}
        return scores | (self.reading.score(drawn) if self.reading else {})

    def copies(self, drawn: Sequence[GeneratedImage]) -> Copies:
        """How many of the pictures are copies of the subject's own."""
        if self._detector is None:  # calibrated once, by the subject's own pictures
            self._detector = CopyDetector(self.instances)
        return self._detector.count([one.image for one in drawn])

    def features(self, drawn: Sequence[GeneratedImage]) -> torch.Tensor:
        """(N, D) features that drift is measured between."""
        return self.dino.images([one.image for one in drawn])

    def drift(self, adapted: Sequence[GeneratedImage], base: torch.Tensor) -> Draws:
        """Of pictures with the adapter from those without, of the same prompts and seeds in the same order.

        Args:
            base: `features` of those without.
        """
        return by_prompt(adapted, drift(self.features(adapted), base).tolist())
