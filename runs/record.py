"""What a run leaves behind besides the weights and the card: metrics.jsonl and run.json."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from methods.components import BEST, BEST_SCORES, RUN_RECORD
from storage.files import read_json, write_atomic
from storage.pictures import drawn_here
from storage.text import read_text

RECORD_VERSION = 1
METRICS = "metrics.jsonl"
MODEL_CARD = "README.md"
LOSS_PLOT = "loss.png"
SAMPLES = "samples"
RUN_PAGE = "run.html"
PAGE_MARK = "NoRA training suite: page of a run"  # what the page says that it is
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def is_metrics(path: Path) -> bool:
    """Whether a file is a run's metrics, from its first line; an empty one is of a run that was cut off."""
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        return not line or "step" in json.loads(line)
    except (OSError, ValueError, TypeError):
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none where there is no such file."""
    return [json.loads(line) for line in read_text(path).split("\n") if line] if path.is_file() else []


def is_run_page(path: Path) -> bool:
    """Whether a file is a page that a run wrote."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return PAGE_MARK in file.read(2000)
    except OSError:
        return False


def recorded_files(folder: Path, results: Sequence[str] = ()) -> list[Path]:
    """The files in a run's folder that runs have written and recorded there, checkpoints apart.

    That is what ``run.json`` and the best adapter's scores list, with the size that they list, and samples and the
    page, which say themselves what made them. Nothing else may be cleared, but for empty samples, which hold nothing.

    Args:
        results: what a run leaves, for a ``run.json`` of before, which listed no files.
    """
    samples = [path for path in (folder / SAMPLES).rglob("*.png") if path.is_file()]
    found = [path for path in samples if path.stat().st_size == 0 or drawn_here(path)]
    found += [folder / RUN_PAGE] if is_run_page(folder / RUN_PAGE) else []
    for inside, name in ((folder, RUN_RECORD), (folder / BEST, BEST_SCORES)):
        try:
            files = read_json(inside / name).get("files")
        except (OSError, ValueError):
            continue
        found.append(inside / name)
        if isinstance(files, dict):
            listed = {inside / file: size for file, size in files.items()}
            found += [path for path, size in listed.items() if path.is_file() and path.stat().st_size == size]
        if inside == folder:
            own = [MODEL_CARD, LOSS_PLOT, *(results if files is None else ())]
            places = [folder / file for file in own if Path(file).parts[0] not in (SAMPLES, BEST)]
            found += [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return found


def file_sizes(folder: Path, files: Sequence[str]) -> dict[str, int]:
    """Name -> bytes of the files that were written: what a record has of them."""
    return {name: (folder / name).stat().st_size for name in files}


def step_samples(step: int) -> str:
    """Folder of the samples that a run draws after a step, inside its own."""
    return f"{SAMPLES}/step-{step:06d}"


def samples_after(folder: Path, step: int) -> list[str]:
    """Samples in a run's folder that a run resumed from the step draws again."""
    names = (path.name for path in (folder / SAMPLES).glob("*"))
    return [
        f"{SAMPLES}/{name}"
        for name in names
        if not ((found := re.fullmatch(r"step-(\d+)", name)) and int(found[1]) <= step)
    ]


class Clock:
    """Wall-clock seconds of a run's parts."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.timings: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.timings[name], self.last = now - self.last, now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside counts for no part, only for the total."""
        paused = time.perf_counter()
        yield
        self.last += time.perf_counter() - paused

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


class MetricsLog:
    """One JSON line a step, on disk at once.

    Args:
        after: the step that a resumed run goes on from; lines of later steps are dropped, because they come again.

    The file is touched with the first line that is written: a run that fails before it leaves an earlier one's.

    Raises:
        ValueError: if a resumed run's lines can't be read.
    """

    def __init__(self, path: Path, enabled: bool, after: int = 0) -> None:
        self.path, self.enabled, self.kept, self.file = path, enabled, [], None
        try:
            if after and path.exists():
                lines = read_text(path).split("\n")[:-1]  # a line that was cut off ends with the text
                self.kept = [f"{line}\n" for line in lines if json.loads(line)["step"] <= after]
            self.seconds = [record["seconds"] for record in map(json.loads, self.kept) if "seconds" in record]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged, and a resumed run goes on in it: delete it, or mend it") from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error) -> None:
        if self.file:
            self.file.close()

    def write(self, step: int, **values: Any) -> None:
        if "seconds" in values:
            self.seconds.append(values["seconds"])
        if self.enabled and self.file is None:
            write_atomic(self.path, "".join(self.kept))
            self.file = self.path.open("a", buffering=1)
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")

    @property
    def timings(self) -> dict[str, float]:
        """What the record says of the steps; nothing where none is known."""
        return {"seconds_per_step": statistics.median(self.seconds)} if self.seconds else {}


class PeakMemory:
    """The largest memory in use since the start, MB (10⁶ bytes), without what happens in pauses.

    Of the allocator on a GPU, else the resident set of the whole process. Where the system can't forget a peak (neither
    a GPU nor Linux), it is the process's from its beginning, pauses included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0.0
        self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now

    @property
    def megabytes(self) -> float:
        return max(self._before, self._since_reset())

    def _since_reset(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        if platform.system() == "Windows":
            return psutil.Process().memory_info().peak_wset / 1e6
        with suppress(OSError):
            return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
        import resource  # which Windows lacks

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if platform.system() == "Darwin" else 1024) / 1e6  # bytes there, KiB elsewhere

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count."""
        self._before = self.megabytes
        yield
        self._reset()


def run_record(
    flags: Mapping[str, Any],
    *,
    trained: Mapping[str, nn.Module],
    base_fingerprints: Mapping[str, str],
    outer_ranks: Sequence[int],
    clock: Clock,
    peak_memory_mb: float,
    folder: Path,
    files: Sequence[str],
    approximation_error: float | None,
    best: Mapping[str, Any] | None,
    new_words: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    num_processes: int,
    prediction: tuple[str, bool],
) -> dict[str, Any]:
    """run.json: what is needed to understand, compare and repeat the run.

    Args:
        flags: all of them, by name, as they were in force.
        trained, base_fingerprints: by component (unet, text_encoder, text_encoder_2).
        peak_memory_mb: of the training, as `PeakMemory` counts it.
        new_words: what a prompt must hold for the words that the text encoders were taught, such as "[V]".
        best: step and scores of the adapter in best/, where the run was scored.
        outer_ranks: the distinct outer ranks that the layers got; empty for other methods than NoRA.
        approximation_error: of the nearest LoRA, where one was written.
        prediction: what the base predicts, epsilon or v_prediction, and whether its schedule ends at an SNR of zero.
    """
    prediction_type, zero_terminal_snr = prediction
    parameters = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in trained.items()
    }
    return {
        "record_version": RECORD_VERSION,
        "method": flags["method"],
        "config": {name: value for name, value in flags.items() if name != "hub_token"},
        "seed": flags["seed"],
        "base_fingerprints": dict(base_fingerprints),
        "prediction_type": prediction_type,
        "zero_terminal_snr": zero_terminal_snr,
        "trainable_parameters": sum(parameters.values()),
        "trainable_parameters_by_component": parameters,
        "outer_ranks": list(outer_ranks),
        "timings": {name: round(seconds, 4) for name, seconds in clock.timings.items()}
        | {"total_seconds": round(clock.total, 4)},
        "peak_memory_mb": round(peak_memory_mb, 1),
        "files": file_sizes(folder, files),
        **({"approximation_error": round(approximation_error, 4)} if approximation_error is not None else {}),
        "best": best,
        "new_words": dict(new_words),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "num_processes": num_processes,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
