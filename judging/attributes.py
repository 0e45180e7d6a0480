"""Read from a picture of the drawn world what is in it: kind, colours, pattern, accessory, view and place.

In that world fidelity has a ground truth: a subject is a set of attributes, and a small classifier says which of them a
picture shows. What can be asked, and the possible answers, come with the weights (``config.json``); what the subject
is stands beside its folder (``attributes.json``: name of the folder -> attribute -> answer).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from inference.sampling import GeneratedImage
from judging.statistics import Draws, by_prompt
from storage.files import read_json, write_atomic
from storage.tensors import write_safetensors

SIDE = 64  # pixels: pictures of any size are reduced to this
# Attributes that make a subject; the view and the place are the prompt's.
IDENTITY = ("kind", "main", "second", "eyes", "pattern", "accessory", "accent")


class AttributeReader(nn.Module):
    """One convolutional network with one softmax for each question.

    Args:
        answers: question -> its possible answers.
        places: how a prompt says a place, such as "in the jungle" -> the answer to "place".
    """

    def __init__(self, answers: dict[str, list[str]], places: dict[str, str]) -> None:
        super().__init__()
        self.answers, self.places = answers, places
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
        pixels = to_pixels(np.stack([reduced(image) for image in images]))
        found = {question: logits.argmax(-1).tolist() for question, logits in self(pixels).items()}
        return [
            {question: self.answers[question][found[question][i]] for question in found} for i in range(len(images))
        ]

    def save(self, directory: Path, facts: Mapping[str, object]) -> None:
        """Weights in fp16 and, in ``config.json``, the answers beside ``facts`` about the training."""
        write_safetensors(directory / "model.safetensors", {k: v.half() for k, v in self.state_dict().items()})
        content = {"answers": self.answers, "places": self.places, **facts}
        write_atomic(directory / "config.json", json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> AttributeReader:
        """
        Raises:
            ValueError: when the directory holds no reader.
        """
        try:
            config = read_json(directory / "config.json")
            reader = cls(config["answers"], config["places"])
            reader.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
        except (OSError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{directory} holds no attribute reader (config.json and model.safetensors of "
                f"tools/pretrain_attributes.py): {error}"
            ) from error
        return reader.eval()


def reduced(image: Image.Image) -> np.ndarray:
    """A picture of any size -> (64, 64, 3) uint8."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def asked_place(prompt: str, places: Mapping[str, str]) -> str | None:
    """The place that a prompt names, by the longest of the phrases that are in it; None if it names none."""
    named = [words for words in places if words in prompt]
    return places[max(named, key=len)] if named else None


class SubjectReading:
    """What of one subject, and of the prompts' places, is in pictures.

    Args:
        reader: folder of an `AttributeReader`.
        subject: folder of the subject's pictures; ``attributes.json`` beside it says who that is.

    Raises:
        ValueError: if one of them isn't there, or the subject has an answer that the reader doesn't know.
    """

    def __init__(self, reader: Path, subject: Path) -> None:
        self.reader = AttributeReader.load(reader)
        subject = subject.resolve()
        path = subject.parent / "attributes.json"
        found = read_json(path).get(subject.name) if path.is_file() else None
        if not isinstance(found, dict):
            raise ValueError(
                f"--attributes: {path} doesn't say what {subject.name} is, such as "
                f'{{"{subject.name}": {{"kind": "cat", "main": "teal"}}}}: write it, or leave the flag out'
            )
        self.subject = {question: str(found[question]) for question in IDENTITY if question in found}
        for question, answer in self.subject.items():
            if answer not in (known := self.reader.answers.get(question, [])):
                raise ValueError(f"{path}: {question} is {answer}, and {reader} knows {', '.join(known) or 'none'}")
        attributes_kept(self.subject, self.subject)

    def score(self, drawn: Sequence[GeneratedImage]) -> dict[str, Draws]:
        """ "attributes": the share of the subject's that are there; "scene": 1 where the prompt's place is, else 0."""
        readings = self.reader.read([one.image for one in drawn])
        kept = [attributes_kept(self.subject, reading) for reading in readings]
        scores = {"attributes": by_prompt(drawn, kept)}
        asked = [
            (one, place, reading)
            for one, reading in zip(drawn, readings)
            if (place := asked_place(one.prompt, self.reader.places))
        ]
        if asked:
            followed = [float(reading["place"] == place) for _, place, reading in asked]
            scores["scene"] = by_prompt([one for one, _, _ in asked], followed)
        return scores
