"""The accelerator, the trackers and the hub, as the flags ask for them."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, parse_flag_from_env
from huggingface_hub import create_repo, upload_folder, whoami
from PIL import Image
from torch import nn

from runs.checkpoints import FolderLock
from settings.learning import HardwareOptions
from settings.watching import OutputOptions
from storage.text import first_line
from trainer.memory import import_torchao
from trainer.sharding import accelerator_class

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a hub repository gets; checkpoints, best/, logs and encoded pictures, wherever they are kept, stay at home.
UPLOADED = (
    "*.safetensors",
    "README.md",
    "run.json",
    "metrics.jsonl",
    "loss.png",
    "samples/**/*.png",
    "peft/[!.]*/adapter_*",
)


def make_accelerator(
    hardware: HardwareOptions, output: OutputOptions, *, accumulation: int = 1, trains_text: bool = False
) -> Accelerator:
    """Devices, processes and precision.

    Args:
        accumulation: batches of an optimiser step.
        trains_text: text encoders are among the models.

    Raises:
        ValueError: for a precision, a tracker or a configuration of accelerate that can't be used here.
    """
    check_trackers(output.report_to)
    accelerator_of_launcher = accelerator_class(hardware.quantize_base or "none")
    if hardware.quantize_base == "int8":
        import_torchao()
    mixed_precision, output_dir = hardware.mixed_precision, Path(output.output_dir)
    if mixed_precision is None and torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        # SDXL in fp32 fits few cards, and an accelerate that was never configured says "no".
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        mixed_precision = "fp16" if configured == "no" else configured
    accelerator = accelerator_of_launcher(
        mixed_precision="no" if mixed_precision == "fp32" else mixed_precision,
        gradient_accumulation_steps=accumulation,
        log_with=None if output.report_to == "none" else output.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / output.logging_dir)),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # NoRA's frozen factors are buffers, the same in every process
                # SDXL reads the last but one layer of its first text encoder: adapters above it get no gradient.
                find_unused_parameters=trains_text,
            ),
            # The others wait while the main process draws and scores; NCCL's own limit is ten minutes.
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # they would all write into one folder, each as if it were alone
        raise ValueError(
            f"{launched} processes were launched and accelerate sees {accelerator.num_processes}: on a CPU export "
            "ACCELERATE_USE_CPU=true first, on GPUs launch one process a GPU"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"accelerate is configured for {accelerator.mixed_precision}, which is not supported here: add "
            "--mixed_precision no, fp16 or bf16"
        )
    if hardware.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_trackers(report_to: str) -> None:
    """Refuse a tracker that accelerate does not know or whose package is missing: accelerate would pass it over."""
    if report_to in ("all", "none"):
        return
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if report_to not in known:
        raise ValueError(f"--report_to {report_to} is not known: choose none, all or {', '.join(known)}")
    if report_to not in {str(tracker) for tracker in get_available_trackers()}:
        raise ValueError(f"--report_to {report_to} needs its package: pip install {report_to}, or --report_to none")


def start_trackers(accelerator: Accelerator, flags: Mapping[str, Any]) -> None:
    """Tell the trackers the run's flags."""
    values = {name: value for name, value in flags.items() if isinstance(value, (int, float, str))}
    values.pop("hub_token", None)  # a secret
    accelerator.init_trackers("dreambooth", values)


def check_one_folder(accelerator: Accelerator, folder: Path, flag: str) -> None:
    """Refuse a folder that is another one to some of the processes, as on machines without a shared disk.

    Raises:
        ValueError: in every process.
    """
    if accelerator.num_processes == 1:
        return
    while not folder.is_dir():  # what will be made is made in the first that is there
        folder = folder.parent
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    if accelerator.is_main_process:
        (folder / name).touch()
    accelerator.wait_for_everyone()
    seen = accelerator.gather(torch.tensor([(folder / name).exists()], device=accelerator.device))
    if accelerator.is_main_process:
        (folder / name).unlink()
    if not bool(seen.all()):
        raise ValueError(
            f"{flag} is not the same folder for process {int(seen.int().argmin())} as for the first: name one on a "
            "disk that all machines share"
        )


def check_same(accelerator: Accelerator, text: str, what: str) -> None:
    """Refuse what differs between the processes.

    Args:
        text: such as a hash.

    Raises:
        ValueError: in every process.
    """
    (first,) = broadcast_object_list([text])
    same = accelerator.gather(torch.tensor([text == first], device=accelerator.device))
    if not bool(same.all()):
        raise ValueError(
            f"process {int(same.int().argmin())} has other {what} than the first: give all machines the same"
        )


def take_folder(lock: FolderLock, accelerator: Accelerator, folder: Path, output: OutputOptions) -> None:
    """Make the run's folder, held, and its repository, once nothing more is to be refused; every process waits."""
    if accelerator.is_main_process:
        if output.push_to_hub:
            open_repository(folder, output.hub_model_id, output.hub_token)
        lock.take(folder)
    accelerator.wait_for_everyone()


def end_training(accelerator: Accelerator, models: dict[str, nn.Module]) -> None:
    """Finish the trackers and the process group.

    Args:
        models: prepared ones, and the only references to them beside accelerate's; they are dropped here. A DDP model
            that outlives its group frees it while it holds Python's lock, for which a thread of gloo may be waiting:
            some runs then never ended (pytorch/pytorch#56297).
    """
    models.clear()
    accelerator.free_memory()
    accelerator.end_training()


def log_images(accelerator: Accelerator, images: Mapping[str, Image.Image], step: int) -> None:
    batches = {name: np.asarray(image)[None] for name, image in images.items()}  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):  # TensorBoard and Weights & Biases
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(batches, step=step, **options)


def open_repository(folder: Path, hub_model_id: str | None, token: str | None) -> str:
    """Make the repository if there is none, before hours are spent on what it is to hold; returns its id.

    Args:
        hub_model_id: None: the folder's name.

    Raises:
        ValueError: if the hub refuses, or can't be reached.
    """
    name = repository_name(folder, hub_model_id)
    with _hub_errors(name, token, "nothing is trained yet: see hf auth login, or leave it out and use hf upload later"):
        return create_repo(name, token=token, exist_ok=True).repo_id


def repository_name(folder: Path, hub_model_id: str | None) -> str:
    return hub_model_id or folder.resolve().name


def check_login(token: str | None) -> None:
    """Raise ValueError unless the hub knows the token, or the one of ``hf auth login``."""
    with _hub_errors("can't log in", token, "see hf auth login"):
        whoami(token=token)


def push_to_hub(folder: Path, hub_model_id: str | None, token: str | None) -> str:
    """Upload the adapter, its card and its samples; returns the repository's id.

    Args:
        hub_model_id: None: the folder's name.

    Raises:
        ValueError: if the hub refuses, or can't be reached.
    """
    name = repository_name(folder, hub_model_id)
    # found here, because a * of the hub's patterns goes into sub-folders
    files = [path.relative_to(folder).as_posix() for pattern in UPLOADED for path in folder.glob(pattern)]
    with _hub_errors(name, token, f"the run is whole in {folder}; upload it with hf upload"):
        repository = create_repo(name, token=token, exist_ok=True).repo_id
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            token=token,
            allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload the adapter",
        )
    return repository


@contextmanager
def _hub_errors(name: str, token: str | None, then: str) -> Iterator[None]:
    """What the hub's client lets through of its HTTP and storage libraries, as one sentence without the token."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)
        if token:
            reason = reason.replace(token, "…")
        raise ValueError(f"--push_to_hub {name}: {reason} ({then})") from error
