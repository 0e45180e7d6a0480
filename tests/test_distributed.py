"""Two processes do what one process does with twice the batch."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from test_resume import command
from test_trainer import CAT, losses, run
from tiny_sdxl import saved_base  # noqa: F401 (built before the processes race to build it)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train_dreambooth_nora_sdxl as trainer
from dreambooth.prior import class_image_name
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS
from nora.files import parse_inner
from settings.learning import HardwareOptions
from settings.watching import OutputOptions
from trainer.accelerator import end_training, make_accelerator
from trainer.models import TRAINED_STATE
from trainer.sharding import share_frozen

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"
VARIANTS = {
    "text encoders, class images": [
        "--random_flip",
        *("--train_text_encoder", "--with_prior_preservation", "--class_prompt", "a cat", "--num_class_images", "3"),
        *("--class_data_dir", "CLASSES"),
    ],
    "teacher, accumulation": [
        *("--with_prior_preservation", "--prior_teacher", "--class_prompt", "a cat"),
        *("--gradient_accumulation_steps", "2", "--method", "lora"),
    ],
}


STEPS = ("--max_train_steps", "4", "--learning_rate", "1e-3")


def in_processes(launcher: list[str], folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """The trainer by a launcher that takes its flags, in a folder; its output is kept in ``stdout``."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *launcher, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    (folder / "stdout").write_text(done.stdout)
    return done


FORKED = [str(Path(__file__).parent / "forked_processes.py"), "2"]


def launched(folder: Path, config: str, *flags: str) -> Path:
    """Two processes as users start them, by `accelerate launch`."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    launcher += ["--main_process_port", "0"]  # any free one: tests run side by side
    done = in_processes(launcher, folder, *command(folder, *STEPS, *flags)[1:])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def sketches(folder: Path) -> dict:
    return {key: one.tolist() for key, one in parse_inner(folder / INNER_WEIGHTS).fingerprints.items()}


def two_machines(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Two processes with relative paths on disks of their own."""
    for number in range(2):
        shutil.copytree(CAT, folder / f"machine-{number}" / "cat", dirs_exist_ok=True)
    return in_processes(FORKED, folder, *command(folder / "out", "--max_train_steps", "2", *flags)[2:])


def test_machines_without_a_shared_disk_are_refused(tmp_path):
    done = two_machines(tmp_path, "--output_dir", "mine")
    assert done.returncode and "--output_dir mine is not the same folder for process 1 as for the first" in done.stderr
    assert not list(tmp_path.rglob(".shared-*")) and not (tmp_path / "machine-0" / "mine").exists()


def test_machines_with_other_pictures_are_refused(tmp_path):
    (tmp_path / "machine-1").mkdir()
    shutil.copytree(CAT, tmp_path / "machine-1" / "cat")
    (tmp_path / "machine-1" / "cat" / "01_sitting_white.txt").write_text("another caption")
    done = two_machines(tmp_path, "--instance_data_dir", "cat")
    assert done.returncode and "process 1 has other pictures or captions than the first" in done.stderr


def test_a_cache_on_each_machine_is_no_other_run(tmp_path):
    """Only the first process's encodings were there."""
    one = two_machines(tmp_path / "shared")
    other = two_machines(tmp_path / "apart", "--encoded_cache_dir", "mine")
    assert one.returncode == other.returncode == 0, other.stderr[-2000:]
    assert losses(tmp_path / "shared" / "out") == losses(tmp_path / "apart" / "out")
    assert (tmp_path / "apart" / "machine-1" / "mine").is_dir()


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch, variant):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ends = [tmp_path / "one", tmp_path / "two"]
    for folder, batch in zip(ends, ("4", "2"), strict=True):
        flags = [flag.replace("CLASSES", str(folder / "classes")) for flag in VARIANTS[variant]]
        given = command(folder, *STEPS, "--train_batch_size", batch, *flags)[2:]
        if folder.name == "one":
            trainer.main(given)
        else:
            done = in_processes(FORKED, folder, *given)
            assert done.returncode == 0, done.stderr[-3000:]
        if "--class_data_dir" in flags:
            drawn = sorted(path.name for path in (folder / "classes").iterdir())
            assert drawn == [class_image_name("a cat", seed) for seed in range(3)]
    one, two = ends
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    first, second = (load_file(folder / FOLDED_WEIGHTS) for folder in ends)
    # A' is unique up to a rotation that the factors share, so what is compared is the update.
    for key in first:
        if key.endswith("lora_A.weight"):
            updates = [weights[key.replace("lora_A", "lora_B")] @ weights[key] for weights in (first, second)]
            assert torch.allclose(*updates, atol=1e-5), key
    if "lora" not in VARIANTS[variant]:  # the bits of A too, of which the file has sketches
        assert sketches(one) == sketches(two)
    assert json.loads((two / "run.json").read_text())["num_processes"] == 2
    assert [json.loads(line)["step"] for line in (two / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_split_base_trains_the_same_adapter(tmp_path):
    flags = ["--gradient_checkpointing", "--ema_decay", "0.9", "--checkpointing_steps", "2"]
    flags += ["--num_validation_images", "1", "--calibration_passes", "2"]
    whole, split = (launched(tmp_path / config, config, *flags) for config in ("cpu_processes.yaml", "fsdp.yaml"))
    assert losses(split) == pytest.approx(losses(whole), abs=1e-5)
    assert "holds 0.5 MB of the UNet's 1.1 MB" in (split / "stdout").read_text()
    assert len(list((split / "samples").glob("*.png"))) == 1
    names = sorted(path.name for path in (whole / "checkpoint-2").iterdir())
    assert sorted(path.name for path in (split / "checkpoint-2").iterdir()) == names  # the adapter alone
    for file in (FOLDED_WEIGHTS, f"checkpoint-2/{TRAINED_STATE}"):
        first, second = load_file(whole / file), load_file(split / file)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.allclose(first[key], second[key], atol=1e-5), key


def test_ddp_shares_only_what_is_trained():
    """A quantised base can't be sent from process to process."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    share_frozen(model)
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "0.bias"]


def test_a_cpu_of_a_machine_with_a_gpu_trains_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = make_accelerator(HardwareOptions(), OutputOptions(output_dir=str(tmp_path), report_to="none"))
    assert accelerator.mixed_precision == "no"


def test_nothing_outlives_the_process_group(tmp_path, monkeypatch):
    """DDP would free the group while it holds Python's lock, for which a thread of gloo may wait: a hang at the end."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        accelerator, models = Accelerator(cpu=True), {"unet": DistributedDataParallel(nn.Linear(2, 2))}
        models["unet"](torch.ones(1, 2)).sum().backward()
        accelerator._models.append(models["unet"])  # as prepare does where there are several processes
        alive = weakref.ref(models["unet"])
        ended = []
        monkeypatch.setattr(accelerator, "end_training", lambda: ended.append(alive()))
        end_training(accelerator, models)
        assert ended == [None]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("environment", "options", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed, which is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"quantize_base": "int8"}, "--quantize_base int8 can't be split"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version 1, and only 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params true"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, monkeypatch, environment, options, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
