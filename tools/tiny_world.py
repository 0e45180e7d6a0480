"""The captioned pictures that the embedded base is pretrained on: emoji artwork over plain and scenic backgrounds.

Every picture is a function of (seed, index) alone: a pool of them is the same on every machine and after every restart.

Artwork (SVG, rasterised with resvg): Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, CC BY 4.0) and
Fluent Emoji flat (Microsoft, MIT), as packed by Iconify in the npm packages named in ``STYLES``.
"""

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFilter, ImageOps

# npm package -> (words of the caption that name the style, share of the pictures)
STYLES = {
    "@iconify-json/noto@1.2.9": ("photo", 0.7),
    "@iconify-json/fluent-emoji-flat@1.2.6": ("flat drawing", 0.15),
    "@iconify-json/twemoji@1.2.5": ("sticker", 0.15),
}

NAMES = """
    cat cat-face black-cat dog dog-face poodle fox wolf rabbit rabbit-face bear panda koala tiger tiger-face
    lion horse horse-face cow cow-face pig pig-face monkey monkey-face elephant mouse hamster frog turtle snake
    crocodile penguin chicken rooster hatching-chick owl duck eagle parrot flamingo swan peacock whale dolphin
    tropical-fish octopus crab butterfly snail lady-beetle honeybee dragon unicorn t-rex sauropod giraffe zebra
    camel kangaroo sloth hedgehog bat deer goat ram spider shark robot teapot backpack alien ghost snowman
    hamburger pizza doughnut cupcake birthday-cake ice-cream hot-beverage watermelon strawberry banana red-apple
    pineapple avocado carrot mushroom cactus sunflower rose deciduous-tree palm-tree automobile bus locomotive
    airplane rocket sailboat bicycle motor-scooter house castle guitar trumpet drum soccer-ball basketball
    umbrella crown top-hat running-shoe handbag books gem-stone light-bulb key alarm-clock wrapped-gift balloon
    teddy-bear crystal-ball
""".split()  # noqa: SIM905 -- a list of 128 quoted words is harder to read

# Icon key -> class name in the caption. Only keys that all three sets draw.
CONCEPTS = {name: name.replace("-", " ") for name in NAMES} | {
    "honeybee": "bee",
    "lady-beetle": "ladybug",
    "red-apple": "apple",
    "hot-beverage": "cup of coffee",
    "deciduous-tree": "tree",
    "automobile": "car",
    "locomotive": "train",
    "running-shoe": "shoe",
    "top-hat": "hat",
    "soccer-ball": "football",
}
# The classes of the sample subjects and of usual prompts are drawn this many times as often as the others.
FREQUENT = {"cat": 10, "dog": 8, "robot": 8, "teapot": 6, "backpack": 4, "fox": 4, "rabbit": 4, "hamburger": 3}

COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (246, 210, 70),
    "green": (70, 170, 80),
    "teal": (30, 150, 150),
    "blue": (45, 95, 210),
    "purple": (130, 70, 190),
    "pink": (240, 150, 185),
    "brown": (135, 90, 60),
    "gray": (145, 148, 152),
    "white": (245, 245, 245),
    "black": (25, 25, 28),
}


def fetch_artwork(cache: Path) -> dict[str, dict]:
    """The icon sets by npm package: ``npm pack`` downloads each tarball into ``cache`` once."""
    cache.mkdir(parents=True, exist_ok=True)
    sets = {}
    for package in STYLES:
        name, version = package[1:].rsplit("@", 1)
        tarball = cache / f"{name.replace('/', '-')}-{version}.tgz"
        if not tarball.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(tarball) as archive:
            sets[package] = json.load(archive.extractfile("package/icons.json"))
    return sets


def rasterise(icon_set: dict, name: str, size: int) -> Image.Image:
    """One icon as an RGBA image of ``size`` x ``size`` pixels."""
    icon = icon_set["icons"][name]
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {namespaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def tint(drawing: Image.Image, color: tuple[int, int, int], strength: float = 0.8) -> Image.Image:
    """The RGBA drawing in shades of one colour, with a little of its own left."""
    shades = ImageOps.colorize(drawing.convert("L"), (20, 20, 24), (250, 250, 250), mid=color, midpoint=150)
    tinted = Image.blend(drawing.convert("RGB"), shades, strength)
    tinted.putalpha(drawing.getchannel("A"))
    return tinted


def rotate_hue(drawing: Image.Image, shift: int) -> Image.Image:
    """The RGBA drawing with all hues turned by ``shift`` of 256."""
    hue, saturation, value = drawing.convert("RGB").convert("HSV").split()
    hue = hue.point(lambda h: (h + shift) % 256)
    rotated = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    rotated.putalpha(drawing.getchannel("A"))
    return rotated


def _vertical_gradient(size: int, top, bottom) -> Image.Image:
    ramp = np.linspace(0, 1, size)[:, None, None]
    rows = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))


def draw_background(kind: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """A plain colour or a procedural scene, RGB, ``size`` x ``size``; drawn at twice the size and reduced."""
    n = 2 * size
    if kind in COLORS:
        color = np.clip(np.array(COLORS[kind]) + rng.integers(-12, 13, 3), 0, 255)
        return Image.new("RGB", (size, size), tuple(int(c) for c in color))
    horizon = int(n * rng.uniform(0.48, 0.68))
    if kind == "beach":
        image = _vertical_gradient(n, (110, 190, 240), (190, 228, 250))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, horizon - n // 8, n, horizon), fill=(35, 130, 195))
        draw.rectangle((0, horizon, n, n), fill=(236, 210, 150))
        x = rng.integers(0, n)
        draw.ellipse((x - 9, 6, x + 9, 24), fill=(255, 235, 120))
        for _ in range(14):
            x, y = rng.integers(0, n), rng.integers(horizon + 4, n)
            draw.ellipse((x, y, x + 4, y + 2), fill=(214, 184, 122))
    elif kind == "snow":
        image = _vertical_gradient(n, (165, 195, 225), (215, 228, 242))
        draw = ImageDraw.Draw(image)
        for _ in range(3):
            x, h = rng.integers(0, n), rng.integers(n // 5, n // 2)
            draw.polygon([(x - h, horizon), (x, horizon - h), (x + h, horizon)], fill=(130, 155, 190))
            draw.polygon(
                [(x - h // 3, horizon - 2 * h // 3), (x, horizon - h), (x + h // 3, horizon - 2 * h // 3)],
                fill=(250, 252, 255),
            )
        draw.rectangle((0, horizon, n, n), fill=(246, 250, 255))
        for _ in range(22):
            x, y = rng.integers(0, n, 2)
            draw.ellipse((x, y, x + 3, y + 3), fill=(255, 255, 255))
    elif kind == "grass":
        image = _vertical_gradient(n, (120, 195, 245), (195, 230, 250))
        draw = ImageDraw.Draw(image)
        for _ in range(2):
            x, y = rng.integers(0, n), rng.integers(6, n // 4)
            draw.ellipse((x - 16, y - 5, x + 16, y + 5), fill=(250, 252, 255))
        draw.rectangle((0, horizon, n, n), fill=(96, 178, 70))
        for _ in range(40):
            x, y = rng.integers(0, n), rng.integers(horizon, n)
            draw.line((x, y, x + 1, y - 6), fill=(70, 150, 55), width=2)
    elif kind == "night":
        image = _vertical_gradient(n, (12, 14, 52), (38, 36, 96))
        draw = ImageDraw.Draw(image)
        for _ in range(26):
            x, y = rng.integers(0, n, 2)
            r = rng.integers(1, 3)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=(250, 246, 205))
        x = rng.integers(12, n - 12)
        draw.ellipse((x - 11, 5, x + 11, 27), fill=(248, 240, 190))
    elif kind == "jungle":
        image = _vertical_gradient(n, (58, 130, 62), (18, 66, 34))
        draw = ImageDraw.Draw(image)
        for _ in range(5):
            x = rng.integers(0, n)
            draw.rectangle((x, 0, x + rng.integers(4, 9), n), fill=(84, 62, 40))
        for _ in range(46):
            x, y = rng.integers(-8, n, 2)
            w, h = rng.integers(10, 30), rng.integers(6, 16)
            shade = rng.integers(70, 175)
            draw.ellipse((x, y, x + w, y + h), fill=(shade // 3, int(shade), shade // 3 + 12))
    elif kind == "desert":
        image = _vertical_gradient(n, (250, 190, 110), (253, 226, 170))
        draw = ImageDraw.Draw(image)
        draw.ellipse((n * 0.7, 8, n * 0.7 + 22, 30), fill=(255, 246, 190))
        draw.rectangle((0, horizon, n, n), fill=(214, 142, 74))
        for _ in range(3):
            x, w = rng.integers(0, n), rng.integers(n // 3, n)
            draw.ellipse((x - w, horizon - n // 10, x + w, horizon + n // 3), fill=(226, 158, 88))
        draw.rectangle((0, horizon + n // 4, n, n), fill=(204, 130, 66))
    else:
        raise ValueError(f"unknown background {kind!r}")
    image = image.filter(ImageFilter.GaussianBlur(0.8))
    return image.resize((size, size), Image.LANCZOS)


SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "jungle": "in the jungle",
    "desert": "in the desert",
}


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def caption(name: str, style: str, background: str, rng: np.random.Generator) -> str:
    """A caption in one of a few word orders; now and then with a meaningless word where an identifier would stand.

    The meaningless words make an unknown ``[V]`` as neutral to this base as a rare token is to SDXL.
    """
    place = SCENES.get(background, f"on {with_article(background)} background")
    identifier = ""
    if rng.random() < 0.2:
        letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(1, 4)))
        identifier = f"[{letters}] " if rng.random() < 0.6 else f"{letters} "
    form = rng.random()
    if identifier:
        text = f"a {style} of {identifier}{name}" if form < 0.5 else f"{identifier}{style} of {with_article(name)}"
    elif style == "photo" and form < 0.2:
        text = with_article(name)
    else:
        text = f"a {style} of {with_article(name)}"
    # Without a place the background is whatever it happens to be, as in captions found in the wild.
    return text if rng.random() < 0.08 else f"{text} {place}"


@dataclass
class TinyWorld:
    """All drawings at ``size`` pixels, and the pictures composed of them.

    Args:
        cache: folder for the npm tarballs.
        size: side of a picture in pixels.
    """

    cache: Path
    size: int = 64
    vae_channels: tuple[int, ...] = (32, 32, 64)
    latent_channels: int = 4

    @cached_property
    def icon_sets(self) -> dict[str, dict]:
        return fetch_artwork(self.cache)

    def other_words(self) -> list[str]:
        """Names of all icons: words that the tokenizer shall know beside the captions'."""
        return [name.replace("-", " ") for icons in self.icon_sets.values() for name in sorted(icons["icons"])]

    def facts(self) -> dict:
        """What training.json says about the pictures."""
        artwork = {package: style for package, (style, _) in STYLES.items()}
        return {"concepts": list(CONCEPTS.values()), "scenes": list(SCENES.values()), "artwork": artwork}

    @cached_property
    def drawings(self) -> dict[tuple[str, str], Image.Image]:
        """(style, concept key) -> RGBA drawing at twice the picture size."""
        return {
            (style, name): rasterise(self.icon_sets[package], name, 2 * self.size)
            for package, (style, _) in STYLES.items()
            for name in CONCEPTS
            if name in self.icon_sets[package]["icons"]
        }

    @cached_property
    def other_drawings(self) -> list[Image.Image]:
        """Drawings of everything else in the sets: the autoencoder has to know more of the world than the UNet."""
        unwanted = ("skin-tone", "flag", "keycap", "button", "clock", "family", "couple", "people", "men-", "women-")
        images = []
        for package in STYLES:
            names = sorted(self.icon_sets[package]["icons"])
            names = [n for n in names if n not in CONCEPTS and not any(u in n for u in unwanted)]
            images += [rasterise(self.icon_sets[package], n, 2 * self.size) for n in names[::4]]
        return images

    def compose(self, drawing: Image.Image, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The drawing at 70-98 % of the side, at a random place, mirrored half of the time, over ``image``."""
        side = int(self.size * rng.uniform(0.70, 0.98))
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.FLIP_LEFT_RIGHT)
        drawing = drawing.resize((side, side), Image.LANCZOS)
        x, y = rng.integers(0, self.size - side + 1, 2)
        image.paste(drawing, (int(x), int(y)), drawing)
        return image

    @staticmethod
    def draw_background_name(rng: np.random.Generator) -> str:
        return str(rng.choice(list(SCENES)) if rng.random() < 0.6 else rng.choice(list(COLORS)))

    @cached_property
    def _choices(self):
        keys = sorted(self.drawings)
        share = dict(STYLES.values())
        weights = np.array([share[style] * FREQUENT.get(name, 1) for style, name in keys])
        return keys, weights / weights.sum()

    def sample(self, seed: int, index: int) -> tuple[Image.Image, str]:
        """Picture and caption number ``index`` of the pool that ``seed`` names."""
        rng = np.random.default_rng((seed, index))
        keys, weights = self._choices
        style, name = keys[rng.choice(len(keys), p=weights)]
        background = self.draw_background_name(rng)
        drawing, noun = self.drawings[style, name], CONCEPTS[name]
        if rng.random() < 0.2:
            color = str(rng.choice(list(COLORS)))
            drawing, noun = tint(drawing, COLORS[color]), f"{color} {noun}"
        image = self.compose(drawing, draw_background(background, rng, self.size), rng)
        return image, caption(noun, style, background, rng)

    def any_picture(self, seed: int, index: int) -> Image.Image:
        """A picture for the autoencoder: every second one shows what the UNet never sees.

        Any drawing of the sets, in any hue, half of them before any two colours: a user's subject has its own colours.
        """
        rng = np.random.default_rng((seed, index, 1))
        if index % 2:
            return self.sample(seed, index)[0]
        drawing = self.other_drawings[rng.integers(len(self.other_drawings))]
        drawing = rotate_hue(drawing, int(rng.integers(256)))
        if rng.random() < 0.5:
            return self.compose(drawing, draw_background(self.draw_background_name(rng), rng, self.size), rng)
        return self.compose(drawing, _vertical_gradient(self.size, *rng.integers(0, 256, (2, 3))), rng)
