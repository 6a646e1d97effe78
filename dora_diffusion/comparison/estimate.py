"""What a training run will cost, measured over a few real steps of each kind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from dora_diffusion.adapters.injection import Kind
from dora_diffusion.generation import GenerationRequest, generate
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import (
    Training,
    held_out_count,
    held_out_loss,
    make_accelerator,
    new_adapter,
    prepare,
    steps,
)

__all__ = ["Estimate", "KindCost", "estimate_run"]

WARM_UP = 1  # steps before the clock runs: the first one builds what later ones reuse
MEASURED = 2
PREVIEWED = (1, 4)  # steps of the pictures that a preview's time follows from
SAMPLED_EVERY = 0.005  # seconds between looks at the process's memory


@dataclass(frozen=True)
class KindCost:
    """Seconds of a training step, of a preview picture, and of one measurement of one held-out picture."""

    parameters: int
    step: float
    preview: float
    held_out: float

    def seconds(self, config: TrainConfig, pictures: int) -> float:
        """Of a whole run of this kind on so many pictures, some of them held out."""
        previews = _times(config.steps, config.preview_every) * len(config.preview_prompts) * len(config.preview_seeds)
        measured = (1 + _times(config.steps, config.validate_every)) * held_out_count(config, pictures)
        return config.steps * self.step + previews * self.preview + measured * self.held_out


@dataclass(frozen=True)
class Estimate:
    """`memory` is the most bytes in use while it was measured: of the accelerator, or of the whole process on a CPU."""

    costs: dict[Kind, KindCost]
    memory: int

    def seconds(self, config: TrainConfig, pictures: int) -> float:
        return sum(cost.seconds(config, pictures) for cost in self.costs.values())


def _times(steps: int, every: int) -> int:
    """How often something is done that is done every so many steps, and after the last one."""
    return -(-steps // every)


def estimate_run(config: TrainConfig, base: Base) -> Estimate:
    """Train a few steps of each kind on the pictures in config.images and throw the result away.

    A batch's worth of pictures is enough. Raises the errors of `prepare`; leaves the base as it was.
    """
    short = config.model_copy(
        update={"steps": WARM_UP + MEASURED, "warmup_steps": None, "held_out": 0, "class_prompt": None}
    )
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
        step = (time.monotonic() - began) / count
        began = time.monotonic()
        held_out_loss(replace(training, held_out=training.instances))
        held_out = (time.monotonic() - began) / training.pictures
        preview = _preview(training.base, training.config) if training.config.preview_prompts else 0.0
        return KindCost(sum(parameter.numel() for parameter in adapter.parameters()), step, preview, held_out)
    finally:
        adapter.eject()


def _preview(base: Base, config: TrainConfig) -> float:
    """Seconds of a preview, from two pictures of fewer steps: a whole one takes minutes on a large base."""
    spent = []
    for count in PREVIEWED:
        began = time.monotonic()
        generate(base, GenerationRequest(config.preview_prompts[0], num_inference_steps=count))
        spent.append(time.monotonic() - began)
    few, more = PREVIEWED
    a_step = max(0.0, (spent[1] - spent[0]) / (more - few))
    return spent[0] + (GenerationRequest("").num_inference_steps - few) * a_step


@contextmanager
def _watched_memory(base: Base) -> Iterator[list[int]]:
    """One number that grows to the most bytes in use while the block runs."""
    peak = [0]
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(base.device)
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
