"""Copies of training images among drawn ones: pictures whose parts lie as they lie in a training image.

Pictures are compared as fields of edge directions: the structure tensor of all three colours (Di Zenzo, Computer
Vision, Graphics, and Image Processing 33, 1986), its contrast evened out, its angle doubled, because an edge has a
direction and no sign. So neither brightness nor hue matters. A training image, in its mirror image and at nine sizes,
is laid over the picture at every shift, by normalised cross-correlation (Lewis, Vision Interface 1995). Two things are
measured at the best places:

- `whole`: the correlation of all that overlaps. A copy has a high one however it was moved, recoloured or softened.
- `part`: how exactly the best part of the training image, half as wide and high, lies in the picture: the mean over
  that part's edges of r^4, r the correlation in a window of a seventh of the training image's width. A copy before
  another background has such a part where the subject is, while other pictures of the subject are alike nearly
  everywhere and the same in small places only.

How alike other pictures of a subject are depends on the subject: drawings repeat their parts, photographs never do. So
the limits of both come from the run's own training images, each compared with the others; see `limits`. docs/judging.md
has the errors that were measured (`python -m benchmarks.copies`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional

GRID = 48  # cells across a picture
SCALES = (0.64, 0.72, 0.8, 0.9, 1.0, 1.11, 1.25, 1.39, 1.56)
SHIFT = 14  # cells that a training image is moved at most, from centre on centre
PEAKS = 3  # places of each size that are looked at in parts
WINDOW, EXACT = 7, 4  # cells across a place, and the power by which only what is the same counts: 0.95 is 0.81
PART, EDGES = 0.5, 0.6  # side of a part, and the edges that it needs, as a share of what such a part has in the mean
OVERLAP, COVERED = 0.45, 0.3  # shares of the training image's and of the picture's edges that must lie on each other
SAME = 0.87  # correlation from which two training images are one that is there twice
FALSE_ALARM_RATE = 0.05  # of the pictures of a run that copies nothing: as measured, no bound; see docs/judging.md
LEVEL = 0.05


class Likeness(NamedTuple):
    """Of a picture with the training image that is most like it; both from 0 to 1."""

    whole: float
    part: float


WAY = Likeness(0.5, 0.18)  # from the training images' own likeness to 1: where the limit lies
FLOOR = Likeness(0.84, 0.75)
# The likeness that stands in for a lone training image's, as high as that of drawings of one figure; a choice.
LONE = Likeness(0.8, 0.9)


@dataclass(frozen=True)
class Copies:
    """How many pictures are copies of training images, and whether that is more than the detector's own errors.

    Args:
        p_value: the chance of so many or more, were each taken for a copy falsely at `false_alarm_rate`.
    """

    count: int
    pictures: int
    false_alarm_rate: float
    p_value: float
    alarm: bool

    @classmethod
    def of(cls, count: int, pictures: int) -> Copies:
        from scipy import stats

        p = float(stats.binomtest(count, pictures, FALSE_ALARM_RATE, alternative="greater").pvalue)
        return cls(count, pictures, FALSE_ALARM_RATE, p, p < LEVEL)

    @classmethod
    def sum(cls, several: Sequence[Copies | Mapping[str, Any]]) -> Copies:
        """Of several trainings."""
        fields = [one.fields() if isinstance(one, Copies) else one for one in several]
        return cls.of(sum(one["count"] for one in fields), sum(one["pictures"] for one in fields))

    @property
    def share(self) -> float:
        return self.count / self.pictures

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class CopyDetector:
    """Finds copies of a run's training images; deterministic, on the CPU.

    Args:
        instances: the training images; what is there twice counts once.
    """

    def __init__(self, instances: Sequence[Image.Image]) -> None:
        self.instances = [image.convert("RGB") for image in instances]
        self._shapes: dict[tuple[int, int], tuple[list[Templates], Likeness]] = {}

    def count(self, images: Sequence[Image.Image]) -> Copies:
        return Copies.of(sum(self.copied(images)), len(images))

    def copied(self, images: Sequence[Image.Image]) -> list[bool]:
        """Of each picture, whether it is a copy."""
        limits = torch.tensor([self.shape(image.size)[1] for image in images])
        return (self.likenesses(images).amax(dim=1) > limits).any(dim=1).tolist()

    def likenesses(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, M, 2) `Likeness` of each picture with each training image."""
        return torch.stack([likeness(edges([one], GRID)[0], self.shape(one.size)[0]) for one in images])

    def shape(self, size: tuple[int, int]) -> tuple[list[Templates], Likeness]:
        """Templates and limits for pictures of a shape; training images are cropped to it, as training crops them."""
        if size not in self._shapes:
            views = [crops(image, size) for image in self.instances]
            templates = [Templates.of(views, round(GRID * scale)) for scale in SCALES]
            self._shapes[size] = templates, limits([view[0] for view in views], templates)
        return self._shapes[size]


def limits(instances: Sequence[Image.Image], templates: Sequence[Templates]) -> Likeness:
    """What a picture must exceed to be a copy, from how alike the training images are.

    With L the likeness of the two training images that are most like each other, and 1 that of a picture with itself,
    the limit lies `WAY` from L to 1, and never below `FLOOR`. What is there twice counts once.
    """
    found = torch.stack([likeness(field, templates) for field in edges(instances, GRID)])  # (M, M, 2)
    kept: list[int] = []
    for row in range(len(instances)):
        if not any(found[row, other, 0] > SAME for other in kept):
            kept.append(row)
    alike = list(LONE)
    if len(kept) > 1:
        between = found[kept][:, kept]
        between[range(len(kept)), range(len(kept))] = 0
        alike = between.amax(dim=(0, 1)).tolist()
    return Likeness(*(max(floor, one + way * (1 - one)) for floor, one, way in zip(FLOOR, alike, WAY)))


def crops(image: Image.Image, size: tuple[int, int]) -> list[Image.Image]:
    """What training sees of a picture: crops of the shape, at the centre and both ends; one if it has that shape."""
    whole = abs(image.width * size[1] / (image.height * size[0]) - 1) < 0.05
    return [ImageOps.fit(image, size, centering=(place, place)) for place in ((0.5,) if whole else (0.5, 0.0, 1.0))]


def edges(images: Sequence[Image.Image], size: int) -> torch.Tensor:
    """(N, 2, size, size) strength of edges times cosine and sine of twice their angle."""
    small = [
        np.asarray(image.convert("RGB").resize((size, size), _filter(image, size)), np.float32) for image in images
    ]
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255  # (N, 3, size, size)
    pixels = functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    across = (pixels[:, :, 1:-1, 2:] - pixels[:, :, 1:-1, :-2]) / 2
    down = (pixels[:, :, 2:, 1:-1] - pixels[:, :, :-2, 1:-1]) / 2
    tensor = [across.square() - down.square(), 2 * across * down, across.square() + down.square()]
    cosine, sine, energy = _blur(torch.stack([one.sum(dim=1) for one in tensor], dim=1), 0.8).unbind(dim=1)
    around = _blur(energy[:, None], size / 8)[:, 0]
    strength = energy.sqrt() / (around.sqrt() + 0.02)  # of the edge against those around it; 0.02: below is noise
    return torch.stack([cosine, sine], dim=1) * (strength / energy.clamp(min=1e-8))[:, None]


def _filter(image: Image.Image, size: int) -> Image.Resampling:
    return Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BICUBIC


def _blur(fields: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian, over the last two dimensions of (N, C, H, W)."""
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(fields.shape[1], 1, 1, -1)
    for line, pad in ((kernel, (radius, radius, 0, 0)), (kernel.transpose(2, 3), (0, 0, radius, radius))):
        fields = functional.conv2d(functional.pad(fields, pad, mode="replicate"), line, groups=fields.shape[1])
    return fields


class Templates(NamedTuple):
    """All training images at one size, each in several views: T = M · views."""

    fields: torch.Tensor  # (T, 2, n, n), see `edges`
    views: int
    spectrum: torch.Tensor  # of the fields
    covered: torch.Tensor  # (T, S, S) energy that lies on a picture, at each of S × S shifts

    @classmethod
    def of(cls, views: Sequence[Sequence[Image.Image]], size: int) -> Templates:
        """Of each training image's views and of their mirror images."""
        both = [[*own, *map(ImageOps.mirror, own)] for own in views]
        fields = torch.cat([edges(own, size) for own in both])
        spectrum = _spectrum(fields, size)
        energies = _spectrum(fields.square().sum(dim=1), size)
        return cls(fields, len(both[0]), spectrum, _correlate(torch.ones(GRID, GRID), energies, size))


def _spectrum(fields: torch.Tensor, size: int) -> torch.Tensor:
    # a multiple of 16: other lengths take several times as long
    period = -(-(size + GRID) // 16) * 16
    return torch.fft.rfft2(fields, s=(period, period))


def _correlate(picture: torch.Tensor, spectrum: torch.Tensor, size: int) -> torch.Tensor:
    """Σ_p picture(p + d) · template(p) at each shift d from centre on centre; (…, 2 · SHIFT + 1, 2 · SHIFT + 1).

    Args:
        picture: (…, GRID, GRID)
        spectrum: of templates (…, size, size).
    """
    correlation = torch.fft.irfft2(_spectrum(picture, size) * spectrum.conj())
    shifts = torch.arange(-SHIFT, SHIFT + 1) + (GRID - size) // 2
    return correlation[..., shifts % correlation.shape[-2], :][..., shifts % correlation.shape[-1]]


def likeness(picture: torch.Tensor, templates: Sequence[Templates]) -> torch.Tensor:
    """(M, 2) `Likeness` of a picture (2, GRID, GRID) with each training image, the highest of all sizes and views."""
    found = [_overlay(picture, one).unflatten(0, (-1, one.views)).amax(dim=1) for one in templates]
    return torch.stack(found).amax(dim=0)


def _overlay(picture: torch.Tensor, templates: Templates) -> torch.Tensor:
    """(T, 2) `Likeness` with each template at the shift that is best for it."""
    fields, size = templates.fields, templates.fields.shape[-1]
    strength, energy = picture.square().sum(dim=0), fields.square().sum(dim=1)  # (GRID, GRID), (T, n, n)
    under = _correlate(strength, _spectrum(torch.ones(size, size), size), size)
    whole = _correlate(picture, templates.spectrum, size).sum(dim=1)
    whole = whole / (under * templates.covered).clamp(min=1e-6).sqrt()
    enough = templates.covered > OVERLAP * energy.sum(dim=(1, 2))[:, None, None]
    whole = torch.where(enough & (under > COVERED * strength.sum()), whole, 0.0)
    peaks = torch.where(whole == functional.max_pool2d(whole[:, None], 5, 1, 2)[:, 0], whole, 0.0)
    places = peaks.flatten(1).topk(PEAKS, dim=1).indices.flatten()  # (T · PEAKS)
    span, first = 2 * SHIFT + 1, (GRID - size) // 2 - SHIFT
    # two fields of edges and one of ones, which says where the picture is
    padded = functional.pad(torch.cat([picture, torch.ones(1, GRID, GRID)]), (size,) * 4)
    corners = zip((places // span + first + size).tolist(), (places % span + first + size).tolist())
    below = torch.stack([padded[:, top : top + size, left : left + size] for top, left in corners])
    fields, energy = fields.repeat_interleave(PEAKS, dim=0), energy.repeat_interleave(PEAKS, dim=0)
    sums = [(below[:, :2] * fields).sum(dim=1), below[:, :2].square().sum(dim=1), energy * below[:, 2]]
    product, under, over = _windows(torch.stack(sums, dim=1), _odd(WINDOW * size / GRID)).unbind(dim=1)
    agreement = (product / (under * over).clamp(min=1e-4).sqrt()).clamp(0, 1)
    weight, side = energy.sqrt(), _odd(PART * size)
    agreeing, edges_there = _windows(torch.stack([weight * agreement**EXACT, weight], dim=1), side).unbind(dim=1)
    needed = EDGES * side**2 * weight.mean(dim=(1, 2))
    parts = torch.where(edges_there > needed[:, None, None], agreeing / edges_there.clamp(min=1e-6), 0.0)
    part = parts.amax(dim=(1, 2))
    return torch.stack([whole.amax(dim=(1, 2)), part.unflatten(0, (-1, PEAKS)).amax(dim=1)], dim=1)


def _odd(width: float) -> int:
    return round(width) // 2 * 2 + 1


def _windows(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Sums over the square window of an odd width around each place, by running sums; (N, C, H, W)."""
    half = width // 2
    for dim in (2, 3):
        sides = (0, 0, half + 1, half) if dim == 2 else (half + 1, half, 0, 0)
        running = functional.pad(fields, sides).cumsum(dim=dim)
        size = running.shape[dim] - width
        fields = running.narrow(dim, width, size) - running.narrow(dim, 0, size)
    return fields.clamp(min=0)  # rounding takes a sum of nothing below 0
