"""The trainer in several processes: `python forked_processes.py PROCESSES FLAG...`, as torchrun starts them.

Each is a fork of this process, which has imported the trainer, so that the libraries are loaded once. A process's own
working directory is `machine-RANK` where there is one. One that fails ends the others, and gives the exit status.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_dreambooth_nora_sdxl as trainer


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(rank: int, processes: int, port: int, flags: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if Path(f"machine-{rank}").is_dir():
        os.chdir(f"machine-{rank}")
    status = 0
    try:
        trainer.main(flags)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(processes: int, flags: list[str]) -> None:
    port = free_port()
    running = {start(rank, processes, port, flags) for rank in range(processes)}
    worst = 0
    while running:
        child, status = os.wait()
        running.discard(child)
        if (code := os.waitstatus_to_exitcode(status)) and not worst:
            worst = abs(code)
            for other in running:  # which would wait for it
                os.kill(other, signal.SIGTERM)
    sys.exit(worst)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
