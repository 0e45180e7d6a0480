"""The gallery's page: pictures side by side in one HTML file that fetches nothing and works from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL.Image import Image

from storage.pictures import png_bytes

UNKNOWN = "–"
LARGEST_PNG = 256  # pixels; above, a lossless file is many times WebP's and the page grows past what mail takes
WEBP_QUALITY = 90
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
    """One picture; `scale` and `step` are the adapter's, None where there is none (the base) or it isn't known.

    Args:
        command: draws it again.
    """

    scale: float | None
    step: int | None
    image: Image
    command: str | None = None


@dataclass(frozen=True)
class Page:
    """What the page shows; `pictures` maps (column name, prompt, seed) to pictures and may lack some.

    Args:
        scores: (column name, prompt, seed) -> label -> score of that one picture; rows can be sorted by them.
        findings: what the scores show, a sentence each.
    """

    title: str
    settings: dict[str, str]
    columns: Sequence[PageColumn]
    prompts: Sequence[str]
    seeds: Sequence[int]
    pictures: Mapping[tuple[str, str, int], Sequence[PagePicture]]
    instances: Sequence[tuple[str, Image]] = ()
    findings: Sequence[str] = ()
    scores: Mapping[tuple[str, str, int], Mapping[str, float]] = field(default_factory=dict)


def render_page(page: Page) -> str:
    """The whole HTML file. Each picture is in it once."""
    known = {(column.name, prompt, seed) for column in page.columns for prompt in page.prompts for seed in page.seeds}
    assert page.pictures.keys() <= known, f"pictures without a place: {sorted(page.pictures.keys() - known)}"
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
        "rows": [
            {
                **row,
                "cells": [cell["pictures"] if cell else [] for cell in row["cells"]],
                "scores": [
                    dict(page.scores.get((column.name, row["prompt"], row["seed"]), {})) for column in page.columns
                ],
            }
            for row in rows
        ],
    }
    scored = {column.name: [] for column in page.columns}
    for (name, _, _), scores in page.scores.items():
        scored[name] = list(dict.fromkeys([*scored[name], *scores]))
    return render_template(
        "gallery.html.j2",
        page=page,
        figures=list(dict.fromkeys(label for column in page.columns for label in column.figures)),
        unknown=UNKNOWN,
        rows=rows,
        data=data,
        sorts=[(place, name, label) for place, name in enumerate(scored) for label in scored[name]],
        instances=[{"name": name, **picture_data(_thumbnail(image))} for name, image in page.instances],
        tile=min(LARGEST_TILE, max([SMALLEST_TILE, *(ENLARGED * picture.image.width for picture in pictures)])),
        narrow=max(PHONE, NARROWEST_COLUMN * len(page.columns)),
    )


def render_template(name: str, **values: Any) -> str:
    """A page of templates/, every text in it escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def _cell(drawn: Sequence[PagePicture]) -> dict[str, Any] | None:
    """A place of the grid: the picture that it shows at first, as a URI of its own, and all its pictures."""
    if not drawn:
        return None
    pictures = [
        {"step": one.step, "scale": one.scale, "command": one.command, **picture_data(one.image)} for one in drawn
    ]
    first = max(pictures, key=lambda one: (one["step"] or 0, -abs(1 - (1 if one["scale"] is None else one["scale"]))))
    return {
        **first,
        # the first is in the file once: the script takes its URI from the cell's own image
        "pictures": [{**picture, "uri": None} if picture is first else picture for picture in pictures],
    }


def picture_data(image: Image, quality: int | None = None) -> dict[str, Any]:
    """A picture as a data URI, and its size in pixels.

    Args:
        quality: of a WebP; None: what the gallery shows, a PNG up to 256 pixels.
    """
    if quality is None and max(image.size) <= LARGEST_PNG:
        kind, content = "png", png_bytes(image)
    else:
        stream = io.BytesIO()
        image.save(stream, format="WEBP", quality=quality or WEBP_QUALITY)
        kind, content = "webp", stream.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"uri": uri, "width": image.width, "height": image.height}


def _thumbnail(image: Image) -> Image:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))  # in place, and never larger than it was
    return image
