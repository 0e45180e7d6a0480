"""Base and adapters side by side, prompts × seeds, as one self-contained HTML page and one PNG sheet.

    python -m inference.gallery --base assets/tiny-sdxl --adapters lora=out/lora nora=out/nora \
        --prompts "[V] photo of a cat" "[V] photo of a cat in the jungle" --seeds 0 1 --output out/gallery.html
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from inference.adapter_files import BASE_COLUMN, inspect_adapter, parse_named_adapters, read_run_record
from inference.cli import parse_config, quiet_libraries, run_command
from inference.components import FOLDED_WEIGHTS, INNER_WEIGHTS
from inference.generate import SamplingConfig, choose_base, generate_images, warn_of_truncated_prompts
from inference.load import load_adapter, unload_adapters
from storage.files import check_writable_target, write_atomic
from storage.pictures import find_images, open_image, png_bytes

UNKNOWN = "–"
METHOD_NAMES = {"nora": "NoRA", "lora": "LoRA", "dora": "DoRA"}
FIGURES = (
    "Method",
    "Rank of the update",
    "Outer rank",
    "Trainable parameters",
    "Adapter file (folded)",
    "Adapter file (inner only)",
    "Training time",
    "Seconds per step",
    "Steps",
    "Peak memory",
)
MIN_TILE, MAX_TILE = 192, 512  # pixels on the sheet: tiny bases stay visible, 1024 px ones stay mailable
THUMBNAIL = 320  # pixels, longest side of an instance image on the page


@dataclass
class GalleryConfig(SamplingConfig):
    """Flags of `python -m inference.gallery`."""

    adapters: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "NAME=PATH for each column beside the base."}
    )
    prompts: list[str] | None = field(
        default=None, metadata={"aliases": ["--prompt"], "action": "extend", "help": "One block of rows each."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"action": "extend", "help": "One row per prompt each. Default: 0 1."}
    )
    instance_images: str | None = field(
        default=None, metadata={"help": "Folder of the subject's training images, shown on top."}
    )
    output: str = field(default="out/gallery.html", metadata={"help": "The page; the sheet is beside it as .png."})


@dataclass(frozen=True)
class Column:
    """One model of the comparison: `path` is None for the base."""

    name: str
    path: Path | None
    figures: dict[str, str]

    @property
    def subtitle(self) -> str:
        if self.path is None:
            return "no adapter"
        parameters = self.figures["Trainable parameters"]
        method, rank = self.figures["Method"], self.figures["Rank of the update"]
        known = {f"rank {rank}": rank, f"{parameters} trained": parameters}
        if method.lower() != self.name.lower():
            known = {method: method, **known}
        return ", ".join(text for text, value in known.items() if value != UNKNOWN)


# --- what is shown ----------------------------------------------------------------------------------------------------


def adapter_figures(path: Path) -> dict[str, str]:
    """What an adapter costs, from its run's record and its files; what isn't known is a dash."""
    record = read_run_record(path)
    config = record.get("config") or {}
    timings = record.get("timings") or {}
    method = record.get("method")
    folder = path if path.is_dir() else path.parent
    sizes = {
        name: (folder / name).stat().st_size for name in (FOLDED_WEIGHTS, INNER_WEIGHTS) if (folder / name).is_file()
    }
    if path.is_file() and not record:  # a file from elsewhere: only its own size is its own
        sizes = {(INNER_WEIGHTS if inspect_adapter(path).kind == "inner" else FOLDED_WEIGHTS): path.stat().st_size}
    values = (
        METHOD_NAMES.get(method, method),
        config.get("rank"),
        _outer_rank(record.get("outer_ranks") or [config.get("outer_rank")]),
        _format(record.get("trainable_parameters"), lambda count: f"{count:,}"),
        _format(sizes.get(FOLDED_WEIGHTS), _format_bytes),
        _format(sizes.get(INNER_WEIGHTS), _format_bytes),
        _format(timings.get("train_seconds"), _format_seconds),
        _format(timings.get("seconds_per_step"), lambda seconds: f"{seconds:.3g} s"),
        _format(config.get("max_train_steps"), lambda count: f"{count:,}"),
        _format(record.get("peak_memory_mb"), lambda megabytes: _format_bytes(megabytes * 1e6)),
    )
    return {label: UNKNOWN if value is None else str(value) for label, value in zip(FIGURES, values)}


def _outer_rank(ranks: list[int | None]) -> str | None:
    """Layers smaller than the outer rank get less: the range, where there is one."""
    return f"{ranks[0]} – {ranks[-1]}" if len(ranks) > 1 else ranks[0]


def _format(value: Any, formatter: Any) -> str | None:
    return formatter(value) if isinstance(value, (int, float)) else None


def _format_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def _format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


# --- the page ---------------------------------------------------------------------------------------------------------


def render_page(
    columns: Sequence[Column],
    images: dict[tuple[str, str, int], Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: dict[str, str],
    instances: Sequence[tuple[str, Image.Image]] = (),
) -> str:
    """The HTML page; `images` maps (column, prompt, seed) to its picture. Nothing in it is fetched from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )

    def cell(column: Column, prompt: str, seed: int) -> dict[str, Any]:
        image = images[column.name, prompt, seed]
        alt = f"{column.name}, seed {seed}: {prompt}"
        return {"uri": _data_uri(image), "width": image.width, "height": image.height, "alt": alt}

    rows = [
        {
            "prompt": prompt,
            "lines": [{"seed": seed, "cells": [cell(column, prompt, seed) for column in columns]} for seed in seeds],
        }
        for prompt in prompts
    ]
    return environment.get_template("gallery.html.j2").render(
        title="Side by side: " + ", ".join(column.name for column in columns),
        columns=columns,
        figures=FIGURES,
        rows=rows,
        tile=max(240, rows[0]["lines"][0]["cells"][0]["width"]),
        settings=settings,
        instances=[{"name": name, "uri": _data_uri(_shrink(image, THUMBNAIL))} for name, image in instances],
    )


def _data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def _shrink(image: Image.Image, longest: int) -> Image.Image:
    factor = min(1.0, longest / max(image.size))
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.LANCZOS)


# --- the sheet --------------------------------------------------------------------------------------------------------


def draw_sheet(
    columns: Sequence[Column],
    images: dict[tuple[str, str, int], Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    instances: Sequence[tuple[str, Image.Image]] = (),
) -> Image.Image:
    """One picture of the whole comparison, for READMEs and papers: columns are models, rows prompts × seeds."""
    width, height = next(iter(images.values())).size
    factor = min(max(width, height, MIN_TILE), MAX_TILE) / max(width, height)
    tile = (round(width * factor), round(height * factor))
    gap = max(4, tile[0] // 32)
    size = max(15, tile[0] // 11)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(12, round(size * 0.75)))
    margin = round(small.getlength(f"seed {max(seeds)}")) + 2 * gap
    sheet_width = margin + len(columns) * (tile[0] + gap) + gap
    line, small_line = round(size * 1.3), round(small.size * 1.3)

    # training images in one row: as wide together as the sheet, but no smaller than a quarter of a tile
    aspects = sum(image.width / image.height for _, image in instances)
    room = sheet_width - margin - len(instances) * gap
    strip_tile = max(tile[1] // 4, min(tile[1] * 3 // 4, int(room / aspects))) if instances else 0
    strip = [_fit_height(image, strip_tile) for _, image in instances]
    headers = [(column.name, _wrap(column.subtitle, small, tile[0])) for column in columns]
    prompt_lines = {prompt: _wrap(prompt, font, sheet_width - margin - gap) for prompt in prompts}
    strip_height = (small_line + strip_tile + 3 * gap) if strip else 0
    header_height = line + max(len(lines) for _, lines in headers) * small_line + gap
    block_heights = {
        prompt: len(lines) * line + 2 * gap + len(seeds) * (tile[1] + gap) for prompt, lines in prompt_lines.items()
    }
    sheet = Image.new("RGB", (sheet_width, gap + strip_height + header_height + sum(block_heights.values())), "white")
    draw = ImageDraw.Draw(sheet)

    y = gap
    if strip:
        draw.text((margin, y), "training images", fill="#68645d", font=small)
        x = margin
        for image in strip:
            if x + image.width > sheet_width - gap:
                break
            sheet.paste(image, (x, y + small_line + gap))
            x += image.width + gap
        y += strip_height
    for index, (name, lines) in enumerate(headers):
        x = margin + index * (tile[0] + gap)
        draw.text((x, y), _clip(name, font, tile[0]), fill="#a8430f", font=font)
        for row, text in enumerate(lines):
            draw.text((x, y + line + row * small_line), text, fill="#68645d", font=small)
    y += header_height
    for prompt in prompts:
        y += gap
        for text in prompt_lines[prompt]:
            draw.text((margin, y), text, fill="black", font=font)
            y += line
        y += gap
        for seed in seeds:
            draw.text((gap, y), f"seed {seed}", fill="#68645d", font=small)
            for index, column in enumerate(columns):
                image = images[column.name, prompt, seed].convert("RGB").resize(tile, Image.Resampling.LANCZOS)
                sheet.paste(image, (margin + index * (tile[0] + gap), y))
            y += tile[1] + gap
    return sheet


def _fit_height(image: Image.Image, height: int) -> Image.Image:
    return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break at spaces so that each line is at most `width` pixels; a single longer word is clipped."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_clip(word, font, width))
    return lines


def _clip(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


# --- the command ------------------------------------------------------------------------------------------------------


def run(config: GalleryConfig) -> tuple[Path, Path]:
    """Draw the comparison; returns the page and the sheet. The pipeline is loaded once and adapters are swapped."""
    prompts, seeds = config.prompts or [], config.seeds if config.seeds is not None else [0, 1]
    adapters = parse_named_adapters(config.adapters or [])
    page_path = Path(config.output)
    sheet_path = page_path.with_suffix(".png")
    if not adapters:
        raise ValueError("no adapter: give at least one with --adapters NAME=PATH")
    if page_path.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {page_path} must end in .html; the sheet gets the same name with .png")
    config.check_sampling(prompts, seeds)
    for path in adapters.values():
        inspect_adapter(path)
    columns = [Column(BASE_COLUMN, None, {})]
    columns += [Column(name, path, adapter_figures(path)) for name, path in adapters.items()]
    base = choose_base(config.base, str(next(iter(adapters.values()))))
    for path in (page_path, sheet_path):
        check_writable_target(path, "--output", folder=False)
    paths = find_images(config.instance_images, "instance_images") if config.instance_images else []
    instances = [(path.name, open_image(path)) for path in paths]

    pipeline = config.load_pipeline(base)
    warn_of_truncated_prompts(pipeline, prompts)
    for column in columns[1:]:  # an adapter of another base is refused before an hour of sampling, not after it
        unload_adapters(pipeline, load_adapter(pipeline, column.path))
    images: dict[tuple[str, str, int], Image.Image] = {}
    with tqdm(total=len(columns) * len(prompts) * len(seeds), unit="image") as bar:
        for column in columns:
            bar.set_description(column.name)
            if column.path is not None:
                load_adapter(pipeline, column.path, scale=config.scales[0])
            for drawn in generate_images(pipeline, prompts, seeds, progress=bar, **config.sampling_options()):
                images[column.name, drawn.prompt, drawn.seed] = drawn.image
            unload_adapters(pipeline)

    width, height = next(iter(images.values())).size
    settings = {
        "base": base,
        "sampling": f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}, {width}×{height} pixels"
        + (f", adapter scale {config.scales[0]:g}" if config.scales[0] != 1 else "")
        + (f", negative prompt “{config.negative_prompt}”" if config.negative_prompt else ""),
    }
    page = render_page(columns, images, prompts, seeds, settings, instances)
    sheet = draw_sheet(columns, images, prompts, seeds, instances)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(sheet_path, png_bytes(sheet))
    write_atomic(page_path, page)
    return page_path, sheet_path


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        GalleryConfig, argv, prog="python -m inference.gallery", description="Base and adapters side by side."
    )
    quiet_libraries()

    def command() -> None:
        page, sheet = run(config)
        print(f"gallery: {page}\nsheet:   {sheet}")

    run_command(command)


if __name__ == "__main__":
    main()
