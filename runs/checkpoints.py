"""The state of a run on disk: written whole or not at all, and resumed only by the same run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from runs.record import is_metrics, recorded_files
from storage.files import move_others, read_json

STATE = "training_state.json"
LOCK = ".run-in-progress.lock"  # no name that a user would give a file
# What is in it: the step, what makes the run the same (`identity`), and the digest of every other file.
_STATE_KINDS = {"step": int, "flags": dict, "content": dict, "files": dict}
_NAME = re.compile(r"checkpoint-(\d+)")
# What a resumed run may have otherwise: where things lie, what is looked at, and how long it goes on.
FREE_TO_CHANGE = {
    "output_dir", "logging_dir", "report_to", "cache_dir", "encoded_cache_dir", "dataloader_num_workers",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "max_train_steps", "num_train_epochs",
    "validation_prompt", "num_validation_images", "validation_epochs", "validation_steps", "num_inference_steps",
    "validation_data_dir", "validation_loss_steps", "sample_batch_size", "push_to_hub", "hub_token", "hub_model_id",
    "output_kohya_format", "output_kohya_dtype", "license",
    "output_peft_format", "convert_to_lora", "local_rank", "dry_run", "low_vram", "vram",
    "prior_generation_precision",
    "compile",  # rounds otherwise, as another card or version of PyTorch does
    # compared by content instead
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "instance_data_dir",
    "class_data_dir", "dataset_name", "dataset_config_name", "concepts_list", "mask_data_dir", "base_config",
}  # fmt: skip

# Flags that are compared where both have them: earlier checkpoints said the same with others, or not at all.
IN_BOTH = {"method_args", "max_train_steps", "selective_checkpointing", "prediction_type", "zero_terminal_snr"}
# What flags meant for checkpoints that are older than they.
BEFORE = {"targets": "attention", "clip_skip": 0}


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints in a run's folder, oldest first; anything else there is passed over."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if (path / STATE).is_file())


def find_checkpoint(resume_from: str | None, folder: Path) -> Path | None:
    """What ``--resume_from_checkpoint`` names; None for "latest" where there is none yet, or without the flag.

    Raises:
        ValueError: if it names no whole checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        found = checkpoints(folder)
        return found[-1][1] if found else None
    # diffusers takes the folder's name inside --output_dir; a path with folders is that path and no other
    path = Path(resume_from)
    if len(path.parts) == 1:
        path = folder / path
    if (path / STATE).is_file():
        return path
    known = ", ".join(path.name for _, path in checkpoints(folder)) or "none"
    raise ValueError(f"--resume_from_checkpoint {resume_from} is no whole checkpoint; {folder} has {known}")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    identity: Mapping[str, Any],
    total_limit: int | None,
    keep: Path | None = None,
) -> Path:
    """Write ``checkpoint-{step}`` under a temporary name, sync, rename; only then do others go. All processes.

    Those of later steps go too: a run that went on from an older checkpoint has left them behind.

    Args:
        keep: a checkpoint that a flag names, which stays beyond the limit.

    Raises:
        OSError: if it could not be written; nothing of it stays.
    """
    path, partial = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _whole_or_gone(path, partial):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # outside: another process that died is no full disk
    if accelerator.is_main_process:
        with _whole_or_gone(path, partial):
            files = {str(file.relative_to(partial)): file for file in partial.rglob("*") if file.is_file()}
            state = {"step": step, **identity, "files": {name: _digest(file) for name, file in files.items()}}
            (partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True))
            for file in (*files.values(), partial / STATE):
                _sync(file)
        if path.exists():  # saved before a run was cut off and resumed from an older one
            _remove(path)
        partial.rename(path)
        _sync(folder)
        found = checkpoints(folder)
        kept = [old for saved, old in found if saved <= step][-(total_limit or len(found)) :]
        for _, old in found:
            if old not in kept and not (keep and keep.exists() and old.samefile(keep)):
                _remove(old)
    accelerator.wait_for_everyone()
    return path


@contextmanager
def _whole_or_gone(path: Path, partial: Path) -> Iterator[None]:
    """What fails inside takes the partial folder with it, and says which checkpoint is not there."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own word for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{path} could not be written ({error}): is the disk full? Older checkpoints are whole"
        ) from error


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; cut off, it leaves a hidden rest and none that looks like somebody else's.

    Files that it has not recorded were put there by somebody: they are kept beside it.
    """
    rest = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    shutil.rmtree(rest, ignore_errors=True)
    checkpoint.rename(rest)
    try:
        recorded = {STATE, *read_json(rest / STATE)["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        recorded = None
    if recorded is not None:
        move_others(rest, checkpoint.with_name(f"{checkpoint.name}-kept"), recorded)
    shutil.rmtree(rest)


def _digest(file: Path) -> str | None:
    """BLAKE2 of a file's bytes; None where there is none."""
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else None


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows syncs files only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(config: Mapping[str, Any], plans_ahead: Sequence[str] = (), **content: Any) -> dict[str, Any]:
    """What makes two runs the same: the flags that matter, and fingerprints of what they name.

    Args:
        config: the resolved flags.
        plans_ahead: those by which every step depends on ``max_train_steps``; without one, a run may be made longer.
        content: such as the base's fingerprints and the pictures' hash; JSON values.
    """
    flags = {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}
    if plans_ahead:
        flags["max_train_steps"] = config["max_train_steps"]
    return {"flags": flags, "content": content, "plans_ahead": list(plans_ahead)}


def recorded_flags(checkpoint: Path) -> dict[str, Any]:
    """The flags of a checkpoint's run; none where that can't be read, which `read_step` refuses."""
    try:
        flags = read_json(checkpoint / STATE).get("flags")
    except ValueError:
        return {}
    return flags if isinstance(flags, dict) else {}


def read_step(checkpoint: Path, identity: Mapping[str, Any], max_train_steps: int) -> int:
    """The step that a whole checkpoint of the same run was saved after.

    Args:
        identity: without content, before there is any; the flags alone are compared then.

    Raises:
        ValueError: if a file is damaged, or it belongs to another run; every difference is named.
    """
    try:
        saved = read_json(checkpoint / STATE)
    except ValueError:
        saved = {}
    damaged = [STATE] if [name for name, kind in _STATE_KINDS.items() if type(saved.get(name)) is not kind] else []
    damaged = damaged or [name for name, digest in saved["files"].items() if _digest(checkpoint / name) != digest]
    if damaged:
        raise ValueError(
            f"checkpoint {checkpoint} is damaged (file {damaged[0]}): go on from an older one, or start anew"
        )
    if "plans_ahead" not in saved:
        raise ValueError(
            f"{checkpoint} is of an earlier version, which told runs apart by other marks: start anew in another "
            "--output_dir; its adapter can still be loaded"
        )
    wanted = json.loads(json.dumps(identity))  # tuples are lists there
    before, now = BEFORE | saved["flags"], wanted["flags"]
    if before.get("method_args") and now.get("method_args"):  # an option that it is older than can't differ
        older = {argument.partition("=")[0] for argument in before["method_args"]}
        now["method_args"] = [argument for argument in now["method_args"] if argument.partition("=")[0] in older]
    differences = [
        f"--{name} was {before.get(name)} and is {now.get(name)}"
        + (f", and {' and '.join(wanted['plans_ahead'])} depends on it" if name == "max_train_steps" else "")
        for name in sorted({*before, *now} - IN_BOTH | IN_BOTH & before.keys() & now.keys())
        if before.get(name) != now.get(name)
    ]
    differences += [
        f"the {name.replace('_', ' ')} changed"
        for name in sorted(wanted["content"])
        if saved["content"].get(name) != wanted["content"][name]
    ]
    if differences:
        raise ValueError(f"{checkpoint} belongs to another run: {'; '.join(differences)}. Undo that, or start anew")
    if saved["step"] > max_train_steps:
        raise ValueError(
            f"--max_train_steps {max_train_steps} is less than the {saved['step']} of {checkpoint}: raise it, or go on "
            "from an older one"
        )
    return saved["step"]


def check_earlier_run(folder: Path, results: Sequence[str], record: str, metrics: str, resumes: bool) -> None:
    """Refuse a folder in which a run would destroy something: the user's own files, or a run that did not finish.

    Args:
        results: names of files and folders that a finished run writes.
        record, metrics: the files that only a finished run has, and every run after its first step.
        resumes: this run goes on from a checkpoint.

    Raises:
        ValueError: naming the file, or the newest checkpoint.
    """
    old, run = checkpoints(folder), is_metrics(folder / metrics)
    named = sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    if other := [path for path in named if path not in {mine for _, mine in old}]:
        raise ValueError(
            f"--output_dir {folder} has {other[0].name} without {STATE}: it is not of this trainer, or not whole, and "
            "a run may replace it; choose another folder, or move it away"
        )
    if old and not resumes and not (folder / record).exists():
        raise ValueError(
            f"--output_dir {folder} has {old[-1][1].name} of a run that did not finish: add "
            "--resume_from_checkpoint latest, choose another folder, or delete its checkpoints"
        )
    foreign = [name for name in [*results, metrics] if os.path.lexists(folder / name)]
    if foreign and not old and not run:
        raise ValueError(
            f"--output_dir {folder} has {foreign[0]}, and no run's {metrics} beside it: it looks like your own, and a "
            "run would replace it; choose another folder"
        )
    linked = [name for name in results if (folder / name).is_symlink()]
    recorded = set(recorded_files(folder, results))
    places = [] if resumes else [folder / name for name in results]  # a resumed run's own may be half written
    weights = [path for place in places for path in place.rglob("*.safetensors")]
    replaced = [*(place for place in places if place.is_file()), *weights]
    if unknown := linked + [str(path.relative_to(folder)) for path in replaced if path not in recorded]:
        raise ValueError(
            f"--output_dir {folder} has {unknown[0]}, which no run has recorded there: a run would replace it; move it "
            "away, or choose another folder"
        )


def clear_earlier_run(accelerator: Accelerator, folder: Path, results: Sequence[str], keep_state: bool) -> None:
    """Take away what an earlier run has recorded: its record must not stand beside new weights.

    Everything else in these places stays, because somebody has put it there. The main process does it.

    Args:
        results: names of files and folders that a finished run writes.
        keep_state: this run goes on from a checkpoint, so checkpoints stay.
    """
    if not accelerator.is_main_process:
        return
    if not keep_state:
        for _, path in checkpoints(folder):
            _remove(path)
    for partial in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial)
    places = [folder / name for name in results]
    for file in recorded_files(folder, results):
        if any(file == place or place in file.parents for place in places):
            file.unlink(missing_ok=True)
    for place in places:
        inside = sorted(path for path in [place, *place.rglob("*")] if path.is_dir() and not path.is_symlink())
        for path in reversed(inside):  # the innermost first
            if not any(path.iterdir()):
                path.rmdir()


class FolderLock:
    """Holds a run's folder against a second run until the end of the ``with``; the system lets go of a killed one's."""

    def __enter__(self) -> FolderLock:
        self._lock: FileLock | None = None
        return self

    def take(self, folder: Path) -> None:
        """Make the folder, and hold it.

        Raises:
            ValueError: if another process holds it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"--output_dir {folder} is in use by another run: wait for its end, or choose another folder"
            ) from error
        except (OSError, NotImplementedError):  # a network file system that can't lock
            return
        self._lock = lock

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)


class GracefulStop:
    """SIGINT and SIGTERM ask the loop to save and leave after the step at hand; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever runs that handles signals
                break
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked; every process gets the same answer."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        number = torch.tensor(self.signal or 0, device=accelerator.device)
        highest = int(accelerator.gather(number.reshape(1)).max())
        self.signal = highest or None
        return self.signal is not None
