"""A short run on small pictures, and what the tests of training ask of its events."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Event
from dora_diffusion.training.loop import Step


def config(pictures: Path, out: Path, base: Path, **values: object) -> TrainConfig:
    defaults: dict[str, object] = {
        "images": str(pictures),
        "out": str(out),
        "base": str(base),
        "instance_prompt": "disc",
        "kind": "both",
        "steps": 6,
        "batch_size": 2,
        "rank": 4,
        "alpha": 4.0,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "held_out": 2,
        "device": "cpu",
    }
    return TrainConfig.from_values({**defaults, **values}, "test")


HANGS = 1500  # seconds; less than a test's own limit, and more than the busiest machine needs


def losses(events: list[Event], kind: str) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step) and event.kind == kind]


def stop_after(count: int):  # type: ignore[no-untyped-def]
    """A should_stop that says yes from the count-th time it is asked."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= count
