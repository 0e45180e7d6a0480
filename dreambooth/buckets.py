"""Aspect-ratio buckets: the shapes that pictures are trained in."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string

# (height, width) of SDXL's own multi-aspect training, arXiv 2307.01952, appendix I.
_TALL = [
    (2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640),
    (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832),
    (1152, 896), (1088, 896), (1088, 960), (1024, 960),
]  # fmt: skip
SDXL_RESOLUTION = 1024
SDXL_BUCKETS = [*_TALL, (1024, 1024), *((width, height) for height, width in reversed(_TALL))]


def read_buckets(text: str | None, resolution: int, granularity: int) -> list[tuple[int, int]]:
    """(height, width) of the shapes to train in.

    Args:
        text: of ``--aspect_ratio_buckets``: None for a square, "sdxl", or "height,width;height,width".
        resolution: pixels; "sdxl" shapes have about its square, and at 1024 they are SDXL's own.
        granularity: pixels that the UNet's coarsest level needs a side to be a multiple of.

    Raises:
        ValueError: if the text is no list of shapes, or a shape is too fine for the base.
    """
    if text is None:
        if resolution % granularity:
            raise ValueError(f"--resolution {resolution} must be a multiple of {granularity}, what this base needs")
        return [(resolution, resolution)]
    if text == "sdxl":
        if resolution == SDXL_RESOLUTION:
            return SDXL_BUCKETS
        step = 64 if resolution >= 512 else granularity
        return generate_aspect_ratio_buckets(resolution, divisibility=step, base_resolutions=SDXL_BUCKETS)
    try:
        buckets = parse_buckets_string(text)
    except ValueError as error:
        raise ValueError(
            f'--aspect_ratio_buckets "{text}": {error} Say "sdxl", or pairs such as "1024,1024;832,1216"'
        ) from error
    for height, width in buckets:
        if height % granularity or width % granularity:
            raise ValueError(
                f"--aspect_ratio_buckets {height},{width} must be multiples of {granularity}, what this base needs"
            )
    return list(dict.fromkeys(buckets))


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape is nearest to a picture's ``size``, both (height, width)."""
    return buckets[find_nearest_bucket(*size, buckets)]
