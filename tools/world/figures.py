"""The figures of the drawn world as SVG on a canvas of 100 x 100, y downwards, feet at about y = 96."""

import zlib
from dataclasses import dataclass

from .attributes import ANIMALS, Pose, Who
from .scenes import hex_color

INK = "#241f24"


@dataclass(frozen=True)
class Paint:
    """The colours of one figure as ``#rrggbb``."""

    main: str
    dark: str  # main in the shade
    belly: str
    mark: str  # of the pattern, and of second parts
    line: str
    eye: str
    accent: str

    @classmethod
    def of(cls, who: Who) -> "Paint":
        main, second = who.rgb("main"), who.rgb("second")
        black = max(main) < 70
        pale = [c + 0.62 * (255 - c) for c in main]
        return cls(
            main=hex_color(main),
            dark=hex_color([c + 22 for c in main] if black else [0.74 * c for c in main]),
            # with no pattern to show it on, the second colour is the belly's
            belly=hex_color(second if who.pattern == "plain" else pale),
            mark=hex_color(second),
            # black figures get a light outline: they also stand before the night
            line="#8d8d9a" if black else hex_color([0.34 * c for c in main]),
            eye=hex_color(who.rgb("eyes")),
            accent=hex_color(who.rgb("accent")),
        )


# --- shapes -----------------------------------------------------------------------------------------------------------


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0) -> str:
    turned = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    return f'ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{rx:.1f}" ry="{ry:.1f}"{turned}'


def box(x: float, y: float, width: float, height: float, radius: float = 0) -> str:
    return f'rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}"'


def path(d: str) -> str:
    return f'path d="{d}"'


def filled(shape: str, fill: str, line: str | None = None, width: float = 2.0) -> str:
    outline = f' stroke="{line}" stroke-width="{width}" stroke-linejoin="round"' if line else ""
    return f'<{shape} fill="{fill}"{outline}/>'


def stroke(d: str, color: str, width: float) -> str:
    ends = 'stroke-linecap="round" stroke-linejoin="round"'
    return f'<path d="{d}" fill="none" stroke="{color}" stroke-width="{width}" {ends}/>'


def moved(svg: str, x: float, y: float, scale: float = 1, turn: float = 0) -> str:
    return f'<g transform="translate({x:.1f} {y:.1f}) rotate({turn:.1f}) scale({scale:.3f})">{svg}</g>'


def coat(shape: str, frame: tuple[float, float, float, float], who: Who, paint: Paint, extra: str = "") -> str:
    """The shape in the main colour with the pattern inside it.

    Args:
        shape: an SVG shape without its fill, as ``ellipse`` returns it.
        frame: centre and half axes (x, y, rx, ry) of the part that the pattern fills.
        extra: SVG drawn over the pattern and, like it, cut off at the shape's edge.
    """
    x, y, rx, ry = frame
    inside = ""
    if who.pattern == "stripes":
        for k in (-0.62, -0.1, 0.42):
            start = f"M{x - 1.1 * rx:.1f},{y + k * ry:.1f}"
            inside += stroke(f"{start} q{1.1 * rx:.1f},{0.36 * ry:.1f} {2.2 * rx:.1f},0", paint.mark, 0.24 * ry)
    elif who.pattern == "spots":
        for u, v in ((-0.55, -0.45), (0.2, -0.68), (0.68, -0.15), (-0.1, -0.05), (-0.72, 0.3), (0.45, 0.5)):
            inside += filled(ellipse(x + u * rx, y + v * ry, 0.19 * rx, 0.19 * ry), paint.mark)
    elif who.pattern == "patch":
        inside += filled(ellipse(x + 0.55 * rx, y - 0.3 * ry, 0.62 * rx, 0.72 * ry, 12), paint.mark)
    name = f"clip{zlib.crc32(f'{shape}{frame}'.encode())}"
    clip = f'<clipPath id="{name}"><{shape}/></clipPath><g clip-path="url(#{name})">{inside}{extra}</g>'
    return filled(shape, paint.main) + clip + f'<{shape} fill="none" stroke="{paint.line}" stroke-width="2"/>'


# --- faces and accessories --------------------------------------------------------------------------------------------


def eye(x: float, y: float, size: float, who: Who, paint: Paint, gaze: float) -> str:
    """A white eye with an iris, an iris with a slit, or a shining bead in the eye's colour."""
    shift = x + 0.22 * size * gaze
    gleam = filled(ellipse(shift - 0.25 * size, y - 0.3 * size, 0.22 * size, 0.22 * size), "#ffffff")
    if who.eye_style == 0:
        white = filled(ellipse(x, y, size, 1.12 * size), "#ffffff", INK, 1.3)
        iris = filled(ellipse(shift, y, 0.68 * size, 0.74 * size), paint.eye)
        return white + iris + filled(ellipse(shift, y, 0.34 * size, 0.38 * size), INK) + gleam
    if who.eye_style == 1:
        iris = filled(ellipse(x, y, 0.95 * size, 1.02 * size), paint.eye, INK, 1.3)
        return iris + filled(ellipse(shift, y, 0.24 * size, 0.78 * size), INK) + gleam
    rim = filled(ellipse(x, y, 0.85 * size, 0.95 * size), INK)
    return rim + filled(ellipse(shift, y + 0.12 * size, 0.58 * size, 0.62 * size), paint.eye) + gleam


def mouth(x: float, y: float, width: float, kind: int) -> str:
    if kind == 2:
        open_mouth = path(f"M{x - width:.1f},{y:.1f} q{width:.1f},{1.9 * width:.1f} {2 * width:.1f},0 Z")
        return filled(open_mouth, "#b8404c", INK, 1.2)
    bend = 0.8 * width if kind else 0.5 * width
    half = f"q{width / 2:.1f},{bend:.1f} {width:.1f},0"
    return stroke(f"M{x - width:.1f},{y:.1f} {half} {half}", INK, 1.6)


def face(x: float, y: float, size: float, who: Who, paint: Paint, pose: Pose) -> str:
    """A small face for things: two eyes and a mouth, ``size`` the radius of an eye."""
    eyes = "".join(eye(x + side * 2.1 * size, y, size, who, paint, pose.gaze) for side in (-1, 1))
    return eyes + mouth(x, y + 1.3 * size, 0.8 * size, pose.mouth)


def on_head(who: Who, paint: Paint, x: float, y: float, width: float) -> str:
    """A hat or a crown that stands at (x, y), the middle of its brim; ``width`` is half of the head's."""
    w = 0.62 * width
    if who.accessory == "hat":
        cone = path(f"M{x - w:.1f},{y:.1f} L{x:.1f},{y - 1.9 * w:.1f} L{x + w:.1f},{y:.1f} Z")
        brim = stroke(f"M{x - 1.15 * w:.1f},{y:.1f} q{1.15 * w:.1f},{0.3 * w:.1f} {2.3 * w:.1f},0", "#fbfbfb", 4.2)
        tassel = filled(ellipse(x, y - 1.9 * w, 3.4, 3.4), "#fbfbfb", INK, 1.2)
        return filled(cone, paint.accent, INK, 1.7) + brim + tassel
    if who.accessory == "crown":
        d = f"M{x - w:.1f},{y + 1:.1f} v{-1.15 * w:.1f} l{w / 2:.1f},{0.6 * w:.1f} l{w / 2:.1f},{-0.95 * w:.1f} "
        d += f"l{w / 2:.1f},{0.95 * w:.1f} l{w / 2:.1f},{-0.6 * w:.1f} v{1.15 * w:.1f} Z"
        places = [(x + k * w * 0.55, y - 0.2 * w) for k in (-1, 0, 1)]
        jewels = "".join(filled(ellipse(*place, 1.8, 1.8), paint.accent, INK, 0.9) for place in places)
        return filled(path(d), "#ffd23e", INK, 1.7) + jewels
    return ""


def at_neck(who: Who, paint: Paint, x: float, y: float, width: float) -> str:
    """A scarf or a bow round a neck of half width ``width`` at (x, y)."""
    if who.accessory == "scarf":
        end = path(f"M{x + 0.35 * width:.1f},{y + 2:.1f} l2,17 l9,-1.5 l-2.5,-16 Z")
        wrap = box(x - width, y - 4.2, 2 * width, 9, 4.5)
        return filled(end, paint.accent, INK, 1.7) + filled(wrap, paint.accent, INK, 1.7)
    if who.accessory == "bow":
        wings = path(f"M{x:.1f},{y:.1f} l-12,-7.5 v15 Z M{x:.1f},{y:.1f} l12,-7.5 v15 Z")
        return filled(wings, paint.accent, INK, 1.7) + filled(ellipse(x, y, 3.6, 3.6), paint.accent, INK, 1.5)
    return ""


# --- animals ----------------------------------------------------------------------------------------------------------


def ear(who: Who, paint: Paint, side: int) -> str:
    """The left (-1) or right (1) ear of a head at the origin with half axes 28 and 24."""
    x, shape, inner = 19 * side, who.shape, paint.belly
    if who.kind in ("cat", "fox"):
        height, lean = (42, 37, 46)[shape], (4, 9, 0)[shape]
        if who.kind == "fox":
            height += 4
        outer = path(f"M{x - 10},-10 L{x + lean * side},{-height} L{x + 10},-12 Z")
        tip = path(f"M{x - 5},-16 L{x + 0.8 * lean * side:.1f},{-height + 9} L{x + 5},-17 Z")
        return filled(outer, paint.dark if who.kind == "fox" else paint.main, paint.line) + filled(tip, inner)
    if who.kind == "dog":
        outer = ellipse(27 * side, (2, -4, 0)[shape], 8, (19, 14, 0)[shape], (-10, -26, 0)[shape] * side)
        if shape == 2:  # half pricked
            outer = path(f"M{16 * side},-12 q{4 * side},-24 {13 * side},-20 q{12 * side},8 {3 * side},18 Z")
        return filled(outer, paint.dark, paint.line)
    if who.kind == "rabbit":
        turn = (6, 22, 2)[shape] * side
        long = filled(ellipse(12 * side, -38, 7.5, 21, turn), paint.main, paint.line)
        return long + filled(ellipse(12 * side, -37, 3.6, 14, turn), inner)
    radius = (9, 11, 8)[shape]
    return filled(ellipse(20 * side, -19, radius, radius), paint.main, paint.line) + filled(
        ellipse(20 * side, -19, 0.55 * radius, 0.55 * radius), inner
    )


def animal_head(who: Who, paint: Paint, pose: Pose) -> str:
    """A head at the origin, 56 wide and 48 high without its ears."""
    svg = "".join(ear(who, paint, side) for side in (-1, 1))
    outline = ellipse(0, 0, 28, 24)
    if who.kind == "fox":
        outline = path("M-28,-8 Q-26,-25 0,-25 Q26,-25 28,-8 Q34,4 22,13 Q8,24 0,25 Q-8,24 -22,13 Q-34,4 -28,-8 Z")
    # the pattern lies on the forehead, above the eyes
    svg += coat(outline, (0, -14, 26, 17), who, paint)
    x = 3 * pose.gaze
    muzzle = {"fox": (15, 9), "bear": (13, 10), "dog": (14, 11)}.get(who.kind, (12, 8.5))
    svg += filled(ellipse(x, 12, *muzzle), paint.belly)
    svg += "".join(filled(ellipse(x + 19 * side, 10, 4, 2.8), "#f48a98") for side in (-1, 1))
    svg += "".join(eye(x + 12.5 * side, -2, 7.2, who, paint, pose.gaze) for side in (-1, 1))
    nose = {"dog": (5, 3.6), "bear": (5, 3.8)}.get(who.kind, (3.4, 2.4))
    svg += filled(ellipse(x, 7.5, *nose), "#e8788c" if who.kind == "rabbit" else INK) + mouth(x, 12.5, 4.6, pose.mouth)
    if who.kind == "rabbit":
        svg += filled(box(x - 2.4, 15, 4.8, 4.6, 1), "#ffffff", INK, 0.9)
    if who.kind == "cat":
        for side in (-1, 1):
            for bend in (-2.5, 2.5):
                svg += stroke(f"M{x + 14 * side:.1f},{11 + bend:.1f} l{15 * side},{bend:.1f}", paint.line, 1.2)
    return svg + on_head(who, paint, 0, -20, 24)


def tail(who: Who, paint: Paint, x: float, y: float, swing: float, side: int) -> str:
    """The tail from (x, y), to the right (1) or to the left (-1)."""
    if who.kind in ("rabbit", "bear"):
        radius = 7 if who.kind == "rabbit" else 5
        return filled(ellipse(x + 2 * side, y, radius, radius), paint.belly, paint.line)
    if who.kind == "fox":
        d = f"M{x},{y} q{20 * side},{6 + 4 * swing:.1f} {22 * side},{-20 + 6 * swing:.1f} "
        d += f"q{side},-12 {-7 * side},-14 q{-side},14 {-15 * side},20 Z"
        tip = f"M{x + 22 * side},{y - 20 + 6 * swing:.1f} q{side},-12 {-7 * side},-14 q{-side},8 {-4 * side},12 Z"
        return filled(path(d), paint.main, paint.line) + filled(path(tip), paint.belly)
    d = f"M{x},{y} q{22 * side},{-2 + 8 * swing:.1f} {15 * side},{-26 + 9 * swing:.1f}"
    return stroke(d, paint.line, 9.5) + stroke(d, paint.main, 6)


def animal(who: Who, paint: Paint, pose: Pose) -> str:
    if pose.view == "portrait":
        shoulders = coat(ellipse(50, 108, 33 * who.stout, 24), (50, 100, 30, 16), who, paint)
        crowned = who.accessory in ("hat", "crown") or who.kind == "rabbit"
        size, y = (1.3, 62) if crowned else (1.5, 57)
        head = moved(animal_head(who, paint, pose), 50, y, size * who.head**0.5, pose.tilt)
        return shoulders + head + at_neck(who, paint, 50, 92, 22)
    drop = 5 if who.kind == "rabbit" or who.accessory in ("hat", "crown") else 0
    if pose.view == "standing":
        svg = tail(who, paint, 20, 60, pose.tail, -1)
        for x in (25, 53):
            svg += filled(box(x + 9, 70, 9, 24, 4.5), paint.dark, paint.line)
        belly = filled(ellipse(42, 84, 22, 9), paint.belly)
        svg += coat(ellipse(42, 66, 28 * who.stout, 17), (38, 64, 28, 17), who, paint, belly)
        for x in (18, 50):
            svg += filled(box(x, 71, 10, 25, 5), paint.main, paint.line)
        head = moved(animal_head(who, paint, pose), 68, 42 + drop, 0.92 * who.head, 0.7 * pose.tilt)
        if who.accessory == "scarf":
            return svg + at_neck(who, paint, 65, 68, 13) + head
        return svg + head + at_neck(who, paint, 66, 68, 13)
    svg = tail(who, paint, 64, 86, pose.tail, 1)
    width = 20 * who.stout
    belly = filled(ellipse(50, 84, 0.6 * width, 13), paint.belly)
    svg += coat(ellipse(50, 77, width, 20), (50, 74, width, 18), who, paint, belly)
    for side, up in zip((-1, 1), pose.arms):
        svg += filled(ellipse(50 + 12 * side, 94, 9, 5), paint.main, paint.line)
        x, y, turn = (24, 66, 55 * side) if up else (15, 78, 10 * side)
        svg += filled(ellipse(50 + side * x * who.stout, y, 5.5, 11.5, turn), paint.main, paint.line)
    head = moved(animal_head(who, paint, pose), 50, 39 + drop, 1.02 * who.head, pose.tilt)
    if who.accessory == "scarf":
        return svg + at_neck(who, paint, 50, 62 + drop, 17) + head
    return svg + head + at_neck(who, paint, 50, 65 + drop, 15)


# --- the others -------------------------------------------------------------------------------------------------------


def robot_head(who: Who, paint: Paint, pose: Pose) -> str:
    """A head at the origin, about 50 wide and 38 high, with its aerial or what it wears instead."""
    svg = ""
    if who.accessory not in ("hat", "crown"):
        svg += stroke("M0,-18 v-11", paint.line, 3) + filled(ellipse(0, -31, 4.6, 4.6), paint.accent, paint.line)
    for side in (-1, 1):
        svg += filled(box(26 * side - 4, -7, 8, 14, 3), paint.mark, paint.line)
    outline = ellipse(0, 0, 26, 20) if who.shape == 1 else box(-25, -19, 50, 38, (5, 0, 13)[who.shape])
    svg += coat(outline, (0, -11, 25, 12), who, paint)
    x = 3 * pose.gaze
    if who.eyes_count == 1:
        svg += eye(x, -2, 11, who, paint, pose.gaze)
    else:
        svg += "".join(eye(x + 11 * side, -2, 7.6, who, paint, pose.gaze) for side in (-1, 1))
    return svg + mouth(x, 11, 5, pose.mouth) + on_head(who, paint, 0, -18, 24)


def robot(who: Who, paint: Paint, pose: Pose) -> str:
    width = 18 * who.stout
    if pose.view == "portrait":
        body = coat(box(50 - 1.5 * width, 88, 3 * width, 30, 8), (50, 96, 28, 14), who, paint)
        return body + moved(robot_head(who, paint, pose), 50, 58, 1.55, pose.tilt) + at_neck(who, paint, 50, 91, 20)
    svg = ""
    for side, up in zip((-1, 1), pose.arms):
        x, y = 50 + (width + 13) * side, 48 if up else 80
        arm = f"M{50 + width * side:.1f},64 q{11 * side},{-2 if up else 3} {x - 50 - width * side:.1f},{y - 64:.1f}"
        svg += stroke(arm, paint.line, 5.5) + filled(ellipse(x, y, 5.4, 5.4), paint.accent, paint.line)
        svg += filled(box(50 + 9 * side - 4.5, 82, 9, 11, 2), paint.mark, paint.line)
        svg += filled(ellipse(50 + 10 * side, 94, 8.5, 4), paint.dark, paint.line)
    body = box(50 - width, 55, 2 * width, 30, (4, 14, 8)[who.shape])
    panel = filled(box(50 - 0.5 * width, 70, width, 10, 3), paint.belly, paint.line, 1.4)
    svg += coat(body, (50, 64, width, 15), who, paint) + panel
    drop = 4 if who.accessory in ("hat", "crown") else 0
    head = moved(robot_head(who, paint, pose), 50, 37 + drop, who.head, 0.7 * pose.tilt)
    if who.accessory == "scarf":
        return svg + at_neck(who, paint, 50, 58 + drop, 16) + head
    return svg + head + at_neck(who, paint, 50, 60 + drop, 14)


def bird(who: Who, paint: Paint, pose: Pose) -> str:
    head = coat(ellipse(0, 0, 19, 18), (0, -9, 18, 12), who, paint)
    if who.shape == 1 and who.accessory not in ("hat", "crown"):
        crest = path("M-4,-15 q-9,-14 1,-19 q1,8 6,10 q2,-8 7,-8 q0,10 -4,17 Z")
        head = filled(crest, paint.accent, paint.line, 1.6) + head
    beak = filled(path("M13,-2 l19,5 l-19,7 Z"), "#f4a422", INK, 1.6)
    head += beak + eye(4 + pose.gaze, -3, 7, who, paint, pose.gaze) + on_head(who, paint, -1, -15, 17)
    if pose.view == "portrait":
        body = coat(ellipse(44, 106, 34 * who.stout, 26), (44, 96, 32, 18), who, paint)
        return body + moved(head, 46, 56, 1.75, pose.tilt) + at_neck(who, paint, 46, 89, 21)
    svg = filled(path(f"M24,66 l-20,{-9 + 8 * pose.tail:.1f} l3,14 l16,9 Z"), paint.dark, paint.line)
    svg += stroke("M42,82 v12 h6 M54,82 v12 h6", "#d98a20", 3.4)
    chest = filled(ellipse(62, 76, 18, 13), paint.belly)
    svg += coat(ellipse(47, 66, 27 * who.stout, 21), (42, 62, 26, 18), who, paint, chest)
    lift = -34 if pose.arms[0] else -8
    wing = paint.mark if who.pattern != "plain" else paint.dark
    svg += filled(ellipse(36, 63, 15, 9 + who.shape, lift), wing, paint.line)
    neck = at_neck(who, paint, 62, 55, 14)
    return svg + moved(head, 66, 37, who.head, pose.tilt) + neck


def teapot(who: Who, paint: Paint, pose: Pose) -> str:
    height = (26, 23, 28)[who.shape]
    top, bottom = 66 - height, 66 + height
    handle = "M74,52 q24,-4 18,16 q-4,13 -22,12"
    svg = stroke(handle, paint.line, 9.5) + stroke(handle, paint.mark, 5.8)
    svg += filled(path("M26,64 q-16,-3 -17,-27 l9,-2 q3,18 16,18 Z"), paint.main, paint.line)
    svg += filled(box(36, bottom - 4, 28, 6, 3), paint.mark, paint.line)
    svg += coat(ellipse(48, 66, 29 * who.stout, height), (48, 58, 29, 0.8 * height), who, paint)
    svg += filled(ellipse(48, top + 3, 15, 5.5), paint.belly if who.pattern == "plain" else paint.mark, paint.line)
    if who.accessory not in ("hat", "crown"):
        svg += filled(ellipse(48, top - 5, 5, 5), paint.accent, paint.line)
    svg += on_head(who, paint, 48, top + 1, 19) + face(47, 66, 5, who, paint, pose)
    return moved(moved(svg + at_neck(who, paint, 47, bottom - 8, 22), -50, -60), 50, 60, 1.06, 0.7 * pose.tilt)


def mug(who: Who, paint: Paint, pose: Pose) -> str:
    width, round_ = 24 * who.stout, (4, 10, 18)[who.shape]
    loop = f"M{50 + width:.1f},52 q22,-2 20,16 q-2,15 -22,14"
    svg = stroke(loop, paint.line, 10) + stroke(loop, paint.mark, 6.2)
    svg += coat(box(50 - width, 40, 2 * width, 54, round_), (50, 62, width, 22), who, paint)
    svg += filled(ellipse(50, 41, width, 7), paint.belly, paint.line)
    svg += filled(ellipse(50, 42, 0.78 * width, 4.4), "#5a3722")
    if pose.arms[0]:
        svg += stroke("M42,30 q-5,-6 0,-11 q5,-5 0,-10 M57,30 q-5,-6 0,-11 q5,-5 0,-10", "#f4f4f8", 2.6)
    svg += on_head(who, paint, 50, 38, 22) + face(50, 66, 5.4, who, paint, pose)
    return moved(moved(svg + at_neck(who, paint, 50, 85, 22), -50, -60), 50, 60, 1.04, 0.7 * pose.tilt)


def car(who: Who, paint: Paint, pose: Pose) -> str:
    roof = (
        "M22,54 q5,-28 26,-28 h8 q17,0 24,28 Z",
        "M20,54 v-22 q0,-7 7,-7 h44 q8,0 10,29 Z",
        "M30,54 q12,-22 28,-22 q16,0 22,22 Z",
    )[who.shape]
    svg = filled(path(roof), paint.dark, paint.line)
    for window in ("M33,53 l6,-17 h11 v17 Z", "M55,53 v-17 h10 q6,5 9,17 Z"):
        svg += filled(path(window), "#d4ecfa", paint.line, 1.5)
    bumper = filled(box(0, 74, 100, 8), paint.belly)
    svg += coat(box(5, 52, 90, 28, 11), (48, 64, 44, 14), who, paint, bumper)
    for x in (26, 74):
        svg += filled(ellipse(x, 82, 12.5, 12.5), "#2a2a30", "#77777f") + filled(ellipse(x, 82, 5.4, 5.4), paint.accent)
    svg += eye(88, 63, 5.6, who, paint, pose.gaze) + on_head(who, paint, 50, 30 if who.shape != 2 else 35, 20)
    svg += at_neck(who, paint, 58 if who.accessory == "bow" else 50, 67, 30)
    return moved(moved(svg, -50, -60), 50, 60, 1.02, 0.5 * pose.tilt)


def house(who: Who, paint: Paint, pose: Pose) -> str:
    width = 29 * who.stout
    svg = filled(box(66, 20, 10, 22), paint.dark, paint.line)
    if pose.arms[0]:
        svg += filled(ellipse(73, 12, 5, 4), "#f2f2f6") + filled(ellipse(79, 6, 4, 3), "#f2f2f6")
    svg += coat(box(50 - width, 48, 2 * width, 47, 2), (50, 62, width, 20), who, paint)
    peak = (12, 24, 18)[who.shape]
    flat = 16 if who.shape == 1 else 0
    roof = path(f"M{44 - width:.1f},51 L{50 - flat},{peak} H{50 + flat} L{56 + width:.1f},51 Z")
    svg += filled(roof, paint.belly if who.pattern == "plain" else paint.mark, paint.line)
    svg += filled(path("M42,95 v-15 q8,-9 16,0 v15 Z"), paint.accent, paint.line)
    svg += filled(ellipse(54, 87, 1.3, 1.3), INK)
    svg += "".join(eye(50 + 15 * side, 66, 6.4, who, paint, pose.gaze) for side in (-1, 1))
    return svg + on_head(who, paint, 50, peak + 5, 20) + at_neck(who, paint, 50, 51, 24)


FIGURES = {"robot": robot, "bird": bird, "teapot": teapot, "mug": mug, "car": car, "house": house}
FIGURES |= dict.fromkeys(ANIMALS, animal)


def figure_svg(who: Who, pose: Pose) -> str:
    """The figure at its place on the canvas, with its shadow."""
    svg = FIGURES[who.kind](who, Paint.of(who), pose)
    if pose.view != "portrait":
        svg = f'<ellipse cx="50" cy="96" rx="34" ry="4.5" fill="#000" opacity="0.2"/>{svg}'
    across, x = (-pose.scale, 50 + pose.shift[0]) if pose.mirror else (pose.scale, 50 + pose.shift[0])
    # 98 is the ground that the figure keeps when it shrinks
    place = f"translate({x:.2f} {98 + min(0.0, pose.shift[1]):.2f}) scale({across:.3f} {pose.scale * pose.squash:.3f})"
    return f'<g transform="{place} translate(-50 -98)">{svg}</g>'
