"""Timing that can be trusted on a machine that is never quite quiet.

All variants run in one process, round by round, so that whatever slows the machine slows them alike. What is reported
is the ratio of two times of the same round: its median, and its quartiles as the spread.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["OtherPrograms", "Spread", "in_turns", "ratios", "repeats_for", "seconds_of", "spread"]

SHORTEST = 0.05  # seconds; a shorter run is repeated until one measurement takes this long


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles."""

    median: float
    low: float
    high: float


def in_turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: another one first each time, and every second time backwards, so that no variant
    always runs after the same other one."""
    for i in range(rounds):
        start = (i // 2) % len(names)
        order = [*names[start:], *names[:start]]
        yield order if i % 2 == 0 else order[::-1]


def ratios(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> list[float]:
    """Time over time, round by round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return [a / b for a, b in pairs]


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more; quartiles by linear interpolation."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def repeats_for(seconds: float) -> int:
    """How often a run of this length is repeated in one measurement."""
    return max(1, math.ceil(SHORTEST / max(seconds, 1e-6)))


def seconds_of(
    run: Callable[[], object], device: torch.device, *, before: Callable[[], object], repeats: int = 1
) -> float:
    """The mean time of one run; `before` is called before each and is not part of it. Python's collector waits.

    On CUDA between two events of the stream, so that short kernels are not timed by the length of their launch.
    """
    gc.collect()
    gc.disable()
    try:
        times = _on_stream(run, device, before, repeats) if device.type == "cuda" else _on_clock(run, before, repeats)
    finally:
        gc.enable()
    return sum(times) / repeats


def _on_clock(run: Callable[[], object], before: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _on_stream(
    run: Callable[[], object], device: torch.device, before: Callable[[], object], repeats: int
) -> list[float]:
    torch.cuda.synchronize(device)
    events = []
    for _ in range(repeats):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in events]


class OtherPrograms:
    """How many processors the machine's other programs keep busy, from its making until `busy` is asked."""

    def __init__(self) -> None:
        self._start = self._now()

    def busy(self) -> float | None:
        """Processors, or None where the system does not tell (it does on Linux)."""
        (total, own, wall), (total_before, own_before, wall_before) = self._now(), self._start
        if total is None or total_before is None or wall <= wall_before:
            return None
        return max(0.0, (total - total_before - own + own_before) / (wall - wall_before))

    @staticmethod
    def _now() -> tuple[float | None, float, float]:
        """Busy processor seconds of the machine, of this process, and the clock."""
        stat, total = Path("/proc/stat"), None
        if stat.exists():
            user, nice, system, _idle, _waiting, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
            total = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return total, time.process_time(), time.perf_counter()
