"""Who a figure is, what it does, and which settings of "who" the pretraining never shows.

A subject is one setting of ``Who``; its pictures differ in ``Pose`` and in the place. All draws come from the generator
that is passed in, so a picture is a function of its seed.
"""

from dataclasses import dataclass, replace

import numpy as np

# Kind of figure -> share of the pictures.
KINDS = {
    "cat": 3.0,
    "dog": 2.5,
    "robot": 2.5,
    "teapot": 2.0,
    "rabbit": 1.5,
    "bear": 1.5,
    "fox": 1.5,
    "bird": 1.0,
    "car": 1.0,
    "mug": 1.0,
    "house": 1.0,
}
ANIMALS = ("cat", "dog", "rabbit", "bear", "fox")

COLORS = {
    "red": (214, 48, 49),
    "orange": (243, 142, 38),
    "yellow": (248, 214, 72),
    "green": (72, 168, 76),
    "teal": (28, 152, 150),
    "blue": (46, 98, 214),
    "purple": (134, 74, 194),
    "pink": (244, 152, 190),
    "brown": (138, 90, 56),
    "gray": (146, 149, 154),
    "white": (242, 242, 242),
    "black": (44, 44, 50),
}
EYE_COLORS = ("green", "blue", "orange", "brown", "black", "purple")
ACCENT_COLORS = ("red", "yellow", "blue", "green", "purple", "orange", "pink", "white")
PATTERNS = ("plain", "stripes", "spots", "patch")
ACCESSORIES = ("none", "scarf", "hat", "bow", "crown")
VIEWS = ("sitting", "portrait", "standing")

JITTER = 13  # of 255: how far a colour may lie from the one its name stands for


@dataclass(frozen=True)
class Who:
    """What stays the same in every picture of a subject.

    Attributes:
        kind: one of ``KINDS``.
        main, second, eyes, accent: names of colours; ``second`` paints the pattern and, without one, the belly;
            ``accent`` paints the accessory and small parts.
        pattern, accessory: one of ``PATTERNS`` and of ``ACCESSORIES``.
        eye_style, shape: 0 to 2; ``shape`` is the form of ears or of the body.
        stout, head: factors around 1 for the width of the body and the size of the head.
        eyes_count: 2, or 1 for some robots.
        shades: seed of the small differences from the named colours.
    """

    kind: str
    main: str
    second: str
    eyes: str = "green"
    accent: str = "red"
    pattern: str = "plain"
    accessory: str = "none"
    eye_style: int = 0
    shape: int = 0
    stout: float = 1.0
    head: float = 1.0
    eyes_count: int = 2
    shades: int = 0

    def rgb(self, role: str) -> tuple[float, ...]:
        """The colour of ``main``, ``second``, ``eyes`` or ``accent``: the named one within ``JITTER``."""
        order = ("main", "second", "eyes", "accent").index(role)
        shift = np.random.default_rng((self.shades, order)).integers(-JITTER, JITTER + 1, 3)
        return tuple(float(c) for c in np.clip(np.array(COLORS[getattr(self, role)]) + shift, 0, 255))


@dataclass(frozen=True)
class Pose:
    """What changes from picture to picture of a subject; angles in degrees, lengths in percent of the picture."""

    view: str = "sitting"
    tilt: float = 0.0
    arms: tuple[bool, bool] = (False, False)  # left, right raised
    tail: float = 0.0  # -1 to 1
    gaze: float = 0.0  # -1 to 1
    mouth: int = 0
    mirror: bool = False
    squash: float = 1.0
    scale: float = 0.95
    shift: tuple[float, float] = (0.0, 0.0)


def views_of(kind: str) -> tuple[str, ...]:
    """Animals sit, stand or are seen from near; robots don't sit; everything else only stands."""
    if kind in ANIMALS:
        return VIEWS
    return VIEWS[1:] if kind in ("robot", "bird") else VIEWS[2:]


def draw_who(rng: np.random.Generator, kind: str | None = None) -> Who:
    """Any setting, those that ``kept_out`` names included."""
    shares = np.array(list(KINDS.values()))
    kind = kind or str(rng.choice(list(KINDS), p=shares / shares.sum()))
    main = str(rng.choice(list(COLORS)))
    return Who(
        kind=kind,
        main=main,
        second=str(rng.choice([color for color in COLORS if color != main])),
        eyes=str(rng.choice(EYE_COLORS)),
        accent=str(rng.choice([color for color in ACCENT_COLORS if color != main])),
        pattern=str(rng.choice(PATTERNS, p=(0.34, 0.22, 0.22, 0.22))),
        accessory=str(rng.choice(ACCESSORIES, p=(0.44, 0.16, 0.14, 0.14, 0.12))),
        eye_style=int(rng.integers(3)),
        shape=int(rng.integers(3)),
        stout=float(rng.uniform(0.88, 1.12)),
        head=float(rng.uniform(0.92, 1.1)),
        eyes_count=int(rng.choice([1, 2, 2])) if kind == "robot" else 2,
        shades=int(rng.integers(2**31)),
    )


def draw_pose(rng: np.random.Generator, kind: str) -> Pose:
    views = views_of(kind)
    chances = {3: (0.45, 0.25, 0.3), 2: (0.25, 0.75), 1: (1.0,)}[len(views)]
    return Pose(
        view=str(rng.choice(views, p=chances)),
        tilt=float(rng.uniform(-11, 11)),
        arms=(bool(rng.random() < 0.35), bool(rng.random() < 0.35)),
        tail=float(rng.uniform(-1, 1)),
        gaze=float(rng.uniform(-1, 1)),
        mouth=int(rng.integers(3)),
        mirror=bool(rng.random() < 0.5),
        squash=float(rng.uniform(0.95, 1.05)),
        scale=float(rng.uniform(0.84, 1.02)),
        shift=(float(rng.uniform(-7, 7)), float(rng.uniform(-3, 3))),
    )


# The sample subjects of assets/subjects.
SUBJECTS = {
    "cat": Who("cat", "teal", "orange", "green", "purple", "stripes", "scarf", 0, 0, 1.0, 1.05, shades=1),
    "dog": Who("dog", "white", "brown", "brown", "red", "patch", "bow", 2, 1, 1.05, 1.0, shades=2),
    "robot": Who("robot", "yellow", "blue", "blue", "red", "stripes", "none", 0, 1, 1.0, 1.0, 1, shades=3),
    "teapot": Who("teapot", "blue", "yellow", "black", "orange", "spots", "none", 2, 0, 1.05, 1.0, shades=4),
    "rabbit": Who("rabbit", "pink", "purple", "blue", "yellow", "spots", "crown", 0, 1, 0.95, 1.0, shades=5),
    "fox": Who("fox", "green", "yellow", "orange", "blue", "plain", "hat", 1, 0, 0.95, 1.05, shades=6),
}


def in_reserve(who: Who) -> bool:
    """Whether the setting belongs to the sixteenth of all settings from which further subjects are drawn.

    A linear code over main and second colour, pattern and accessory: every colour, pattern and accessory is in the
    pretraining, and so is every pair of them; only these combinations are not.
    """
    colors = list(COLORS)
    code = colors.index(who.main) + 5 * colors.index(who.second)
    return (code + 3 * PATTERNS.index(who.pattern) + 7 * ACCESSORIES.index(who.accessory)) % 16 == 0


def is_near(who: Who, other: Who) -> bool:
    """Same kind, and at least three of main colour, second colour, pattern and accessory in common."""
    shared = sum(getattr(who, name) == getattr(other, name) for name in ("main", "second", "pattern", "accessory"))
    return who.kind == other.kind and shared >= 3


def kept_out(who: Who) -> bool:
    """Whether no training of the base, its judges or the attribute reader may show this setting."""
    return in_reserve(who) or any(is_near(who, subject) for subject in SUBJECTS.values())


def draw_known_who(rng: np.random.Generator) -> Who:
    """A setting for the pretraining: drawn again until it is not kept out."""
    while kept_out(who := draw_who(rng)):
        pass
    return who


def draw_new_subject(rng: np.random.Generator, kind: str) -> Who:
    """A setting of the reserve that is near no sample subject: another subject to tune or to score on."""
    while True:
        who = draw_who(rng, kind)
        if in_reserve(who) and not any(is_near(who, subject) for subject in SUBJECTS.values()):
            return who


def with_pose(pose: Pose, **changes) -> Pose:
    return replace(pose, **changes)
