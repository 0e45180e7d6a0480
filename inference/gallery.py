"""Base and adapters side by side, prompts × seeds × scales × training steps, as one HTML page and one PNG sheet.

    python -m inference.gallery --adapters lora=out/lora nora=out/nora \
        --prompts "[V] photo of a cat" "[V] photo of a cat in the jungle" --seeds 0 1 --output out/gallery.html

Pictures are kept beside the page, in pictures/, and only what is missing there is drawn: adding a prompt or a column
costs no more than its own pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inference.manifest import listed_images
from inference.page import Page, PageColumn, PagePicture, render_page
from inference.score_labels import (
    PICTURE_SCORES,
    SCORE_LABELS,
    SCORES_VERSION,
    difference_cells,
    difference_sentences,
    score_cells,
)
from inference.sheet import draw_sheet
from settings.columns import BASE_COLUMN, SAMPLING, GalleryConfig
from settings.command_line import parse_config, quiet_libraries, run_command
from storage.files import check_kept, check_own_output, check_writable_target, read_json, write_atomic
from storage.pictures import drawn_here, find_images, open_image, png_bytes

TITLE = "Side by side: "


class Scores(NamedTuple):
    """Of a file of judging.evaluate or trainer.compare, by column: label -> what is written there."""

    cells: dict[str, dict[str, str]]
    costs: dict[str, dict[str, str]]
    sentences: list[str]  # what the paired differences show
    pictures: dict[tuple[str, str, int], dict[str, float]]  # (column, prompt, seed) -> label -> score of that picture


def read_scores(path: str | None) -> Scores:
    """The figures of the tables, written as they are there.

    Raises:
        ValueError: if it is no such file, or an old one.
    """
    if path is None:
        return Scores({}, {}, [], {})
    found = read_json(Path(path))
    if (version := found.get("version", 1)) != SCORES_VERSION and "scores" in found:
        raise ValueError(
            f"--scores {path} is of version {version}, whose intervals mean something else than those of version "
            f"{SCORES_VERSION}: run judging.evaluate again with the same flags, the pictures are kept"
        )
    try:
        cells = {name: score_cells(scores) for name, scores in found["scores"].items()}
        differences, sentences = found["differences"], []
        if differences:
            for name, own in differences["others"].items():
                cells[name] |= {
                    f"{label} − {differences['first']}": text for label, text in difference_cells(own).items()
                }
            sentences = difference_sentences(differences)
        return Scores(
            {name: {label: text.replace("*", "") for label, text in one.items()} for name, one in cells.items()},
            {name: dict(one) for name, one in found.get("costs", {}).items()},
            sentences,
            picture_scores(found.get("draws", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--scores {path} is not a file of judging.evaluate ({error!r})") from error


def picture_scores(draws: Mapping[str, Any]) -> dict[tuple[str, str, int], dict[str, float]]:
    """(column, prompt, seed) -> label -> score of that one picture, of a file's draws.

    Raises:
        AttributeError, TypeError, ValueError: if they have another form.
    """
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for name, scores in draws.items():
        for key in PICTURE_SCORES:
            for prompt, seeds in scores.get(key, {}).items():
                for seed, value in seeds.items():
                    found.setdefault((name, prompt, int(seed)), {})[SCORE_LABELS[key]] = float(value)
    return found


def check_own_page(page: Path) -> None:
    """Raise ValueError if the page or its sheet would take the place of a file that is neither."""
    check_own_output(page, "--output", "page of this command", is_page)
    beside = page.is_file() and is_page(page)  # sheets of before didn't say who drew them
    check_own_output(
        page.with_suffix(".png"), "--output", "sheet of this command", lambda path: beside or drawn_here(path)
    )


def is_page(path: Path) -> bool:
    """Whether a file is a page that `run` wrote."""
    return TITLE in path.read_text(encoding="utf-8", errors="replace")[:2000]


def run(config: GalleryConfig) -> tuple[Path, Path]:
    """Draw the comparison; returns the page and the sheet. Everything is checked before the pipeline is loaded."""
    adapters, folders = config.named_columns((*SAMPLING, "checkpoints"))
    page_path = Path(config.output)
    sheet_path = page_path.with_suffix(".png")
    if page_path.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {page_path} must end in .html; the sheet gets the same name with .png")
    listed = {name: listed_images(name, folder) for name, folder in folders.items()}
    places = [(prompt, seed) for files in listed.values() for prompt, seed, _ in files]
    prompts = config.prompts or list(dict.fromkeys(prompt for prompt, _ in places))
    seeds = config.seeds or sorted({seed for _, seed in places}) or [0, 1]
    if not prompts:
        raise ValueError("no prompt: give at least one with --prompts")
    config.check_ranges(prompts, seeds)
    names = [*([BASE_COLUMN] if adapters else []), *adapters, *folders]
    scores = read_scores(config.scores)
    if scores.cells and not set(scores.cells) & set(names):
        raise ValueError(f"--scores {config.scores} has none of these columns: it has {', '.join(scores.cells)}")
    for path in (page_path, sheet_path):
        check_writable_target(path, "--output", folder=False)
    paths = find_images(config.instance_images, "instance_images") if config.instance_images else []
    listed_files = [file for files in listed.values() for file in files.values()]
    check_kept([("the picture", file) for file in [*paths, *listed_files]], [page_path, sheet_path])
    check_own_page(page_path)
    instances = [(path.name, open_image(path)) for path in paths]

    # PyTorch and diffusers take seconds to import: wrong flags have been refused by now
    quiet_libraries()
    from inference.adapter_facts import warn_of_missing_words
    from inference.adapter_files import run_checkpoints
    from inference.columns import open_listed
    from inference.figures import adapter_figures, describe_settings, subtitle
    from inference.pipelines import check_hardware, choose_base

    check_hardware(config)
    for path in adapters.values():
        warn_of_missing_words(path, prompts)
    if config.checkpoints and not any(map(run_checkpoints, adapters.values())):
        raise ValueError("--checkpoints: none of the --adapters is a run's folder with checkpoints: leave it out")
    pictures: dict[tuple[str, str, int], list[PagePicture]] = {}
    settings: dict[str, str] = {}
    figures = {name: adapter_figures(path) | scores.costs.get(name, {}) for name, path in adapters.items()}
    if adapters:
        config = choose_base(config, str(next(iter(adapters.values()))))
        pictures = draw_columns(config, adapters, prompts, seeds)
        settings = describe_settings(config, next(iter(pictures.values()))[0].image.size)
    for name, files in listed.items():
        for one in open_listed(files):
            if one.prompt in prompts and one.seed in seeds:
                picture = PagePicture(one.scale, None, one.image, one.command)
                pictures.setdefault((name, one.prompt, one.seed), []).append(picture)
    if not pictures:
        raise ValueError("--images have no picture of these --prompts and --seeds: leave them out to show all")
    subtitles = {BASE_COLUMN: "no adapter"} | {name: subtitle(name, found) for name, found in figures.items()}
    columns = [
        PageColumn(name, subtitles.get(name, ""), figures.get(name, {}), scores.cells.get(name, {})) for name in names
    ]
    title = TITLE + ", ".join(names)
    shown = {place: own for place, own in scores.pictures.items() if place in pictures}
    page = Page(title, settings, columns, prompts, seeds, pictures, instances, scores.sentences, shown)
    last = {place: several[-1].image for place, several in pictures.items()}
    sheet = draw_sheet(columns, last, prompts, seeds, instances)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(sheet_path, png_bytes(sheet))
    write_atomic(page_path, render_page(page))
    return page_path, sheet_path


def draw_columns(
    config: GalleryConfig, adapters: Mapping[str, Path], prompts: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, str, int], list[PagePicture]]:
    """(column, prompt, seed) -> pictures, of the base and of each adapter at its scales and checkpoints."""
    from inference.columns import AdapterVersion, adapter_versions, draw_versions, picture_folder

    versions = {BASE_COLUMN: [AdapterVersion()]}
    versions |= {name: adapter_versions(path, config.scales, config.checkpoints) for name, path in adapters.items()}
    folder = picture_folder(Path(config.output))
    pictures: dict[tuple[str, str, int], list[PagePicture]] = {}
    for name, version, drawn in draw_versions(config, versions, prompts, seeds, folder):
        for one in drawn:
            picture = PagePicture(version.scale, version.step, one.image, one.command)
            pictures.setdefault((name, one.prompt, one.seed), []).append(picture)
    return pictures


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        GalleryConfig, argv, prog="python -m inference.gallery", description="Base and adapters side by side."
    )

    def command() -> None:
        page, sheet = run(config)
        print(f"gallery: {page}\nsheet:   {sheet}")

    run_command(command)


if __name__ == "__main__":
    main()
