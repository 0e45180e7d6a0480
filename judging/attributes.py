"""Read from a picture of the drawn world what is in it: kind, colours, pattern, accessory, view and place.

In that world fidelity has a ground truth: a subject is a set of attributes, and a small classifier says which of them a
picture shows. What can be asked, and the possible answers, come with the weights (``config.json``).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

SIDE = 64  # pixels: pictures of any size are reduced to this
# Attributes that make a subject; the view and the place are the prompt's.
IDENTITY = ("kind", "main", "second", "eyes", "pattern", "accessory", "accent")


class AttributeReader(nn.Module):
    """One convolutional network with one softmax for each question.

    Args:
        answers: question -> its possible answers.
    """

    def __init__(self, answers: dict[str, list[str]]):
        super().__init__()
        self.answers = answers
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            (3, 24, 1),
            (24, 48, 2),
            (48, 96, 2),
            (96, 96, 1),
            (96, 160, 2),
            (160, 160, 1),
            (160, 160, 2),
        ):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(160 * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({question: nn.Linear(256, len(options)) for question, options in answers.items()})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels (B, 3, 64, 64) in [-1, 1] -> question -> logits (B, answers)."""
        features = self.features(pixels)
        return {question: head(features) for question, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most probable answer to each question, for each picture."""
        found = {question: logits.argmax(-1).tolist() for question, logits in self(to_pixels(images)).items()}
        return [
            {question: self.answers[question][found[question][i]] for question in found} for i in range(len(images))
        ]

    def save(self, directory: Path, facts: dict) -> None:
        """Weights in fp16 and, in ``config.json``, the answers beside ``facts`` about the training."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"answers": self.answers} | facts, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "AttributeReader":
        """
        Raises:
            ValueError: when the directory holds no reader.
        """
        if not (directory / "config.json").exists() or not (directory / "model.safetensors").exists():
            raise ValueError(f"{directory} holds no attribute reader: config.json and model.safetensors are needed")
        reader = cls(json.loads((directory / "config.json").read_text())["answers"])
        reader.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
        return reader.eval()


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of any size -> (B, 3, 64, 64) in [-1, 1]."""
    small = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in small])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def attributes_kept(subject: dict[str, str], reading: dict[str, str]) -> float:
    """The share of the subject's attributes that a picture shows, 0 to 1.

    The accent counts only for a subject that wears something in that colour.
    """
    asked = [question for question in IDENTITY if question in subject]
    if subject.get("accessory", "none") in ("none", "crown"):
        asked = [question for question in asked if question != "accent"]
    if not asked:
        raise ValueError(f"no attribute to look for: the subject needs some of {', '.join(IDENTITY)}")
    return sum(reading[question] == subject[question] for question in asked) / len(asked)


def scene_followed(place: str, reading: dict[str, str]) -> bool:
    """Whether the picture shows the place that the prompt names."""
    return reading["place"] == place
