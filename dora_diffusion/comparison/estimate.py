"""What a training run will cost, measured over a few real steps of each kind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dora_diffusion.injection import Kind
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import Training, make_accelerator, new_adapter, prepare, steps

__all__ = ["Estimate", "KindCost", "estimate_run"]

WARM_UP = 1  # steps before the clock runs: the first one builds what later ones reuse
MEASURED = 2
SAMPLED_EVERY = 0.005  # seconds between looks at the process's memory


@dataclass(frozen=True)
class KindCost:
    parameters: int
    seconds_per_step: float


@dataclass(frozen=True)
class Estimate:
    """`memory` is the most bytes in use while it was measured: of the accelerator, or of the whole process on a CPU."""

    costs: dict[Kind, KindCost]
    memory: int

    def seconds(self, steps: int) -> float:
        return steps * sum(cost.seconds_per_step for cost in self.costs.values())


def estimate_run(config: TrainConfig, base: Base) -> Estimate:
    """Train a few steps of each kind on the pictures in config.images and throw the result away.

    A batch's worth of pictures is enough. Raises the errors of `prepare`; leaves the base as it was.
    """
    short = config.model_copy(update={"steps": WARM_UP + MEASURED, "held_out": 0, "class_prompt": None})
    with _watched_memory(base) as peak:
        training = prepare(short, base, make_accelerator(short))
        costs = {kind: _measure(training, kind) for kind in config.kinds}
    return Estimate(costs, peak[0])


def _measure(training: Training, kind: Kind) -> KindCost:
    adapter, optimizer = new_adapter(training, kind)
    try:
        run = steps(training, kind, adapter, optimizer)
        list(islice(run, WARM_UP))
        began = time.monotonic()
        count = len(list(run))
        spent = time.monotonic() - began
        return KindCost(sum(parameter.numel() for parameter in adapter.parameters()), spent / count)
    finally:
        adapter.eject()


@contextmanager
def _watched_memory(base: Base) -> Iterator[list[int]]:
    """One number that grows to the most bytes in use while the block runs."""
    peak = [0]
    if base.pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.pipe.device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(base.pipe.device)
        return
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident())
            done.wait(SAMPLED_EVERY)

    watcher = threading.Thread(target=look, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], _resident())


def _resident() -> int:
    """Bytes of this process in memory; where the system does not say, the most there ever were."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if os.uname().sysname == "Darwin" else most * 1024
