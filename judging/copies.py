"""Copies of training images among drawn ones: pictures whose parts lie as they lie in a training image.

Pictures are compared as fields of edge directions: the structure tensor of all three colours (Di Zenzo, Computer
Vision, Graphics, and Image Processing 33, 1986), its contrast evened out, its angle doubled, because an edge has a
direction and no sign. So neither brightness nor hue matters. A training image, in its mirror image and at nine sizes,
is laid over the picture at every shift, by normalised cross-correlation (Lewis, Vision Interface 1995). Two things are
measured at the best places:

- `whole`: the correlation of all that overlaps. A copy has a high one however it was moved, recoloured or softened.
- `part`: how much of the training image lies in the picture exactly: the mean over its edges of r^12, r the correlation
  in a window of a seventh of its width. A copy before another background has it where the subject is, while other
  pictures of the subject are alike nearly everywhere and the same almost nowhere.

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
WINDOW, EXACT = 7, 12  # cells across a part, and the power by which only what is the same counts: 0.95 is 0.54
OVERLAP, COVERED = 0.45, 0.3  # shares of the training image's and of the picture's edges that must lie on each other
SAME = 0.87  # correlation from which two training images are one that is there twice
FALSE_ALARM_RATE = 0.05  # of the pictures of a run that copies nothing, at most; docs/judging.md has what was measured
LEVEL = 0.05


class Likeness(NamedTuple):
    """Of a picture with the training image that is most like it; both from 0 to 1."""

    whole: float
    part: float


WAY = Likeness(0.5, 0.2)  # from the training images' own likeness to 1: where the limit lies
FLOOR = Likeness(0.84, 0.25)
# The likeness that stands in for a lone training image's, as high as that of drawings of one figure; a choice.
LONE = Likeness(0.8, 0.7)


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
        self._shapes: dict[tuple[int, int], tuple[list[torch.Tensor], Likeness]] = {}

    def count(self, images: Sequence[Image.Image]) -> Copies:
        return Copies.of(sum(self.copied(images)), len(images))

    def copied(self, images: Sequence[Image.Image]) -> list[bool]:
        """Of each picture, whether it is a copy."""
        limits = torch.tensor([self.shape(image.size)[1] for image in images])
        return (self.likenesses(images).amax(dim=1) > limits).any(dim=1).tolist()

    def likenesses(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(N, M, 2) `Likeness` of each picture with each training image."""
        return torch.stack([likeness(edges([one], GRID)[0], self.shape(one.size)[0]) for one in images])

    def shape(self, size: tuple[int, int]) -> tuple[list[torch.Tensor], Likeness]:
        """Templates and limits for pictures of a shape; training images are cropped to it, as training crops them."""
        if size not in self._shapes:
            views = [crops(image, size) for image in self.instances]
            templates = [torch.stack([_both_ways(view, round(GRID * scale)) for view in views]) for scale in SCALES]
            self._shapes[size] = templates, limits([view[0] for view in views], templates)
        return self._shapes[size]


def limits(instances: Sequence[Image.Image], templates: Sequence[torch.Tensor]) -> Likeness:
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


def _both_ways(views: Sequence[Image.Image], size: int) -> torch.Tensor:
    """(2 · views, 2, size, size) edges of each and of its mirror image."""
    return edges([*views, *map(ImageOps.mirror, views)], size)


def likeness(picture: torch.Tensor, templates: Sequence[torch.Tensor]) -> torch.Tensor:
    """(M, 2) `Likeness` of a picture (2, GRID, GRID) with each training image, (M, V, 2, n, n) for each size n."""
    found = []
    for views in templates:
        like = torch.stack(_overlay(picture, views.flatten(0, 1)), dim=1)  # (M · V, 2)
        found.append(like.unflatten(0, views.shape[:2]).amax(dim=1))
    return torch.stack(found).amax(dim=0)


def _overlay(picture: torch.Tensor, templates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) correlations of the whole and of the best part, over all shifts of templates (T, 2, n, n)."""
    count, _, size, _ = templates.shape
    # a product of small factors: other lengths take several times as long
    period, centre = -(-(size + GRID) // 16) * 16, (GRID - size) // 2
    strength, own = picture.square().sum(dim=0), templates.square().sum(dim=1)  # (GRID, GRID), (T, n, n)

    def correlate(field: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
        """Σ_p field(p + d) · template(p) at each shift d: (…, 2 · SHIFT + 1, 2 · SHIFT + 1)."""
        product = torch.fft.rfft2(field, s=(period, period)) * torch.fft.rfft2(template, s=(period, period)).conj()
        shifts = torch.arange(centre - SHIFT, centre + SHIFT + 1) % period
        return torch.fft.irfft2(product, s=(period, period))[..., shifts, :][..., shifts]

    product = correlate(picture[None], templates).sum(dim=1)
    under, over = correlate(strength, torch.ones(size, size)), correlate(torch.ones(GRID, GRID), own)
    whole = product / (under * over).clamp(min=1e-6).sqrt()
    enough = (over > OVERLAP * own.sum(dim=(1, 2), keepdim=True)) & (under > COVERED * strength.sum())
    whole = torch.where(enough, whole, 0.0)
    peaks = torch.where(whole == functional.max_pool2d(whole[:, None], 5, 1, 2)[:, 0], whole, 0.0)
    places = peaks.flatten(1).topk(PEAKS, dim=1).indices.flatten()  # (T · PEAKS)
    span = 2 * SHIFT + 1
    rows, columns = ((one - SHIFT + centre).tolist() for one in (places // span, places % span))
    # two fields of directions and one of ones, to know where the picture is
    padded = functional.pad(torch.cat([picture, torch.ones(1, GRID, GRID)]), (size,) * 4)
    under_it = torch.stack([padded[:, size + y : 2 * size + y, size + x : 2 * size + x] for y, x in zip(rows, columns)])
    template, energy = templates.repeat_interleave(PEAKS, dim=0), own.repeat_interleave(PEAKS, dim=0)
    sums = torch.stack(
        [(under_it[:, :2] * template).sum(dim=1), under_it[:, :2].square().sum(dim=1), energy * under_it[:, 2]], dim=1
    )
    product, under, over = _windows(sums, round(WINDOW * size / GRID) // 2 * 2 + 1).unbind(dim=1)
    agreement = (product / (under * over).clamp(min=1e-4).sqrt()).clamp(0, 1)
    weight = energy.sqrt()
    part = (weight * agreement**EXACT).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-6)
    return whole.amax(dim=(1, 2)), part.unflatten(0, (count, PEAKS)).amax(dim=1)


def _windows(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Sums over the square window of an odd width around each place, by running sums; (N, C, H, W)."""
    half = width // 2
    for dim in (2, 3):
        sides = (0, 0, half + 1, half) if dim == 2 else (half + 1, half, 0, 0)
        running = functional.pad(fields, sides).cumsum(dim=dim)
        size = running.shape[dim] - width
        fields = running.narrow(dim, width, size) - running.narrow(dim, 0, size)
    return fields.clamp(min=0)  # rounding takes a sum of nothing below 0
