"""The drawn world as the pretraining tools read it: numbered pictures with captions, and words for the tokenizer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import KINDS, SCENES, SIZE, draw, draw_known_who, draw_place, draw_pose, sample

PROMPTS = Path(__file__).resolve().parents[2] / "judging" / "protocols"


def rotate_hue(image: Image.Image, shift: int) -> Image.Image:
    """The RGB picture with all hues turned by ``shift`` of 256."""
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")


@dataclass
class DrawnWorld:
    """Pictures of ``size`` x ``size`` pixels; the autoencoder halves them three times, to 16 x 16 latents."""

    size: int = SIZE
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)
    latent_channels: int = 8

    def sample(self, seed: int, index: int) -> tuple[Image.Image, str]:
        """Picture and caption number ``index`` of the pool that ``seed`` names."""
        picture = sample(seed, index, self.size)
        return picture.image, picture.caption

    def any_picture(self, seed: int, index: int) -> Image.Image:
        """A picture for the autoencoder: every fourth in other hues: a user's subject has its own colours."""
        image = sample(seed + 1000, index, self.size).image
        return image if index % 4 else rotate_hue(image, int(np.random.default_rng((seed, index, 1)).integers(256)))

    def twins(self, seed: int, index: int) -> list[Image.Image]:
        """Two pictures of one setting of "who", in two poses and places."""
        rng = np.random.default_rng((seed, index, 3))
        who = draw_known_who(rng)
        return [draw(who, draw_pose(rng, who.kind), draw_place(rng, who.main), rng, self.size) for _ in range(2)]

    def other_words(self) -> list[str]:
        """Prompts of the protocols: words that the tokenizer shall know beside the captions'."""
        lines = [line for path in sorted(PROMPTS.glob("*.yaml")) for line in path.read_text().splitlines()]
        # often enough for the BPE to keep whole words
        return [line.strip(" -").replace("{}", "") for line in lines if "{}" in line and "#" not in line] * 4

    def facts(self) -> dict:
        """What training.json says about the pictures."""
        return {"concepts": list(KINDS), "scenes": list(SCENES.values()), "artwork": "tools/world: own drawings"}
