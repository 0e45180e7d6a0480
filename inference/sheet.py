"""The gallery as one picture, for READMEs and papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from inference.page import PageColumn

MIN_TILE, MAX_TILE = 192, 512  # pixels: tiny bases stay visible, 1024 px ones stay mailable


def draw_sheet(
    columns: Sequence[PageColumn],
    images: Mapping[tuple[str, str, int], Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    instances: Sequence[tuple[str, Image.Image]] = (),
) -> Image.Image:
    """One picture of the whole comparison, for READMEs and papers: columns are models, rows prompts × seeds.

    A picture of another shape than the first one's has a margin in its tile.
    """
    width, height = next(iter(images.values())).size
    factor = min(max(width, height, MIN_TILE), MAX_TILE) / max(width, height)
    tile = (round(width * factor), round(height * factor))
    gap = max(4, tile[0] // 32)
    size = max(15, tile[0] // 11)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(12, round(size * 0.75)))
    margin = round(small.getlength(f"seed {max(seeds)}")) + 2 * gap
    sheet_width = margin + len(columns) * (tile[0] + gap) + gap
    line, small_line = round(size * 1.3), round(small.size * 1.3)

    strip = _instance_rows([image for _, image in instances], sheet_width - margin - gap, tile[1], gap)
    headers = [(column.name, _wrap(column.subtitle, small, tile[0])) for column in columns]
    prompt_lines = {prompt: _wrap(prompt, font, sheet_width - margin - gap) for prompt in prompts}
    strip_tile = max((image.height for several in strip for image in several), default=0)
    strip_height = small_line + len(strip) * (strip_tile + gap) + 2 * gap if strip else 0
    header_height = line + max(len(lines) for _, lines in headers) * small_line + gap
    block_heights = {
        prompt: len(lines) * line + 2 * gap + len(seeds) * (tile[1] + gap) for prompt, lines in prompt_lines.items()
    }
    sheet = Image.new("RGB", (sheet_width, gap + strip_height + header_height + sum(block_heights.values())), "white")
    draw = ImageDraw.Draw(sheet)

    y = gap
    if strip:
        draw.text((margin, y), "training images", fill="#68645d", font=small)
        for row, several in enumerate(strip):
            x = margin
            for image in several:
                sheet.paste(image, (x, y + small_line + gap + row * (strip_tile + gap)))
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
                image = images.get((column.name, prompt, seed))
                if image is not None:  # a picture that nobody drew leaves its place empty
                    image = ImageOps.contain(image.convert("RGB"), tile, Image.Resampling.LANCZOS)
                    x = margin + index * (tile[0] + gap) + (tile[0] - image.width) // 2
                    sheet.paste(image, (x, y + (tile[1] - image.height) // 2))
            y += tile[1] + gap
    return sheet


def _instance_rows(images: Sequence[Image.Image], width: int, tile_height: int, gap: int) -> list[list[Image.Image]]:
    """Training images in one row as wide as the sheet; in several where they would be lower than a quarter tile."""
    if not images:
        return []
    aspects = sum(image.width / image.height for image in images)
    row_height = int((width - len(images) * gap) / aspects)
    height = max(tile_height // 4, min(tile_height * 3 // 4, row_height))
    rows: list[list[Image.Image]] = []
    for image in images:
        image = ImageOps.contain(image, (width, height), Image.Resampling.LANCZOS)
        if not rows or sum(one.width + gap for one in rows[-1]) + image.width > width:
            rows.append([])
        rows[-1].append(image)
    return rows


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
