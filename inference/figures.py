"""What an adapter is and cost, in words, from its run's record and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.adapter_files import inspect_adapter, read_run_record, recorded_config, trained_steps
from inference.page import UNKNOWN
from methods.components import EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.files import KOHYA_WEIGHTS, PEFT_FOLDER
from methods.registry import METHODS
from settings.sampling import SamplingConfig
from storage.text import counted

KIND_LABELS = {
    "folded": "LoRA file",
    "inner": "NoRA file (inner only)",
    "kohya": "kohya file",
    "peft": "PEFT folders",
}
FILE_KINDS = {FOLDED_WEIGHTS: "folded", INNER_WEIGHTS: "inner", KOHYA_WEIGHTS: "kohya"}


def adapter_figures(path: Path) -> dict[str, str]:
    """Label -> figure; what isn't known is a dash."""
    record, config = read_run_record(path), recorded_config(path)
    steps = trained_steps(path)
    # of a checkpoint or the best one the record says what the whole run took
    whole = steps == config.get("max_train_steps")
    timings = _timings(record) if whole else {}
    figures = {
        "Method": method_title(record.get("method")),
        "Rank of the update": config.get("rank"),
        "Outer rank": _outer_rank(record.get("outer_ranks") or [config.get("outer_rank")]),
        **{label: _format_bytes(size) for label, size in file_sizes(path, record.get("files")).items()},
        "Training time": _format(timings.get("train_seconds"), format_seconds),
        "Steps": _format(steps, lambda count: f"{count:,}"),
        **cost_figures([record if whole else {**record, "timings": None}]),
    }
    return {label: UNKNOWN if value is None else str(value) for label, value in figures.items()}


def cost_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Label -> what one training costs, the mean of several; what isn't known is a dash.

    Start-up is all before the first step: loading and checking, encoding, and what a method measures of its layers.
    """
    timings = [_timings(record) for record in records]
    startups = [_sum(one.get("encode_seconds"), one.get("inject_seconds")) for one in timings]
    smallest = [_smallest_file(record.get("files")) for record in records]
    figures = {
        "Trainable parameters": _format(_mean([one.get("trainable_parameters") for one in records]), "{:,.0f}".format),
        "Smallest exact file": _format(_mean(smallest), _format_bytes),
        "Seconds per step": _format(_mean([one.get("seconds_per_step") for one in timings]), "{:.3g} s".format),
        "Peak memory": _format(
            _mean([one.get("peak_memory_mb") for one in records]), lambda megabytes: _format_bytes(megabytes * 1e6)
        ),
        "Start-up": _format(_mean(startups), format_seconds),
    }
    return {label: UNKNOWN if value is None else value for label, value in figures.items()}


def _timings(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found = record.get("timings")
    return found if isinstance(found, dict) else {}


def _smallest_file(recorded: Any) -> float | None:
    """Bytes of the smallest file, or of the PEFT folders together, that are the whole adapter, exactly.

    The file for drawing programs is in half precision, and is left out.
    """
    sizes: dict[str, float] = {}
    for name, size in recorded.items() if isinstance(recorded, dict) else ():
        kind = PEFT_FOLDER if Path(name).parts[0] == PEFT_FOLDER else name
        if kind == PEFT_FOLDER or kind in FILE_KINDS:
            sizes[kind] = sizes.get(kind, 0) + size
    return min(sizes.values(), default=None)


def _sum(*values: Any) -> float | None:
    return sum(values) if all(isinstance(value, (int, float)) for value in values) else None


def _mean(values: Sequence[Any]) -> float | None:
    """None where one isn't known."""
    return total / len(values) if (total := _sum(*values)) is not None else None


def method_title(name: Any) -> str | None:
    """A method as its paper writes it ("NoRA"); one that is not in the registry by its own name."""
    if not isinstance(name, str):
        return None
    return METHODS[name].title if name in METHODS else name


def file_sizes(path: Path, recorded: Any) -> dict[str, int]:
    """Label -> bytes of the files that the adapter's run recorded, or else of those that `load_adapter` reads.

    Args:
        recorded: `files` of the record, name -> bytes. A checkpoint's and the best adapter's files have the same names.
    """
    folder = path if path.is_dir() else path.parent
    sizes: dict[str, int] = {}
    for name in recorded if isinstance(recorded, dict) else ():
        if (folder / name).is_file():
            kind = _file_kind(name)
            label = KIND_LABELS[kind] if kind else name
            sizes[label] = sizes.get(label, 0) + (folder / name).stat().st_size
    if not sizes:
        adapter = inspect_adapter(path)
        files = [file for part in adapter.parts.values() for file in part.iterdir()] or [adapter.path]
        sizes = {KIND_LABELS[adapter.kind]: sum(file.stat().st_size for file in files)}
    return sizes


def _file_kind(name: str) -> str | None:
    """Of a run's file; the one for drawing programs has its folder's name."""
    if Path(name).parts[0] == PEFT_FOLDER:
        return "peft"
    other = name == EMBEDDINGS or name.startswith("approximate_lora_rank") or not name.endswith(".safetensors")
    return FILE_KINDS.get(name, None if other else "kohya")


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


def format_seconds(seconds: float) -> str:
    """ "8.3 s", or "12 min 05 s"."""
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


def describe_settings(config: SamplingConfig, size: tuple[int, int]) -> dict[str, str]:
    """How the pictures were drawn, for the head of the page: label -> value.

    Args:
        size: width and height, pixels.
    """
    width, height = size
    sampling = (
        f"{counted(config.num_inference_steps, 'step')}, guidance {config.guidance_scale:g}, {width}×{height} pixels"
    )
    named = {"Revision": config.revision, "Variant": config.variant, "Scheduler": config.scheduler}
    named |= {"Autoencoder": config.vae, "Refiner": config.refiner, "Negative prompt": config.negative_prompt}
    if config.scales != [1]:
        named["Adapter scale"] = ", ".join(f"{scale:g}" for scale in config.scales)
    return {"Base": config.base, "Sampling": sampling} | {label: value for label, value in named.items() if value}
