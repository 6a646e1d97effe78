"""What a run says while it goes on; `run.train` yields these, and `loop.Step` between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.adapters.injection import Kind
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import Step

__all__ = ["Event", "Finished", "Measured", "Preparing", "Previewed", "Resumed", "Saved", "Settled", "Stopped"]


@dataclass(frozen=True)
class Preparing:
    """Something before the first step: so many of so many, with the seconds left where they are known."""

    text: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True)
class Settled:
    """The configuration with all that was left to the base, or to the adapter that is gone on from."""

    config: TrainConfig


@dataclass(frozen=True)
class Resumed:
    kind: Kind
    step: int
    total: int


@dataclass(frozen=True)
class Measured:
    """The held-out loss after `step` steps; at step 0 it is the base's."""

    kind: Kind
    step: int
    held_out_loss: float


@dataclass(frozen=True)
class Previewed:
    kind: Kind
    step: int
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Saved:
    """The adapter as it is after `step` steps, to choose from afterwards."""

    kind: Kind
    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """Stopped on request, with a checkpoint to go on from."""

    kind: Kind
    step: int
    total: int
    checkpoint: Path


@dataclass(frozen=True)
class Finished:
    """One adapter is done."""

    kind: Kind
    path: Path
    base_loss: float | None
    held_out_loss: float | None


Event = Preparing | Settled | Resumed | Step | Measured | Previewed | Saved | Stopped | Finished
