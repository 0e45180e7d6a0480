"""Kills a run again and again: `python killed_runs.py FOLDER STEPS KILLS FLAG...` with the trainer's flags.

Each run is a fork of this process, which has imported the trainer, so that the libraries are loaded once. Prints how
many runs were killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_dreambooth_nora_sdxl as trainer


def steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def start_run(flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        trainer.main(flags)
        os._exit(0)
    return child


def main(folder: Path, steps: int, kills: int, flags: list[str]) -> None:
    chance = random.Random(0)
    for number in range(kills):
        wanted = min(max(steps_done(folder) - 1, 0) + chance.randint(1, 5), steps - 1)
        child = start_run(flags)
        while steps_done(folder) < wanted:
            if os.waitpid(child, os.WNOHANG)[0]:
                print(number)  # it came to its end by itself
                return
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.25))  # also while a checkpoint is being written
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
