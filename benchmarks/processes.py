"""Two processes at batch 2 against one at batch 4: how far the trained update is apart, at the trainer's default flags.

python -m benchmarks.processes
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.sdxl_shape import ASSETS
from methods.components import FOLDED_WEIGHTS

ROOT = ASSETS.parent


def train(folder: Path, processes: int, batch: int, steps: int) -> Path:
    """The adapter's file of a run on the embedded base."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--main_process_port", "0", *(["--multi_gpu"] if processes > 1 else [])]  # its word for several
    flags = {
        "pretrained_model_name_or_path": ASSETS / "tiny-sdxl",
        "instance_data_dir": ASSETS / "subjects" / "robot",
        "instance_prompt": "a photo of [V] robot",
        "output_dir": folder,
        "train_batch_size": batch,
        "max_train_steps": steps,
        "num_validation_images": 0,
        "report_to": "none",
    }
    command = [*launcher, str(ROOT / "train_dreambooth_nora_sdxl.py")]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return folder / FOLDED_WEIGHTS


def difference(steps: int = 10) -> float:
    """The largest entry of the difference of any layer's update, which A' and B' share up to a rotation."""
    with tempfile.TemporaryDirectory() as name:
        one, two = (load_file(train(Path(name) / str(n), n, 4 // n, steps)) for n in (1, 2))
    downs = [key for key in one if "lora_A" in key]
    updates = [[found[key.replace("lora_A", "lora_B")] @ found[key] for key in downs] for found in (one, two)]
    return max((first - second).abs().max().item() for first, second in zip(*updates))


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    print(f"the updates of one and of two processes differ by at most {difference():.1e}")


if __name__ == "__main__":
    main()
