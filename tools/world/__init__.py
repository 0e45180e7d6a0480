"""A drawn world: parametric figures in scenes, with captions that name some of what is seen and leave the rest open.

Own drawings, under the licence of this repository. Every picture is a function of (seed, index) alone: a pool of them
is the same on every machine and after every restart.
"""

import io
from dataclasses import dataclass

import numpy as np
import resvg_py
from PIL import Image

from .attributes import (
    ACCESSORIES,
    COLORS,
    KINDS,
    PATTERNS,
    SUBJECTS,
    VIEWS,
    Pose,
    Who,
    draw_known_who,
    draw_new_subject,
    draw_pose,
    draw_who,
    kept_out,
    views_of,
)
from .figures import figure_svg
from .scenes import PLACES, SCENES, draw_place, scene_svg

SIZE = 128  # pixels of a side

__all__ = [
    "ACCESSORIES",
    "COLORS",
    "KINDS",
    "PATTERNS",
    "PLACES",
    "SCENES",
    "SIZE",
    "SUBJECTS",
    "VIEWS",
    "Picture",
    "Pose",
    "Who",
    "caption",
    "draw",
    "draw_known_who",
    "draw_new_subject",
    "draw_place",
    "draw_pose",
    "draw_who",
    "kept_out",
    "place_words",
    "sample",
    "views_of",
]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def place_words(place: str) -> str:
    return SCENES.get(place) or f"on {with_article(place)} background"


def draw(who: Who, pose: Pose, place: str, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """The picture, RGB, ``size`` x ``size``; ``rng`` draws the details of the scene."""
    inside = scene_svg(place, rng) + figure_svg(who, pose)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{inside}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGB")


def caption(who: Who, pose: Pose, place: str, rng: np.random.Generator) -> str:
    """The kind always; a colour in 30 %, the pattern in 15 %, the accessory in half of its cases, a place in 92 %.

    In 25 % a meaningless word stands where an identifier would, so that an unknown ``[V]`` is as neutral to this base
    as a rare token is to SDXL.
    """
    noun = who.kind
    if rng.random() < 0.3:
        noun = f"{who.main} {noun}"
    if who.pattern != "plain" and rng.random() < 0.15:
        noun = f"{ {'stripes': 'striped', 'spots': 'spotted', 'patch': 'patched'}[who.pattern] } {noun}"
    if rng.random() < 0.25:
        letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(1, 4)))
        word = f"[{letters}]" if rng.random() < 0.6 else letters
        text = f"a photo of {word} {noun}" if rng.random() < 0.5 else f"{word} photo of {with_article(noun)}"
    elif rng.random() < 0.15:
        text = with_article(noun)
    else:
        text = f"a photo of {with_article(noun)}"
    if who.accessory != "none" and rng.random() < 0.5:
        worn = f"{who.accent} {who.accessory}" if rng.random() < 0.5 and who.accessory != "crown" else who.accessory
        text += f" wearing a {worn}" if worn[0] != "o" else f" wearing an {worn}"
    if who.kind in ("cat", "dog", "rabbit", "bear", "fox") and rng.random() < 0.12:
        text += {"sitting": " sitting", "portrait": " looking at the viewer", "standing": " standing"}[pose.view]
    # Without a place the background is whatever it happens to be, as in captions found in the wild.
    return text if rng.random() < 0.08 else f"{text} {place_words(place)}"


@dataclass(frozen=True)
class Picture:
    """One picture of the world with all that is known about it."""

    image: Image.Image
    caption: str
    who: Who
    pose: Pose
    place: str


def sample(seed: int, index: int, size: int = SIZE) -> Picture:
    """Picture number ``index`` of the pool that ``seed`` names; never one of a setting that is kept out."""
    rng = np.random.default_rng((seed, index))
    who = draw_known_who(rng)
    pose, place = draw_pose(rng, who.kind), draw_place(rng, who.main)
    text = caption(who, pose, place, rng)
    return Picture(draw(who, pose, place, rng, size), text, who, pose, place)
