"""Adapters as commands name them, and what the runs that made them have recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from inference.base import check_base
from methods.adapter_file import AdapterFile, inspect_adapter
from methods.components import BEST, BEST_SCORES, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from methods.files import PEFT_FOLDER
from settings.sampling import DOWNLOAD_OPTIONS
from storage.files import read_json

__all__ = ["AdapterFile", "inspect_adapter"]
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_run_record(path: str | Path) -> dict[str, Any]:
    """The `run.json` of an adapter: beside it, or one folder up for a checkpoint or the best; {} if there is none."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    inner = folder.name == BEST or _CHECKPOINT.fullmatch(folder.name)
    records = [folder / RUN_RECORD, *([folder.resolve().parent / RUN_RECORD] if inner else [])]
    return next((read_json(record) for record in records if record.is_file()), {})


def run_checkpoints(path: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints that hold an adapter, in the order of training."""
    found = [(match, folder) for folder in path.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(folder.name))]
    steps = [(int(match[1]), folder) for match, folder in found]
    return sorted(
        (step, folder)
        for step, folder in steps
        if any((folder / name).exists() for name in (FOLDED_WEIGHTS, INNER_WEIGHTS, PEFT_FOLDER))
    )


def trained_steps(path: str | Path) -> int | None:
    """The step that an adapter is of: a checkpoint's, the best one's, or the run's last; None if it is not known."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if match := _CHECKPOINT.fullmatch(folder.name):
        return int(match[1])
    if folder.name == BEST:
        return read_json(folder / BEST_SCORES).get("step") if (folder / BEST_SCORES).is_file() else None
    return recorded_config(path).get("max_train_steps")


def recorded_config(path: str | Path) -> dict[str, Any]:
    """The flags of the run that made an adapter; {} where they are not known."""
    config = read_run_record(path).get("config")
    return config if isinstance(config, dict) else {}


def recorded_base(path: str | Path) -> str:
    """The base that an adapter was trained on, as its `run.json` names it.

    Raises:
        ValueError: there is no record, or the base it names is not here.
    """
    base = recorded_config(path).get("pretrained_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter {path} has no {RUN_RECORD} that names its base: name it with --base")
    try:
        check_base(base)
    except ValueError as error:
        raise ValueError(
            f"{RUN_RECORD} of adapter {path} names a base that can't be used: {error}; or use --base"
        ) from error
    return base


def recorded_downloads(path: str | Path) -> dict[str, str]:
    """The keyword arguments of ``from_pretrained`` that an adapter's run loaded its base with."""
    config = recorded_config(path)
    options = {name: value for name in DOWNLOAD_OPTIONS if isinstance(value := config.get(name), str)}
    if not Path(options.get("cache_dir", "")).is_dir():  # another machine's
        options.pop("cache_dir", None)
    return options
