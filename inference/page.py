"""The gallery's page: pictures side by side in one HTML file that fetches nothing and works from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL.Image import Image

from storage.pictures import png_bytes

UNKNOWN = "–"
LARGEST_PNG = 256  # pixels; above, a lossless file is many times WebP's and the page grows past what mail takes
WEBP_QUALITY = 90
PIXELATED = 128  # pixels; up to here a screen shows each pixel as a square, as smoothing would flatter the picture
THUMBNAIL = 320  # pixels, longest side of an instance image
SMALLEST_TILE, LARGEST_TILE = 240, 480  # pixels, on a wide screen
ENLARGED = 4  # a small picture is shown at most this many times its own size, unless that is too small a tile
NARROWEST_COLUMN = 140  # pixels; where columns would be narrower, rows wrap as on a phone
PHONE = 640


@dataclass(frozen=True)
class PageColumn:
    """One model: `figures` are what it cost ("Trainable parameters"), `scores` what it reached ("DINO")."""

    name: str
    subtitle: str
    figures: dict[str, str]
    scores: dict[str, str]


@dataclass(frozen=True)
class PagePicture:
    """One picture; `scale` and `step` are the adapter's, None where there is none (the base) or it isn't known."""

    scale: float | None
    step: int | None
    image: Image


@dataclass(frozen=True)
class Page:
    """What the page shows; `pictures` maps (column name, prompt, seed) to pictures and may lack some."""

    title: str
    settings: dict[str, str]
    columns: Sequence[PageColumn]
    prompts: Sequence[str]
    seeds: Sequence[int]
    pictures: Mapping[tuple[str, str, int], Sequence[PagePicture]]
    instances: Sequence[tuple[str, Image]] = ()
    findings: Sequence[str] = ()  # what the scores show, a sentence each


def render_page(page: Page) -> str:
    """The whole HTML file. Each picture is in it once."""
    places = {(column.name, prompt, seed) for column in page.columns for prompt in page.prompts for seed in page.seeds}
    assert page.pictures.keys() <= places, f"pictures without a place: {sorted(page.pictures.keys() - places)}"
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            "cells": [_cell(page.pictures.get((column.name, prompt, seed), ())) for column in page.columns],
        }
        for prompt in page.prompts
        for seed in page.seeds
    ]
    pictures = [picture for several in page.pictures.values() for picture in several]
    data = {
        "names": [column.name for column in page.columns],
        "steps": sorted({picture.step for picture in pictures} - {None}),
        "scales": sorted({picture.scale for picture in pictures} - {None}),
        "rows": [{**row, "cells": [cell["pictures"] if cell else [] for cell in row["cells"]]} for row in rows],
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("gallery.html.j2").render(
        page=page,
        figures=list(dict.fromkeys(label for column in page.columns for label in column.figures)),
        unknown=UNKNOWN,
        rows=rows,
        data=data,
        instances=[{"name": name, **_picture(_thumbnail(image))} for name, image in page.instances],
        tile=min(LARGEST_TILE, max([SMALLEST_TILE, *(ENLARGED * picture.image.width for picture in pictures)])),
        narrow=max(PHONE, NARROWEST_COLUMN * len(page.columns)),
    )


def _cell(drawn: Sequence[PagePicture]) -> dict[str, Any] | None:
    """A place of the grid: the picture that it shows at first, as a URI of its own, and all its pictures."""
    if not drawn:
        return None
    pictures = [{"step": one.step, "scale": one.scale, **_picture(one.image)} for one in drawn]
    first = max(pictures, key=lambda one: (one["step"] or 0, -abs(1 - (1 if one["scale"] is None else one["scale"]))))
    return {
        **first,
        "pixelated": max(first["width"], first["height"]) <= PIXELATED,
        # the first is in the file once: the script takes its URI from the cell's own image
        "pictures": [{**picture, "uri": None} if picture is first else picture for picture in pictures],
    }


def _picture(image: Image) -> dict[str, Any]:
    return {"uri": _data_uri(image), "width": image.width, "height": image.height}


def _data_uri(image: Image) -> str:
    if max(image.size) <= LARGEST_PNG:
        kind, content = "png", png_bytes(image)
    else:
        stream = io.BytesIO()
        image.save(stream, format="WEBP", quality=WEBP_QUALITY)
        kind, content = "webp", stream.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _thumbnail(image: Image) -> Image:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))  # in place, and never larger than it was
    return image
