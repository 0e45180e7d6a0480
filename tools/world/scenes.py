"""The places of the drawn world as SVG on a canvas of 100 x 100."""

import numpy as np

from .attributes import COLORS

# Place -> its words in a caption.
SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "jungle": "in the jungle",
    "desert": "in the desert",
}
PLACES = (*SCENES, *COLORS)


def hex_color(rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(int(min(255, max(0, c))) for c in rgb))


def circle(x: float, y: float, r: float, fill: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{fill}"/>'


def oval(x: float, y: float, rx: float, ry: float, fill: str) -> str:
    return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}"/>'


def band(top: float, bottom: float, fill: str) -> str:
    return f'<rect x="-1" y="{top:.1f}" width="102" height="{bottom - top:.1f}" fill="{fill}"/>'


def sky(top: str, bottom: str) -> str:
    stops = f'<stop offset="0" stop-color="{top}"/><stop offset="1" stop-color="{bottom}"/>'
    gradient = f'<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient>'
    return f"<defs>{gradient}</defs>" + band(-1, 101, "url(#sky)")


def polygon(points, fill: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}"/>'


def cloud(x: float, y: float) -> str:
    white = "#fbfdff"
    return oval(x, y, 11, 3.6, white) + circle(x - 3, y - 2.5, 4, white) + circle(x + 3.5, y - 2, 3.2, white)


def beach(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#6ec0f0", "#c8e8fa") + circle(rng.uniform(8, 92), 11, 6.5, "#ffeb78")
    svg += band(horizon - 9, horizon, "#2382c3") + band(horizon - 3, horizon - 1.4, "#6fb7e2")
    svg += band(horizon, 101, "#edd398")
    spots = rng.uniform((0, horizon + 3), (100, 99), (9, 2))
    return svg + "".join(oval(x, y, 1.5, 0.8, "#d2b478") for x, y in spots)


def snow(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#9fbfe2", "#dbe7f4")
    for x, h in zip(rng.uniform(0, 100, 3), rng.uniform(22, 42, 3)):
        peak = (x, horizon - h)
        svg += polygon([(x - h, horizon), peak, (x + h, horizon)], "#8099bd")
        svg += polygon([(x - h / 3, horizon - h * 2 / 3), peak, (x + h / 3, horizon - h * 2 / 3)], "#fbfdff")
    svg += band(horizon, 101, "#f5f9ff")
    return svg + "".join(circle(x, y, 1.3, "#ffffff") for x, y in rng.uniform(0, 100, (16, 2)))


def grass(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#74c2f4", "#c8e8fb") + cloud(rng.uniform(8, 44), rng.uniform(8, 18))
    svg += cloud(rng.uniform(56, 92), rng.uniform(8, 18))
    svg += oval(rng.uniform(10, 90), horizon + 6, 45, 14, "#7cc35c") + band(horizon, 101, "#60b246")
    for x, y in rng.uniform((0, horizon + 4), (100, 98), (14, 2)):
        svg += f'<path d="M{x:.1f},{y:.1f} l1.2,-5 l1.2,5 Z" fill="#45912f"/>'
    flowers = rng.uniform((0, horizon + 6), (100, 98), (4, 2))
    return svg + "".join(circle(x, y, 1.5, "#fff3a8") for x, y in flowers)


def night(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#0c0e34", "#2c2a66")
    svg += "".join(circle(x, y, r, "#faf6cd") for x, y, r in rng.uniform((0, 0, 0.5), (100, 85, 1.2), (22, 3)))
    moon = rng.uniform(12, 88)
    svg += circle(moon, 13, 7.5, "#f8f0be")
    svg += circle(moon - 3, 11.5, 1.6, "#e2d89c") + circle(moon + 2.5, 15, 1.2, "#e2d89c")
    return svg + oval(rng.uniform(20, 80), 104, 80, 22, "#1a1946")


def jungle(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#3c8c42", "#154a26")
    for x, w in rng.uniform((0, 4), (100, 8), (4, 2)):
        svg += f'<rect x="{x:.1f}" y="0" width="{w:.1f}" height="100" fill="#5c422a"/>'
    for x, y, rx, ry, light in rng.uniform((-4, -2, 6, 3, 0), (104, 102, 13, 6, 1), (30, 5)):
        svg += oval(x, y, rx, ry, hex_color((24 + 40 * light, 82 + 92 * light, 34 + 34 * light)))
    return svg


def desert(rng: np.random.Generator, horizon: float) -> str:
    svg = sky("#f8b45e", "#fde4ae") + circle(rng.uniform(10, 90), 13, 7.5, "#fff7c6")
    svg += oval(rng.uniform(0, 100), horizon + 12, 60, 20, "#e6a560") + band(horizon + 4, 101, "#d68e4a")
    svg += oval(rng.uniform(0, 100), 103, 70, 17, "#c87e3c")
    x, y = rng.choice([rng.uniform(4, 16), rng.uniform(84, 96)]), horizon + 8
    stem = f"M{x:.1f},{y:.1f} v-24 M{x:.1f},{y - 8:.1f} h-6 v-8 M{x:.1f},{y - 6:.1f} h6 v-11"
    return svg + f'<path d="{stem}" fill="none" stroke="#4d8a3c" stroke-width="4" stroke-linecap="round"/>'


def draw_place(rng: np.random.Generator, other_than: str = "") -> str:
    """A scene in 65 % of the pictures, else a plain colour ``other_than`` the figure's."""
    if rng.random() < 0.65:
        return str(rng.choice(list(SCENES)))
    return str(rng.choice([color for color in COLORS if color != other_than]))


def scene_svg(place: str, rng: np.random.Generator) -> str:
    """The background of one picture.

    Raises:
        ValueError: for a place that is neither a scene nor a colour.
    """
    if place in COLORS:
        return band(-1, 101, hex_color(np.array(COLORS[place]) + rng.integers(-10, 11, 3)))
    if place not in SCENES:
        raise ValueError(f"unknown place {place!r}: one of {', '.join(PLACES)}")
    return globals()[place](rng, rng.uniform(50, 68))
