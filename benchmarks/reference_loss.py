"""Speed and memory of the reference alignment loss against the formula written out, forward and backward, float32.

    python benchmarks/reference_loss.py                  # nine blocks, 2 to 4 references of 1560 tokens, on the CPU
    python benchmarks/reference_loss.py --device cuda --tokens 3600

Timed one after the other in every repeat, and ratios are medians over repeats, so that other load on the machine hits
all alike:
- ours: `reference_alignment_loss`;
- written out: the full (M·N)² cosine matrix and autograd. Same-subject entries are multiplied by 0 rather than indexed
  away, which is the faster of the two ways to write it;
- floor: only the two matrix products of every cross-subject tile, by torch.mm into buffers that exist already and, on
  the CPU, by oneDNN; the faster of the two counts.

Memory is the peak beyond inputs and the students' gradients, of one training step on all blocks in a fresh process:
resident memory on the CPU (Linux), allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from refalign_adapter import reference_alignment_loss

SPEED_BAR, MEMORY_BAR = 3.5, 6
COLUMNS = (
    "M",
    "ours s",
    "written out s",
    "floor s",
    "faster",
    "of the floor",
    "ours MiB",
    "written out MiB",
    "memory",
)


def written_out(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as its formula reads, with margins 0 and 1, for student and teacher (M, N, C)."""
    references, tokens, _ = student.shape
    cosine = F.normalize(student, dim=-1).flatten(0, 1) @ F.normalize(teacher, dim=-1).flatten(0, 1).T
    positive = F.relu(1 - cosine.diagonal()).mean()
    subject = torch.arange(references, device=student.device).repeat_interleave(tokens)
    different = subject[:, None] != subject
    negative = (F.relu(1 - (1 - cosine)) * different).sum() / different.sum()
    return positive + negative


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The package's loss, for student and teacher (M, N, C)."""
    return reference_alignment_loss(student, teacher).total


def training_step(loss: Callable[[Tensor, Tensor], Tensor], students: list[Tensor], teacher: Tensor) -> None:
    """Mean of `loss` over all blocks, then one backward pass, as in training."""
    torch.stack([loss(student, teacher) for student in students]).mean().backward()


def floor(students: list[Tensor], teacher: Tensor) -> None:
    """The two matrix products of every cross-subject tile, by torch.mm."""
    _, tokens, channels = teacher.shape
    tile, sums = teacher.new_empty(tokens, tokens), teacher.new_zeros(tokens, channels)
    for student in students:
        for m, other in itertools.permutations(range(len(teacher)), 2):
            torch.mm(student[m].detach(), teacher[other].T, out=tile)
            sums.addmm_(tile, teacher[other])


def floor_onednn(students: list[Tensor], teacher: Tensor) -> None:
    """The two matrix products of every cross-subject tile, by oneDNN."""
    rows, columns = [target.to_mkldnn() for target in teacher], [target.T.to_mkldnn() for target in teacher]
    for student in students:
        tokens = [features.to_mkldnn() for features in student.detach()]
        for m, other in itertools.permutations(range(len(teacher)), 2):
            F.linear(F.linear(tokens[m], rows[other]), columns[other])


LOSSES = {"ours": ours, "written out": written_out}


def inputs(options: argparse.Namespace, references: int) -> tuple[list[Tensor], Tensor]:
    """One student per block and one teacher, (M, N, C) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (references, options.tokens, options.channels)
    draw = lambda: torch.randn(shape, generator=generator).to(options.device)  # noqa: E731
    return [draw().requires_grad_() for _ in range(options.blocks)], draw()


def seconds(work: Callable[[], None], device: str) -> float:
    """Wall time of `work`."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_case(options: argparse.Namespace, references: int) -> dict[str, list[float]]:
    """Seconds per repeat of ours, the formula written out and the floor; the first round is not counted."""
    floors = [floor_onednn, floor] if options.device == "cpu" and torch.backends.mkldnn.is_available() else [floor]
    students, teacher = inputs(options, references)
    times: dict[str, list[float]] = {name: [] for name in (*LOSSES, "floor")}
    for _ in range(options.repeats + 1):
        for name, loss in LOSSES.items():
            for student in students:
                student.grad = None
            times[name].append(seconds(lambda loss=loss: training_step(loss, students, teacher), options.device))
        products = [seconds(lambda work=work: work(students, teacher), options.device) for work in floors]
        times["floor"].append(min(products))
    return {name: values[1:] for name, values in times.items()}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(options: argparse.Namespace, references: int, name: str) -> int:
    """Extra peak bytes of one training step; to be called in a fresh process."""
    small = argparse.Namespace(**{**vars(options), "tokens": 64, "blocks": 1})
    training_step(LOSSES[name], *inputs(small, 2))  # loads the libraries
    students, teacher = inputs(options, references)
    on_cpu = options.device == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    else:
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS") if on_cpu else torch.cuda.memory_allocated()
    training_step(LOSSES[name], students, teacher)
    peak = resident("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()
    return peak - before - sum(student.nbytes for student in students)


def memory_in_subprocess(options: argparse.Namespace, references: int, name: str) -> int:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--references", str(references)]
    for field in ("tokens", "channels", "blocks", "threads", "device"):
        command += [f"--{field}", str(getattr(options, field))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(options: argparse.Namespace, references: int) -> list[str]:
    """One line of the table."""
    times = time_case(options, references)
    memory = {name: memory_in_subprocess(options, references, name) for name in LOSSES}
    speed = statistics.median(b / a for a, b in zip(times["ours"], times["written out"], strict=True))
    distance = statistics.median(a / b for a, b in zip(times["ours"], times["floor"], strict=True))
    return [
        str(references),
        *(f"{statistics.median(times[name]):.2f}" for name in ("ours", "written out", "floor")),
        f"{speed:.2f}x",
        f"{distance:.2f}x",
        *(f"{memory[name] / 2**20:.0f}" for name in LOSSES),
        f"1/{memory['written out'] / max(1, memory['ours']):.1f}",
    ]


def main() -> None:
    """Parse the options, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[2, 3, 4], help="numbers of references M, from 2")
    parser.add_argument("--tokens", type=int, default=1560, help="tokens per reference N")
    parser.add_argument("--channels", type=int, default=768, help="teacher channels C")
    parser.add_argument("--blocks", type=int, default=9, help="aligned blocks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="paired timings of each case")
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(measure_memory(options, options.references[0], options.memory_of))
        return
    sizes = f"{options.blocks} blocks, N={options.tokens}, C={options.channels}"
    table = Table(title=f"{sizes}, float32, {options.device}, {options.threads} CPU threads")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for references in options.references:
        table.add_row(*row(options, references))
    Console(width=119).print(table)
    print(f"bar at M=4: at least {SPEED_BAR}x faster, at most 1/{MEMORY_BAR} of the memory")


if __name__ == "__main__":
    main()
