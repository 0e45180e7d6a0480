"""Base and adapters side by side, prompts × seeds × scales × training steps, as one HTML page and one PNG sheet.

    python -m inference.gallery --adapters lora=out/lora nora=out/nora \
        --prompts "[V] photo of a cat" "[V] photo of a cat in the jungle" --seeds 0 1 --output out/gallery.html

Pictures are kept beside the page, in pictures/, and only what is missing there is drawn: adding a prompt or a column
costs no more than its own pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from inference.adapter_files import (
    BASE_COLUMN,
    inspect_adapter,
    read_run_record,
    recorded_config,
    run_checkpoints,
    trained_steps,
)
from inference.columns import SAMPLING, ColumnsConfig, Job, Studio, picture_folder
from inference.generate import choose_base
from inference.page import UNKNOWN, Page, PageColumn, Shot, render_page
from inference.sheet import draw_sheet
from judging.evaluate import SCORES, format_memorisation, format_score
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS
from settings.command_line import parse_config, quiet_libraries, run_command
from storage.files import check_writable_target, read_json, write_atomic
from storage.pictures import find_images, open_image, png_bytes

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


@dataclass
class GalleryConfig(ColumnsConfig):
    """Flags of `python -m inference.gallery`."""

    prompts: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--prompt"], "action": "extend", "help": "Default: those of --images."},
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={"action": "extend", "help": "One row per prompt each. Default: 0 1, or those of --images."},
    )
    checkpoints: bool = field(
        default=False, metadata={"help": "Also at every checkpoint of the runs: the page gets a slider of steps."}
    )
    instance_images: str | None = field(
        default=None, metadata={"help": "Folder of the subject's training images, shown on top."}
    )
    scores: str | None = field(
        default=None, metadata={"help": "File of judging.evaluate with columns of the same names: shown below them."}
    )
    output: str = field(default="out/gallery.html", metadata={"help": "The page; the sheet is beside it as .png."})


# --- what is shown ----------------------------------------------------------------------------------------------------


def adapter_figures(path: Path) -> dict[str, str]:
    """What an adapter costs, from its run's record and its files; what isn't known is a dash."""
    record, config = read_run_record(path), recorded_config(path)
    steps = trained_steps(path)
    # of a checkpoint or the best one the record says what the whole run took
    timings = record.get("timings") if steps == config.get("max_train_steps") else None
    timings = timings if isinstance(timings, dict) else {}
    method = record.get("method")
    folder = path if path.is_dir() else path.parent
    sizes = {
        name: (folder / name).stat().st_size for name in (FOLDED_WEIGHTS, INNER_WEIGHTS) if (folder / name).is_file()
    }
    if path.is_file() and not record:  # a file from elsewhere: only its own size is its own
        sizes = {(INNER_WEIGHTS if inspect_adapter(path).kind == "inner" else FOLDED_WEIGHTS): path.stat().st_size}
    values = (
        METHOD_NAMES.get(str(method), method),
        config.get("rank"),
        _outer_rank(record.get("outer_ranks") or [config.get("outer_rank")]),
        _format(record.get("trainable_parameters"), lambda count: f"{count:,}"),
        _format(sizes.get(FOLDED_WEIGHTS), _format_bytes),
        _format(sizes.get(INNER_WEIGHTS), _format_bytes),
        _format(timings.get("train_seconds"), _format_seconds),
        _format(timings.get("seconds_per_step"), lambda seconds: f"{seconds:.3g} s"),
        _format(steps, lambda count: f"{count:,}"),
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


def subtitle(name: str, figures: Mapping[str, str]) -> str:
    """Method, rank and trained parameters in a line, as far as they are known."""
    parameters, method, rank = figures["Trainable parameters"], figures["Method"], figures["Rank of the update"]
    known = {f"rank {rank}": rank, f"{parameters} trained": parameters}
    if method.lower() not in name.lower():
        known = {method: method, **known}
    return ", ".join(text for text, value in known.items() if value != UNKNOWN)


def read_scores(path: str | None) -> dict[str, dict[str, str]]:
    """Column -> label -> score, from a file of judging.evaluate.

    Raises:
        ValueError: if it is no such file.
    """
    if path is None:
        return {}
    try:
        found = read_json(Path(path))["scores"]
        return {
            name: {label: format_score(scores[key]) for key, label in SCORES.items() if key in scores}
            | {"Nearest training image": format_memorisation(scores["memorisation"]).replace("*", "")}
            for name, scores in found.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--scores {path} is not a file of judging.evaluate ({error!r})") from error


@dataclass(frozen=True)
class Take:
    """One setting of one column: what draws it, and where the page's sliders find it."""

    adapter: Path | None
    step: int | None
    scale: float | None


def takes(path: Path, scales: Sequence[float], checkpoints: bool) -> list[Take]:
    """The last one is the adapter itself at the last scale."""
    steps: list[tuple[int | None, Path]] = [(trained_steps(path), path)]
    if checkpoints:
        earlier = [(step, folder) for step, folder in run_checkpoints(path) if step != steps[0][0]]
        steps = [*earlier, *steps]
    return [Take(adapter, step, scale) for step, adapter in steps for scale in scales]


# --- the command ------------------------------------------------------------------------------------------------------


def run(config: GalleryConfig) -> tuple[Path, Path]:
    """Draw the comparison; returns the page and the sheet."""
    adapters, given = config.columns((*SAMPLING, "checkpoints"))
    page_path = Path(config.output)
    sheet_path = page_path.with_suffix(".png")
    if page_path.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {page_path} must end in .html; the sheet gets the same name with .png")
    listed = [one for pictures in given.values() for one in pictures]
    prompts = config.prompts or list(dict.fromkeys(one.prompt for one in listed))
    seeds = config.seeds or sorted({one.seed for one in listed}) or [0, 1]
    if not prompts:
        raise ValueError("no prompt: give at least one with --prompts")
    config.check_sampling(prompts, seeds)
    if config.checkpoints and not any(map(run_checkpoints, adapters.values())):
        raise ValueError("--checkpoints: none of the --adapters is a run's folder with checkpoints: leave it out")
    names = [*([BASE_COLUMN] if adapters else []), *adapters, *given]
    scores = read_scores(config.scores)
    if scores and not set(scores) & set(names):
        raise ValueError(f"--scores {config.scores} has none of these columns: it has {', '.join(scores)}")
    for path in (page_path, sheet_path):
        check_writable_target(path, "--output", folder=False)
    paths = find_images(config.instance_images, "instance_images") if config.instance_images else []
    instances = [(path.name, open_image(path)) for path in paths]

    shots: dict[tuple[str, str, int], list[Shot]] = {}
    figures: dict[str, dict[str, str]] = {}
    settings = {}
    if adapters:
        config = choose_base(config, str(next(iter(adapters.values()))))
        studio = Studio(config, picture_folder(page_path))
        columns = {BASE_COLUMN: [Take(None, None, None)]}
        columns |= {name: takes(path, config.scales, config.checkpoints) for name, path in adapters.items()}
        figures = {name: adapter_figures(path) for name, path in adapters.items()}
        everything = [(name, take) for name, several in columns.items() for take in several]
        jobs = [
            Job(name, take.adapter, prompts, 1.0 if take.scale is None else take.scale) for name, take in everything
        ]
        for (name, take), drawn in zip(everything, studio.draw(jobs, seeds)):
            for one in drawn:
                shot = Shot(take.scale, take.step, one.image)
                shots.setdefault((name, one.prompt, one.seed), []).append(shot)
        settings = describe_settings(config, next(iter(shots.values()))[0].image)
    for name, pictures in given.items():
        for one in pictures:
            if one.prompt in prompts and one.seed in seeds:
                shots.setdefault((name, one.prompt, one.seed), []).append(Shot(one.scale, None, one.image))
    if not shots:
        raise ValueError("--images have no picture of these --prompts and --seeds: leave them out to show all")
    page_columns = [
        PageColumn(
            name,
            subtitle(name, figures[name]) if name in figures else "no adapter" if name == BASE_COLUMN else "",
            figures.get(name, {}),
            scores.get(name, {}),
        )
        for name in names
    ]
    page = Page("Side by side: " + ", ".join(names), settings, page_columns, prompts, seeds, shots, instances)
    last = {place: several[-1].image for place, several in shots.items()}
    sheet = draw_sheet(page_columns, last, prompts, seeds, instances)
    page_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(sheet_path, png_bytes(sheet))
    write_atomic(page_path, render_page(page))
    return page_path, sheet_path


def describe_settings(config: GalleryConfig, image: Image.Image) -> dict[str, str]:
    width, height = image.size
    sampling = f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}, {width}×{height} pixels"
    named = {"Revision": config.revision, "Variant": config.variant, "Scheduler": config.scheduler}
    named |= {"Autoencoder": config.vae, "Refiner": config.refiner, "Negative prompt": config.negative_prompt}
    if config.scales != [1]:
        named["Adapter scale"] = ", ".join(f"{scale:g}" for scale in config.scales)
    return {"Base": config.base, "Sampling": sampling} | {label: value for label, value in named.items() if value}


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
