"""Small pictures to write to files of every kind."""

import io

import numpy as np
from PIL import Image


def ramp(mode="RGB", size=(48, 32)):
    width, height = size
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


def encoded(image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
