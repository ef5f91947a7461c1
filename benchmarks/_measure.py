"""Seconds of several works in turn, and the peak memory of one."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch


class Times(dict[str, list[float]]):
    """Seconds of every work, one figure a round."""

    def median(self, name: str) -> float:
        """Seconds of one work."""
        return statistics.median(self[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of what one work takes, as a multiple of what another took in the same round."""
        return statistics.median(a / b for a, b in zip(self[name], self[base], strict=True))


def time_in_turn(works: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> Times:
    """Seconds of every work, round by round, all of them there and back in each, in another order every round.

    A work's figure is the mean of its two, so that a load on the machine that grows or falls evenly cancels out of
    ratios; the order changes, as a work that follows itself finds its memory still mapped. Every work runs once
    before, uncounted.
    """
    for work in works.values():
        work()
    times = Times({name: [] for name in works})
    orders = random.Random(0)
    for _ in range(rounds):
        order = orders.sample(list(works), len(works))
        there = {name: _seconds(works[name], device) for name in order}
        back = {name: _seconds(works[name], device) for name in reversed(order)}
        for name in works:
            times[name].append((there[name] + back[name]) / 2)
    return times


def _seconds(work: Callable[[], Any], device: str) -> float:
    _finish(device)
    start = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """The most that `work` allocates at a time through torch, buffers inside kernels included.

    On a GPU by the allocator's own count, on the CPU by the profiler's list of all it allocates and frees. Pages that
    an allocator keeps for later do not count, unlike in resident memory.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        _finish(device)
        return torch.cuda.max_memory_allocated() - before
    run: Any = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet(), run:
        work()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's C++ code writes to stderr about itself."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
