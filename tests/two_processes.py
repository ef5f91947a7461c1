"""Two processes of one training run, started as a launcher starts them, each with its own mishap."""

import os
import socket
import subprocess
import sys
from pathlib import Path

START = """
import sys
{mishap}
from refalign_adapter.train import main
sys.exit(main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_two(
    world: Path, output: Path, *overrides: str, mishaps: tuple[str, str] = ("", "")
) -> list[subprocess.Popen]:
    """The processes of a run on the CPU; before it begins, each runs its mishap, Python code."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = ["--config", str(world / "recipe.yaml"), f"output_dir={output}", *overrides]
    return [
        subprocess.Popen(
            [sys.executable, "-c", START.format(mishap=mishap), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, mishap in enumerate(mishaps)
    ]


def end_of(processes: list[subprocess.Popen], seconds: float = 120) -> tuple[list[int], list[str]]:
    """(exit codes, lines on standard error) of each process; what still runs after that many seconds is a hang."""
    try:
        told = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told
