"""Draw the sample subjects: a few small pictures each of one cat, one robot, one dog and one teapot.

Every picture is an SVG put together from a few posable parts and rasterised with resvg_py, with nothing random in it,
so running the tool again writes the same bytes:

    python tools/make_subjects.py --output assets/subjects
"""

import argparse
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIZE = 256

# Radial gradients lit from the upper left: light, middle and dark colour.
PAINTS = {
    "teal": ("#7fd8d2", "#35a3a9", "#1d6f83"),
    "teal_deep": ("#4db4b8", "#2a8795", "#175b70"),
    "yellow": ("#ffe873", "#ffc91f", "#ee9f0c"),
    "yellow_deep": ("#ffd23c", "#f2ab12", "#d98708"),
    "amber": ("#ffd08a", "#ff9a2e", "#e06a10"),
    "white": ("#ffffff", "#f8f9fd", "#cfd6ea"),
    "white_deep": ("#f3f5fb", "#dfe4f1", "#b5bfda"),
    "pink": ("#ffc2d4", "#f983a8", "#dd5484"),
    "pink_deep": ("#ff9dbb", "#ea6593", "#c23f72"),
    "purple": ("#c79bff", "#8a4be8", "#5624ad"),
    "indigo": ("#6a55c4", "#3f2d92", "#251764"),
    "cyan": ("#c8fdff", "#35e3f5", "#0aa6cf"),
    "orange": ("#ffc07a", "#ff8420", "#e05a06"),
    "silver": ("#ffffff", "#c3cadb", "#8089a3"),
    "cream": ("#fffdf2", "#fff3cf", "#f0d79c"),
    "black": ("#55566b", "#2a2a38", "#15151f"),
    "red": ("#ff7a6b", "#e62b3a", "#a90f2d"),
    "green": ("#a5ec9c", "#4fc268", "#258a4d"),
}


# Outlines used in more than one place.
TEAPOT_BODY = "M0,-118 C48,-118 76,-92 76,-58 C76,-22 46,-4 0,-4 C-46,-4 -76,-22 -76,-58 C-76,-92 -48,-118 0,-118Z"
STAR = "M0,-11 L3,-4 L11,-3 L5,2 L7,10 L0,6 L-7,10 L-5,2 L-11,-3 L-3,-4Z"


# SVG building blocks ------------------------------------------------------------------------------------------------


def tag(name: str, content: str = "", **attributes) -> str:
    """Return one SVG element; a paint's name as its fill becomes a reference to the gradient."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if isinstance(value, (int, float)):
            value = f"{value:.6g}"
        elif key == "fill" and value in PAINTS:
            value = f"url(#{value})"
        parts.append(f' {key.replace("_", "-")}="{value}"')
    return "".join(parts) + (f">{content}</{name}>" if content else "/>")


def ellipse(x: float, y: float, rx: float, ry: float, fill: str, **attributes) -> str:
    """Return a filled ellipse."""
    return tag("ellipse", cx=x, cy=y, rx=rx, ry=ry, fill=fill, **attributes)


def circle(x: float, y: float, r: float, fill: str, **attributes) -> str:
    """Return a filled circle."""
    return ellipse(x, y, r, r, fill, **attributes)


def shape(d: str, fill: str, **attributes) -> str:
    """Return a filled path."""
    return tag("path", d=d, fill=fill, **attributes)


def line(d: str, colour: str, width: float, cap: str = "round", **attributes) -> str:
    """Return a stroked path."""
    return tag("path", d=d, fill="none", stroke=colour, stroke_width=width, stroke_linecap=cap, **attributes)


def limb(x1: float, y1: float, x2: float, y2: float, width: float, fill: str) -> str:
    """Return a straight limb with round ends from one joint to another."""
    length = math.hypot(x2 - x1, y2 - y1) + width
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    return tag(
        "rect",
        x=-width / 2,
        y=-width / 2,
        width=length,
        height=width,
        rx=width / 2,
        fill=fill,
        transform=f"translate({x1:.6g} {y1:.6g}) rotate({angle:.6g})",
    )


def group(content: str, x: float = 0, y: float = 0, angle: float = 0, scale: float = 1, flip: bool = False) -> str:
    """Return the content scaled, mirrored, turned and moved, in this order."""
    across = -scale if flip else scale
    return tag(
        "g", content, transform=f"translate({x:.6g} {y:.6g}) rotate({angle:.6g}) scale({across:.6g} {scale:.6g})"
    )


def shadow(width: float, x: float = 0, y: float = 0) -> str:
    """Return the soft shadow a figure casts on the ground."""
    return ellipse(x, y, width, width * 0.14, "url(#shadow)")


def definitions() -> str:
    """Return the gradients and clipping shapes every picture shares."""
    found = []
    for name, (light, middle, dark) in PAINTS.items():
        stops = "".join(
            tag("stop", offset=offset, stop_color=colour) for offset, colour in ((0, light), (0.5, middle), (1, dark))
        )
        found.append(tag("radialGradient", stops, id=name, cx=0.36, cy=0.26, r=0.86))
    stops = tag("stop", offset=0, stop_opacity=0.42) + tag("stop", offset=1, stop_opacity=0)
    found.append(tag("radialGradient", stops, id="shadow"))
    stops = "".join(tag("stop", offset=i, stop_color="#fff", stop_opacity=0.45 * (1 - i)) for i in (0, 1))
    found.append(tag("radialGradient", stops, id="glow"))
    found.append(tag("clipPath", ellipse(0, 0, 45, 28, "#000"), id="belly"))
    found.append(tag("clipPath", shape(TEAPOT_BODY, "#000"), id="pot"))
    return tag("defs", "".join(found))


def shine(x: float, y: float, rx: float, ry: float, angle: float = -30, opacity: float = 0.5) -> str:
    """Return a soft white highlight."""
    return ellipse(x, y, rx, ry, "#fff", opacity=opacity, transform=f"rotate({angle} {x} {y})")


# Backgrounds --------------------------------------------------------------------------------------------------------


def ramp(top: str, bottom: str, y: float = 0, height: float = SIZE) -> str:
    """Return a full-width band that shades from one colour at its top to another at its bottom."""
    name = f"ramp{y:g}"
    stops = tag("stop", offset=0, stop_color=top) + tag("stop", offset=1, stop_color=bottom)
    gradient = tag("linearGradient", stops, id=name, x1=0, y1=0, x2=0, y2=1)
    return tag("defs", gradient) + tag("rect", x=0, y=y, width=SIZE, height=height, fill=f"url(#{name})")


def plain(colour: str) -> str:
    """Return one flat colour."""
    return tag("rect", width=SIZE, height=SIZE, fill=colour)


def studio(wall: str, floor: str) -> str:
    """Return a photographer's backdrop: a wall that melts into the floor, with a pool of light."""
    return ramp(wall, floor) + ellipse(128, 110, 150, 150, "url(#glow)") + ellipse(128, 236, 150, 40, floor)


def meadow(sky: str = "#8fd3ff") -> str:
    """Return sky, a cloud, two hills and grass with daisies."""
    cloud = ellipse(0, 0, 26, 10, "#fff") + circle(-9, -7, 11, "#fff") + circle(8, -9, 13, "#fff")
    flowers = "".join(
        circle(x, y, 4, "#fff") + circle(x, y, 1.8, "#ffcf33")
        for x, y in ((20, 222), (44, 244), (228, 216), (238, 246), (206, 240), (14, 200))
    )
    return (
        ramp(sky, "#e6f8ff", 0, 190)
        + group(cloud, 42, 44, scale=0.9)
        + group(cloud, 220, 70, scale=0.7)
        + shape("M0,170 C60,132 120,150 256,176 V256 H0Z", "#a5d86e")
        + shape("M0,196 C90,180 170,166 256,182 V256 H0Z", "#79c14b")
        + flowers
    )


def room(wall: str, stripe: str, floor: str, board: str) -> str:
    """Return an indoor corner: striped wallpaper, a skirting board and a floor."""
    stripes = "".join(tag("rect", x=x, y=0, width=16, height=186, fill=stripe) for x in range(8, SIZE, 32))
    boards = "".join(line(f"M0,{y} H256", board, 1.6, opacity=0.6) for y in (210, 232))
    skirting = tag("rect", y=178, width=SIZE, height=10, fill="#fff", opacity=0.85)
    return plain(wall) + stripes + tag("rect", y=186, width=SIZE, height=70, fill=floor) + boards + skirting


def window(wall: str, sill: str, glass: str) -> str:
    """Return a wall with a window in it above a wide window sill."""
    pane = tag("rect", x=46, y=-10, width=164, height=196, fill=glass) + circle(176, 38, 16, "#fff", opacity=0.8)
    bars = line("M128,0 V186 M46,84 H210", "#fff", 7) + line("M46,-10 V186 M210,-10 V186", "#fff", 10)
    return plain(wall) + pane + bars + ramp(sill, sill, 186, 70) + tag("rect", y=186, width=SIZE, height=8, fill="#fff")


def sand(sky: str = "#bfeaf5", sea: str = "#4fb4dc") -> str:
    """Return a beach: sky, a strip of sea and pale sand."""
    grains = "".join(circle(x, y, 2, "#d9b777") for x, y in ((24, 214), (60, 240), (200, 238), (232, 212), (244, 244)))
    return (
        ramp(sky, "#f4fcff", 0, 140)
        + tag("rect", y=136, width=SIZE, height=44, fill=sea)
        + line("M0,150 h60 M110,160 h70 M200,148 h40", "#fff", 2.4, opacity=0.6)
        + shape("M0,178 C70,166 170,184 256,172 V256 H0Z", "#f6dda6")
        + grains
    )


def snow(sky: str = "#9fb6de") -> str:
    """Return snowfall over white drifts and two fir trees."""
    fir = shape("M0,-70 L24,-26 H12 L32,10 H-32 L-12,-26 H-24Z", "#4d7f86")
    flakes = (
        (20, 30),
        (62, 70),
        (110, 20),
        (160, 52),
        (205, 24),
        (238, 84),
        (30, 120),
        (226, 140),
        (88, 40),
        (182, 96),
    )
    return (
        ramp(sky, "#dfe9f8", 0, 200)
        + group(fir, 28, 172)
        + group(fir, 226, 176, scale=1.2)
        + shape("M0,184 C80,160 150,186 256,168 V256 H0Z", "#f5f9ff")
        + "".join(circle(x, y, 3, "#fff") for x, y in flakes)
    )


def night() -> str:
    """Return a starry sky with a moon above a dark hill."""
    stars = ((20, 84), (90, 22), (96, 60), (150, 24), (182, 70), (236, 104), (20, 110), (240, 150), (120, 14), (40, 84))
    return (
        ramp("#3f4fae", "#a391dd")
        + circle(52, 46, 22, "#fff3c4")
        + "".join(circle(x, y, 2, "#fff") for x, y in stars)
        + shape("M0,206 C70,182 170,186 256,204 V256 H0Z", "#46568f")
    )


def dots(colour: str, spot: str) -> str:
    """Return a plain colour with a grid of large spots."""
    spots = (circle(x + 32 * (y // 32 % 2), y, 9, spot) for y in range(0, 288, 32) for x in range(0, 288, 64))
    return plain(colour) + "".join(spots)


# The cat ------------------------------------------------------------------------------------------------------------


def cat_eyes(eyes: str, turn: float) -> str:
    """Return the cat's eyes, "open", "closed" or one closed ("wink")."""
    found = ""
    for side in (-1, 1):
        x = 23 * side + 9 * turn
        if eyes == "closed" or (eyes == "wink" and side == 1):
            found += line(f"M{x - 13},-3 Q{x},11 {x + 13},-3", "#123246", 4.5)
            continue
        found += circle(x, -4, 17, "#123246") + circle(x, -4, 15, "amber")
        found += ellipse(x + 3 * turn, -4, 8, 10.5, "#141824") + circle(x - 4 + 3 * turn, -9, 4.4, "#fff")
        found += circle(x + 5 + 3 * turn, 2, 2.2, "#fff", opacity=0.8)
    return found


def cat_head(turn: float = 0, eyes: str = "open") -> str:
    """Return the cat's head around its centre, looking left (turn -1) to right (turn 1)."""
    ear = shape("M-46,-8 C-54,-40 -50,-68 -42,-70 C-32,-70 -12,-52 -6,-34Z", "teal_deep")
    ear += shape("M-40,-20 C-45,-40 -43,-56 -39,-57 C-32,-55 -20,-44 -16,-34Z", "pink")
    skull = "M0,-44 C32,-44 56,-22 56,6 C56,32 30,43 0,43 C-30,43 -56,32 -56,6 C-56,-22 -32,-44 0,-44Z"
    x = 12 * turn
    stripes = "".join(
        line(f"M{9 * i + x},-42 Q{8 * i + x},-34 {6 * i + x},-28", "#1c2f5c", 5.5) for i in (-1.2, 0, 1.2)
    )
    muzzle = (
        ellipse(x - 11, 21, 17, 13, "white") + ellipse(x + 11, 21, 17, 13, "white") + ellipse(x, 31, 13, 9, "white")
    )
    nose = shape(f"M{x - 7},12 Q{x},8 {x + 7},12 Q{x + 4},19 {x},20 Q{x - 4},19 {x - 7},12Z", "pink_deep")
    mouth = line(f"M{x - 9},24 Q{x - 5},29 {x},23 Q{x + 5},29 {x + 9},24", "#36506a", 2.4)
    whiskers = "".join(line(f"M{x + 26 * s},{20 + k} l{24 * s},{k - 4}", "#fff", 1.8) for s in (-1, 1) for k in (-1, 6))
    face = stripes + cat_eyes(eyes, turn) + muzzle + whiskers + nose + mouth
    return ear + group(ear, flip=True) + shape(skull, "teal") + face


def cat_tail(d: str, width: float = 23) -> str:
    """Return a tail along a path from its root, ringed teal and navy with a navy tip."""
    rings = line(d, "#1c2f5c", width, cap="butt", stroke_dasharray="13 13", stroke_dashoffset=-8)
    return line(d, "#1c2f5c", width) + line(d, "#35a3a9", width, cap="butt") + rings


def scarf(width: float, side: int = 1, length: float = 46) -> str:
    """Return a thick yellow scarf around its middle, with a loose end hanging on one side."""
    band = f"M{-width},-8 C{-width * 0.6},16 {width * 0.6},16 {width},-8"
    end = tag("rect", x=-12, y=0, width=24, height=length, rx=5, fill="yellow_deep")
    end += line(f"M-12,{length - 12} H12", "#fff6c9", 4.5, cap="butt")
    folds = "".join(line(f"M{width * k},-4 q3,8 0,18", "#d98708", 2.2, opacity=0.7) for k in (-0.62, -0.3, 0.05, 0.72))
    knot = ellipse(width * 0.42 * side, 7, 14, 13, "yellow")
    return group(end, width * 0.42 * side, 10, angle=-12 * side) + line(band, "#ffc91f", 27) + folds + knot


def cat_sitting(
    turn: float = 0, tilt: float = 0, eyes: str = "open", side: int = 1, paw: bool = False, tail: str = "curl"
) -> str:
    """Return the cat sitting, seen from the front; side says where its tail is, paw lifts one forepaw."""
    tails = {
        "curl": "M34,-14 C84,-2 112,-34 94,-66 C86,-80 74,-76 72,-64",
        "up": "M34,-22 C74,-16 86,-60 82,-96 C80,-116 88,-128 98,-130",
    }
    body = shape(
        "M0,-124 C40,-124 50,-78 57,-40 C64,-4 42,0 0,0 C-42,0 -64,-4 -57,-40 C-50,-78 -40,-124 0,-124Z", "teal"
    )
    haunches = ellipse(-43, -26, 25, 27, "teal_deep") + ellipse(43, -26, 25, 27, "teal_deep")
    chest = shape(
        "M0,-112 C24,-112 32,-86 27,-58 C23,-40 12,-32 0,-32 C-12,-32 -23,-40 -27,-58 C-32,-86 -24,-112 0,-112Z",
        "white",
    )
    legs = ellipse(-48, -5, 20, 10, "white") + ellipse(48, -5, 20, 10, "white")
    legs += limb(-15, -56, -16, -14, 23, "teal") + ellipse(-17, -6, 16, 10, "white")
    if paw:
        legs += group(limb(22, -62, 62, -100, 24, "teal") + circle(66, -104, 15, "white"), flip=side < 0)
        legs = group(legs, flip=side < 0) if side < 0 else legs
    else:
        legs += limb(15, -56, 16, -14, 23, "teal") + ellipse(17, -6, 16, 10, "white")
    head = group(cat_head(turn, eyes), 4 * turn, -154, angle=tilt, scale=1.04)
    back = shadow(96) + group(cat_tail(tails[tail]), flip=side < 0)
    return back + body + haunches + chest + legs + group(scarf(42, -side), 0, -112) + head


def cat_standing(eyes: str = "open", flip: bool = False, step: float = 0, tail: str = "up", tilt: float = 0) -> str:
    """Return the cat on four legs, seen from its side and facing left, or right if flipped."""
    tails = {
        "up": "M58,-84 C92,-86 102,-122 86,-146 C78,-160 86,-172 98,-174",
        "low": "M58,-80 C92,-84 96,-40 112,-34 C124,-30 130,-40 126,-50",
    }
    body = "M-62,-76 C-62,-112 -30,-112 0,-106 C34,-112 68,-108 70,-74 C72,-44 46,-42 0,-44 C-44,-42 -62,-46 -62,-76Z"
    far = limb(-30, -60, -26 + step, -12, 21, "teal_deep") + limb(40, -60, 34 - step, -12, 21, "teal_deep")
    far += ellipse(-30 + step, -6, 15, 8, "white_deep") + ellipse(30 - step, -6, 15, 8, "white_deep")
    near = limb(-46, -66, -48 - step, -12, 23, "teal") + limb(54, -66, 54 + step, -12, 24, "teal")
    near += ellipse(-52 - step, -6, 17, 9, "white") + ellipse(50 + step, -6, 17, 9, "white")
    saddle = "".join(line(f"M{x},-107 q3,14 -2,26", "#1c2f5c", 7) for x in (10, 28, 46))
    chest = ellipse(-47, -73, 18, 27, "white")
    figure = cat_tail(tails[tail]) + far + shape(body, "teal") + saddle + near + chest
    sign = 1 if flip else -1
    neck = group(scarf(34, -sign, 40), 48 * sign, -100, angle=8 * sign)
    head = group(cat_head(0.9 * sign, eyes), 56 * sign, -136, angle=tilt, scale=0.92)
    return shadow(100) + group(figure, flip=flip) + neck + head


def cat_lying(eyes: str = "closed", side: int = 1, turn: float = 0, tilt: float = 0) -> str:
    """Return the cat lying like a loaf with its tail around it; side says where its back end is."""
    body = "M-76,2 C-116,2 -104,-92 0,-92 C66,-92 104,-64 104,-26 C104,-6 96,2 76,2Z"
    saddle = "".join(line(f"M{x},{y} q8,12 6,24", "#1c2f5c", 8) for x, y in ((34, -87), (54, -79), (72, -66)))
    chest = ellipse(-34, -34, 32, 32, "white")
    paws = ellipse(-58, -7, 20, 11, "white") + ellipse(-14, -7, 20, 11, "white")
    tail = cat_tail("M88,-24 C104,4 70,0 44,-4 C30,-6 22,-10 16,-20")
    figure = shape(body, "teal") + saddle + chest + paws + tail
    neck = group(scarf(46, -side, 34), -34 * side, -62)
    head = group(cat_head(turn, eyes), -34 * side, -104, angle=tilt, scale=1.06)
    return shadow(112) + group(figure, flip=side < 0) + neck + head


def cat_portrait(turn: float = 0, tilt: float = 0, eyes: str = "open") -> str:
    """Return a close-up of the cat's face and shoulders."""
    shoulders = shape("M-70,24 C-66,-46 66,-46 70,24Z", "teal") + ellipse(0, 12, 36, 42, "white")
    return shoulders + group(scarf(48, 1, 40), 0, -32) + group(cat_head(turn, eyes), 0, -76, angle=tilt, scale=1.1)


# The robot ----------------------------------------------------------------------------------------------------------


def robot_arm(side: int, angle: float) -> str:
    """Return a ringed arm raised by an angle above hanging straight down, with its gripper."""
    rings = "".join(line(f"M-8,{y} H8", "#3f2d92", 4.5, cap="butt") for y in (14, 24, 34))
    gripper = line("M-8,68 A13,13 0 1 1 8,68", "#ff8420", 10) + circle(0, 44, 8, "orange")
    arm = limb(0, 0, 0, 40, 16, "silver") + rings + gripper
    return group(group(arm, 58, -92, angle=-angle), flip=side < 0)


def robot_eye(turn: float, look: float, drowsy: bool) -> str:
    """Return the one big cyan eye in its riveted rim, under a half-closed lid if drowsy."""
    x = 15 * turn
    corners = [math.radians(angle) for angle in range(0, 360, 45)]
    rivets = "".join(circle(x + 34.5 * math.cos(a), -108 + 34.5 * math.sin(a), 2.3, "#c3cadb") for a in corners)
    eye = circle(x, -108, 39, "indigo") + rivets + circle(x, -108, 30, "cyan")
    pupil = x + 6 * turn
    eye += circle(pupil, -108 + look, 13, "#171240") + circle(pupil - 6, -115 + look, 5.5, "#fff")
    if drowsy:
        lid = shape(f"M{x - 39},-111 A39,39 0 0 1 {x + 39},-111Z", "purple")
        return eye + lid + line(f"M{x - 38},-111 Q{x},-110 {x + 38},-111", "#3f2d92", 5)
    return eye + shine(x - 15, -124, 8, 4.5, opacity=0.9)


def robot_legs(step: float) -> str:
    """Return two short ringed legs on flat feet; step lifts one foot in front of the other."""
    foot = shape("M-25,0 V-8 C-25,-26 25,-26 25,-8 V0Z", "silver")
    foot += tag("rect", x=-26, y=-7, width=52, height=8, rx=3.5, fill="indigo")
    found = ""
    for side in (-1, 1):
        x, lift = side * (27 + abs(step) * 0.5), max(0, side * step)
        found += limb(side * 24, -38, x, -20 - lift, 20, "indigo") + group(foot, x, -lift)
    return found


def robot(
    turn: float = 0,
    arms: tuple[float, float] = (25, 25),
    step: float = 0,
    tilt: float = 0,
    look: float = 0,
    sway: float = 8,
    drowsy: bool = False,
    ground: float = 0,
) -> str:
    """Return the robot; arms are the angles of its left and right arm, ground lowers its shadow for a jump."""
    antenna = line("M0,-166 q3,-10 0,-24", "#3f2d92", 7) + circle(0, -198, 15, "orange") + shine(-5, -203, 4, 3)
    stripes = "".join(tag("rect", x=-50, y=y, width=100, height=8.5, fill="#ff8420") for y in (-25, -8, 9))
    belly = ellipse(0, 0, 49, 31.5, "indigo") + tag(
        "g", ellipse(0, 0, 45, 28, "cream") + stripes, clip_path="url(#belly)"
    )
    bolts = ellipse(-69, -96, 8, 15, "silver") + ellipse(69, -96, 8, 15, "silver")
    body = bolts + ellipse(0, -92, 70, 72, "purple") + shine(-36, -134, 15, 8, -40, 0.45)
    front = group(belly, 11 * turn, -48) + robot_eye(turn, look, drowsy)
    arms_drawn = robot_arm(-1, arms[0]) + robot_arm(1, arms[1])
    figure = group(antenna, 6 * turn, 0, angle=sway * 0.5) + robot_legs(step) + arms_drawn + body + front
    return shadow(84 - 0.6 * ground, y=ground) + group(figure, angle=tilt)


# The dog ------------------------------------------------------------------------------------------------------------


def dog_head(turn: float = 0, eyes: str = "open", tongue: bool = True, flap: float = 0) -> str:
    """Return the dog's head: a black ear on the right, a black patch around the left eye; flap lifts the ears."""
    ear = "M-30,-36 C-58,-46 -70,-18 -66,8 C-64,30 -48,34 -42,16 C-38,2 -34,-8 -26,-14Z"
    pale = tag("g", shape(ear, "white_deep"), transform=f"rotate({flap} -34 -30)")
    dark = group(tag("g", shape(ear, "black"), transform=f"rotate({flap} -34 -30)"), flip=True)
    skull = "M0,-46 C30,-46 48,-26 48,0 C48,28 30,42 0,42 C-30,42 -48,28 -48,0 C-48,-26 -30,-46 0,-46Z"
    x = 13 * turn
    patch = ellipse(x * 0.8 - 21, -10, 20, 23, "black", transform=f"rotate(14 {x * 0.8 - 21} -10)")
    found = ""
    for side in (-1, 1):
        at = 20 * side + x * 0.8
        if eyes == "closed":
            found += line(f"M{at - 9},-10 Q{at},-20 {at + 9},-10", "#fff" if side < 0 else "#2a2a38", 4)
            continue
        found += (
            circle(at, -10, 10.5, "#fff")
            + circle(at + 2 * turn, -9, 8, "#2b1b16")
            + circle(at - 3 + 2 * turn, -12, 3, "#fff")
        )
    snout = ellipse(x, 20, 28, 21, "white") + ellipse(x * 1.2, 10, 12, 8.5, "black") + shine(x * 1.2 - 4, 7, 3.5, 2)
    mouth = line(f"M{x - 14},24 Q{x - 6},33 {x},25 Q{x + 6},33 {x + 14},24 M{x},18 V25", "#3a3a4a", 2.6)
    lick = shape(f"M{x - 8},28 C{x - 9},46 {x + 9},46 {x + 8},28Z", "pink_deep") if tongue else ""
    return pale + dark + shape(skull, "white") + patch + found + snout + lick + mouth


def cape_collar(width: float) -> str:
    """Return the front of the cape: a red band around the neck with a golden clasp."""
    band = line(f"M{-width},-8 C{-width * 0.6},14 {width * 0.6},14 {width},-8", "#e62b3a", 17)
    return band + circle(0, 12, 13, "yellow") + shape(STAR, "#fff", transform="translate(0 12) scale(0.8)")


def dog_sitting(
    turn: float = 0, tilt: float = 0, side: int = 1, eyes: str = "open", beg: bool = False, wind: float = 0
) -> str:
    """Return the dog sitting, seen from the front, its cape spread behind it; beg lifts both forepaws."""
    edge = 96 + wind
    left = f"M-26,-122 C-66,-100 {-edge},-40 {2 * wind - edge},-4 C{wind - 60},8 -30,-2 0,2"
    cape = f"{left} C30,-2 {60 + wind},8 {edge},-4 C{edge},-40 66,-100 26,-122Z"
    folds = line("M-50,-92 C-66,-60 -76,-30 -78,-8 M50,-92 C66,-60 76,-30 78,-8", "#8f0f28", 5, opacity=0.55)
    tail = line("M36,-20 C70,-18 88,-40 84,-62", "#e9edf7", 17)
    body = shape(
        "M0,-122 C38,-122 48,-78 54,-40 C60,-4 40,0 0,0 C-40,0 -60,-4 -54,-40 C-48,-78 -38,-122 0,-122Z", "white"
    )
    haunches = ellipse(-40, -24, 24, 25, "white_deep") + ellipse(40, -24, 24, 25, "white_deep")
    feet = ellipse(-46, -5, 21, 10, "white") + ellipse(46, -5, 21, 10, "white")
    for s in (-1, 1):
        if beg:
            feet += limb(22 * s, -82, 30 * s, -58, 21, "white_deep") + circle(31 * s, -54, 13, "white")
        else:
            feet += limb(15 * s, -70, 16 * s, -14, 23, "white") + ellipse(17 * s, -6, 17, 10, "white")
    gap = line("M0,-60 V-8", "#b5bfda", 3) if not beg else ""
    head = group(dog_head(turn, eyes), 3 * turn, -152, angle=tilt, scale=1.1)
    back = shadow(104) + group(tail, flip=side < 0) + shape(cape, "red") + folds
    return back + body + haunches + gap + feet + group(cape_collar(36), 0, -106) + head


def dog_body(legs: tuple[float, float, float, float]) -> str:
    """Return the dog's trunk from its side, facing left, its four feet shifted by the given amounts."""
    a, b, c, d = legs
    trunk = "M-60,-76 C-60,-110 -30,-110 0,-104 C34,-110 66,-106 66,-74 C68,-46 44,-44 0,-48 C-42,-42 -60,-46 -60,-76Z"
    tail = line("M58,-88 C84,-92 96,-112 94,-132", "#e9edf7", 16)
    far = limb(-30, -62, -28 + a, -12, 21, "white_deep") + limb(38, -62, 36 + b, -12, 21, "white_deep")
    far += ellipse(-32 + a, -6, 15, 8, "white_deep") + ellipse(32 + b, -6, 15, 8, "white_deep")
    near = limb(-46, -66, -46 + c, -12, 23, "white") + limb(52, -66, 54 + d, -12, 24, "white")
    near += ellipse(-50 + c, -6, 17, 9, "white") + ellipse(50 + d, -6, 17, 9, "white")
    return tail + far + shape(trunk, "white") + near


def dog_standing(flip: bool = False, step: float = 0, tilt: float = 0, eyes: str = "open", blow: float = 0) -> str:
    """Return the dog on four legs from its side, facing left or, flipped, right; blow lifts the end of its cape."""
    end = 92 + blow
    cape = f"M-52,-112 C-20,-124 30,-118 {end},{-104 - blow} C{end + 20},{-84 - blow} {end + 12},{-52 - blow}"
    cape += f" {end - 4},{-44 - blow} C60,-60 10,-46 -38,-74Z"
    fold = line(f"M-34,-100 C10,-92 50,-90 {end},{-76 - blow}", "#8f0f28", 4.5, opacity=0.5)
    figure = dog_body((step, -step, -step, step)) + shape(cape, "red") + fold
    sign = 1 if flip else -1
    neck = group(cape_collar(30), 48 * sign, -104, angle=8 * sign)
    head = group(dog_head(0.9 * sign, eyes, flap=abs(blow)), 56 * sign, -138, angle=tilt)
    return shadow(100) + group(figure, flip=flip) + neck + head


def dog_flying(flip: bool = False, tilt: float = -14) -> str:
    """Return the dog flying like a superhero, forepaws first, its cape streaming behind."""
    trunk = "M-64,-70 C-64,-102 -20,-104 10,-98 C50,-98 74,-90 76,-68 C76,-48 40,-44 0,-42 C-44,-38 -64,-44 -64,-70Z"
    far = limb(-50, -54, -98, -58, 20, "white_deep") + limb(64, -70, 106, -78, 20, "white_deep")
    near = limb(-46, -48, -92, -34, 22, "white") + circle(-96, -33, 13, "white")
    near += limb(60, -58, 106, -52, 22, "white") + circle(112, -51, 12, "white")
    cape = "M-46,-106 C-10,-128 30,-104 62,-122 C84,-134 104,-130 122,-140"
    cape += " C124,-112 120,-92 106,-78 C84,-84 60,-58 -30,-72Z"
    fold = line("M-28,-98 C10,-104 50,-90 110,-112", "#8f0f28", 4.5, opacity=0.5)
    figure = far + shape(trunk, "white") + near + shape(cape, "red") + fold
    sign = 1 if flip else -1
    neck = group(cape_collar(30), 46 * sign, -96, angle=4 * sign)
    head = group(dog_head(0.8 * sign, flap=24), 56 * sign, -128)
    return group(group(figure, flip=flip) + neck + head, angle=-tilt * sign)


def dog_lying(side: int = 1, turn: float = 0, tilt: float = 0, eyes: str = "open") -> str:
    """Return the dog lying with its forepaws out and its cape over its back; side says where its back end is."""
    tail = line("M88,-20 C108,-20 116,-40 110,-56", "#e9edf7", 16)
    body = shape("M-84,-2 C-96,-66 -50,-88 4,-86 C66,-84 108,-56 96,-2 C70,6 -60,6 -84,-2Z", "white")
    haunch = ellipse(72, -26, 28, 27, "white_deep") + ellipse(62, -7, 24, 10, "white")
    cape = shape(
        "M-60,-78 C-20,-104 60,-96 92,-64 C112,-44 116,-16 108,0 C88,4 76,-6 60,-12 C34,-34 -20,-40 -50,-44Z", "red"
    )
    fold = line("M-20,-74 C30,-72 70,-50 88,-14", "#8f0f28", 4.5, opacity=0.5)
    paws = limb(-58, -18, -70, -10, 22, "white") + limb(-22, -18, -14, -10, 22, "white")
    paws += ellipse(-74, -8, 19, 11, "white") + ellipse(-10, -8, 19, 11, "white")
    neck = group(cape_collar(38), -38 * side, -64)
    head = group(dog_head(turn, eyes, tongue=eyes == "open"), -38 * side, -106, angle=tilt, scale=1.1)
    return shadow(114) + group(tail + haunch + body + haunch + cape + fold + paws, flip=side < 0) + neck + head


def dog_portrait(turn: float = 0, tilt: float = 0, eyes: str = "open") -> str:
    """Return a close-up of the dog's face above its cape."""
    cape = shape("M-86,24 C-92,-30 -56,-52 0,-52 C56,-52 92,-30 86,24Z", "red")
    chest = shape("M-44,24 C-46,-20 -30,-40 0,-40 C30,-40 46,-20 44,24Z", "white")
    return cape + chest + group(cape_collar(44), 0, -26) + group(dog_head(turn, eyes), 0, -74, angle=tilt, scale=1.16)


# The teapot ---------------------------------------------------------------------------------------------------------


def steam(x: float, y: float) -> str:
    """Return three wisps of steam rising from a point."""
    return "".join(line(f"M{x + k},{y} q-9,-12 0,-22 q9,-10 0,-22", "#fff", 6, opacity=0.75) for k in (-16, 0, 16))


def teapot_spout(view: str) -> str:
    """Return the spout pointing left ("side"), half towards the viewer ("three-quarter") or at the viewer ("front")."""
    if view == "side":
        spout = shape("M-60,-30 C-92,-34 -92,-72 -118,-92 L-100,-106 C-78,-92 -70,-84 -54,-84Z", "pink_deep")
        return spout + ellipse(-109, -99, 12, 5, "#9c2c58", transform="rotate(-38 -109 -99)")
    if view == "three-quarter":
        spout = "M-84,-44 C-78,-16 -30,-18 -28,-48 C-27,-72 -68,-72 -80,-108 L-103,-100 C-92,-76 -88,-62 -84,-44Z"
        return shape(spout, "pink_deep") + ellipse(-91.5, -104, 12, 5, "#9c2c58", transform="rotate(-20 -91.5 -104)")
    spout = "M-28,-48 C-28,-16 28,-16 28,-48 C28,-68 15,-74 15,-94 H-15 C-15,-74 -28,-68 -28,-48Z"
    return shape(spout, "pink_deep") + ellipse(0, -94, 15, 6.5, "#9c2c58")


def teapot(
    view: str = "side", flip: bool = False, tilt: float = 0, lid: float = 0, wisps: bool = False, pour: bool = False
) -> str:
    """Return the teapot; lid lifts its lid, wisps adds steam, pour adds the tea running from its spout."""
    reach = {"side": 1.0, "three-quarter": 0.62, "front": 0}[view]
    end = 66 + 52 * reach
    handle = line(f"M62,-92 C{end},-112 {end + 6},-22 58,-34", "#4fc268", 16) if reach else ""
    spots = "".join(
        circle(x + 17 * (row % 2), -108 + 21 * row, 8.6, "#fff") for row in range(6) for x in range(-86, 90, 34)
    )
    body = shape(TEAPOT_BODY, "pink") + tag("g", spots, clip_path="url(#pot)") + shine(-40, -94, 14, 7, -38, 0.55)
    foot = ellipse(0, -5, 42, 9, "pink_deep")
    cover = shape("M-44,-110 C-42,-140 -20,-146 0,-146 C20,-146 42,-140 44,-110 C30,-102 -30,-102 -44,-110Z", "green")
    cover += circle(0, -153, 12, "yellow") + shine(-18, -132, 9, 4.5)
    inside = ellipse(0, -111, 42, 9, "#9c2c58") if lid else ""
    spout = teapot_spout(view)
    pot = foot + handle + (spout + body if view == "side" else body + spout) + inside
    pot += group(cover, 0, -lid, angle=lid * 0.5)
    if wisps:
        pot = steam(-104 * reach, -118) + pot if view == "side" else pot + steam(0, -170 - lid)
    stream = group(line("M-139,-44 C-150,-34 -150,0 -150,90", "#b9651f", 9), flip=flip) if pour else ""
    ground = "" if pour else shadow(96)
    return ground + stream + group(group(pot, flip=flip), angle=tilt)


# What to draw -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """One picture: a figure at a place and size, given by the point it stands on, before a background."""

    name: str
    figure: str
    background: str
    x: float = 128
    y: float = 238
    scale: float = 0.95

    def svg(self, background: bool = True) -> str:
        """Return the whole picture, or the figure alone."""
        content = definitions() + (self.background if background else "")
        content += group(self.figure, self.x, self.y, scale=self.scale)
        return tag("svg", content, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {SIZE} {SIZE}")


@dataclass(frozen=True)
class Subject:
    """The training and the held-out pictures of one subject."""

    train: list[Shot]
    heldout: list[Shot]


def cat_shots() -> Subject:
    """Return the pictures of the cat."""
    train = [
        Shot("sitting", cat_sitting(), studio("#f7c9b5", "#f0a98f"), x=118, scale=0.9),
        Shot("turned", cat_sitting(0.9, 6, side=-1, tail="up"), meadow(), x=136, scale=0.9),
        Shot("standing", cat_standing(), room("#fbe9c8", "#f6dcae", "#c98f5a", "#a06a3a"), x=128),
        Shot("loaf", cat_lying(turn=-0.2, tilt=-5), plain("#e9829a"), y=214),
        Shot("portrait", cat_portrait(-0.2, -8), ramp("#cdb6f2", "#8f76cf"), y=240, scale=1.24),
        Shot("walking", cat_standing(flip=True, step=12, tail="low", tilt=5), sand(), x=140, scale=0.88),
    ]
    heldout = [
        Shot("waving", cat_sitting(0.2, -10, "wink", side=-1, paw=True), snow(), x=136, scale=0.88),
        Shot("resting", cat_lying("open", side=-1, turn=0.4, tilt=6), window("#d5715f", "#b98b66", "#ffe3b0"), y=222),
    ]
    return Subject(train, heldout)


def robot_shots() -> Subject:
    """Return the pictures of the robot."""
    train = [
        Shot("standing", robot(), studio("#ffe6a8", "#f6c667")),
        Shot("cheering", robot(arms=(150, 150), look=-4, sway=-8), meadow("#a9dcff")),
        Shot("waving", robot(0.2, arms=(20, 140), tilt=-8), plain("#f28b82")),
        Shot(
            "walking",
            robot(0.9, arms=(50, 45), step=14, tilt=4, sway=-20),
            room("#d6ecdf", "#c3e1d0", "#b98b66", "#8f6745"),
            scale=0.91,
        ),
        Shot(
            "strolling", robot(-0.9, arms=(40, 70), step=-14, tilt=-4, sway=20), sand("#ffd9b8", "#79b8cf"), scale=0.9
        ),
        Shot("shrugging", robot(-0.3, arms=(95, 95), tilt=9, look=3), dots("#bfe3d0", "#d6f0e2"), x=118, scale=0.83),
    ]
    heldout = [
        Shot(
            "jumping",
            robot(0.4, arms=(165, 120), step=18, tilt=10, ground=26),
            ramp("#ffb199", "#ff7f7f"),
            x=106,
            y=222,
            scale=0.9,
        ),
        Shot("drowsy", robot(0, arms=(12, 30), tilt=-11, look=9, drowsy=True, sway=24), snow("#8fa9c9")),
    ]
    return Subject(train, heldout)


def dog_shots() -> Subject:
    """Return the pictures of the dog."""
    train = [
        Shot("sitting", dog_sitting(), studio("#a8d8f0", "#6fb3dc")),
        Shot("standing", dog_standing(), meadow(), x=135, scale=0.92),
        Shot("turned", dog_sitting(0.9, 8, side=-1, wind=8), room("#cfe3c4", "#bfd8b2", "#c08a5b", "#94643c")),
        Shot("flying", dog_flying(), ramp("#4d8fe0", "#a9d6fb"), x=149, y=206, scale=0.79),
        Shot("lying", dog_lying(tilt=-6), plain("#f2c14e"), y=216, scale=0.92),
        Shot("portrait", dog_portrait(0.2, 8), plain("#63b79b"), scale=1.22),
    ]
    heldout = [
        Shot("begging", dog_sitting(-0.3, -9, beg=True), sand()),
        Shot("striding", dog_standing(flip=True, step=13, tilt=-6, blow=14), night(), x=122, scale=0.86),
    ]
    return Subject(train, heldout)


def teapot_shots() -> Subject:
    """Return the pictures of the teapot."""
    train = [
        Shot("side", teapot(), studio("#bfe0f2", "#8fc1de"), scale=0.9),
        Shot(
            "mirrored",
            teapot(flip=True, wisps=True),
            room("#f4e3c3", "#ecd5a8", "#a9744a", "#805230"),
            x=124,
            scale=0.88,
        ),
        Shot("front", teapot("three-quarter"), plain("#f6cf65"), scale=1.02),
        Shot("pouring", teapot(tilt=-24, pour=True), ramp("#d9c8f5", "#a891dc"), x=158, y=206, scale=0.86),
        Shot("open", teapot("three-quarter", flip=True, lid=16, wisps=True), sand("#ffe0c2", "#6fb6d6"), scale=0.9),
    ]
    heldout = [
        Shot("tilted", teapot(flip=True, tilt=12), dots("#7fc4b8", "#97d3c8"), x=114, scale=0.88),
        Shot("spout", teapot("front", wisps=True), window("#8798c9", "#7a5a48", "#a9d3ec"), scale=0.94),
    ]
    return Subject(train, heldout)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "cat": cat_shots,
    "robot": robot_shots,
    "dog": dog_shots,
    "teapot": teapot_shots,
}


# Writing ------------------------------------------------------------------------------------------------------------


def render(svg: str) -> Image.Image:
    """Return the rasterised SVG with an alpha channel."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))).convert("RGBA")


def write(shots: list[Shot], folder: Path) -> None:
    """Write the shots as numbered RGB pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shot in enumerate(shots, 1):
        picture = render(shot.svg()).convert("RGB")
        picture.save(folder / f"{number:02d}_{shot.name}.png", optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Write every subject's training and held-out pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output",
        type=lambda text: Path(text).expanduser(),
        default=Path("assets/subjects"),
        help="folder to write to",
    )
    output = parser.parse_args(arguments).output
    for name, shots in SUBJECTS.items():
        subject = shots()
        write(subject.train, output / name)
        write(subject.heldout, output / "heldout" / name)


if __name__ == "__main__":
    main()
