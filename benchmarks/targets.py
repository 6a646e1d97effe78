"""What this project promises of its speed, each beside the measured figure. Nothing is asserted: met, or missed by so
much, or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.measure import ratios, spread
from benchmarks.results import Entry, Row

__all__ = ["TARGETS", "Outcome", "Target", "outcomes"]


@dataclass(frozen=True)
class Target:
    """A figure of one mode and its limit. `figure` gives None where an entry does not hold it."""

    text: str
    mode: str
    device: str
    limit: float
    unit: str
    figure: Callable[[Entry], float | None]
    models: tuple[str, ...] = ("sd15",)
    ranks: tuple[int, ...] = ()
    strictly: bool = False

    def concerns(self, entry: Entry) -> bool:
        return (
            entry.mode == self.mode
            and entry.device == self.device
            and entry.case.rpartition("-")[0] in self.models
            and (not self.ranks or entry.rank in self.ranks)
        )


@dataclass(frozen=True)
class Outcome:
    """One target in one entry."""

    target: Target
    where: str
    figure: float

    @property
    def is_met(self) -> bool:
        # As the table prints it: 1.003 is 1.00.
        shown = round(self.figure, 2)
        return shown < self.target.limit if self.target.strictly else shown <= self.target.limit


def outcomes(entries: Sequence[Entry]) -> Iterator[Outcome]:
    for target in TARGETS:
        for entry in entries:
            if target.concerns(entry) and (figure := target.figure(entry)) is not None:
                yield Outcome(target, f"{entry.case}, rank {entry.rank}", figure)


def _ratio(numerator: str, denominator: str) -> Callable[[Entry], float | None]:
    def figure(entry: Entry) -> float | None:
        if not {numerator, denominator} <= entry.rows.keys():
            return None
        seconds = {name: row.seconds for name, row in entry.rows.items()}
        return spread(ratios(seconds, numerator, denominator)).median

    return figure


def _memory_over_base(name: str, other: str) -> Callable[[Entry], float | None]:
    """MB over the frozen base as a part of the other's."""

    def figure(entry: Entry) -> float | None:
        peak = {variant: row.peak_mb for variant, row in entry.rows.items()}
        base, own, theirs = (peak.get(variant) for variant in ("base", name, other))
        if base is None or own is None or theirs is None or theirs <= base:
            return None
        return (own - base) / (theirs - base)

    return figure


def _of_row(name: str, figure: Callable[[Row], float | None]) -> Callable[[Entry], float | None]:
    return lambda entry: figure(entry.rows[name]) if name in entry.rows else None


_GPU = ("sdxl", "flux", "sd15")

TARGETS: tuple[Target, ...] = (
    Target("DoRA step / PEFT LoRA step", "training", "cpu", 0.95, "x", _ratio("dora", "peft-lora")),
    Target("DoRA step / PEFT DoRA step", "training", "cpu", 0.75, "x", _ratio("dora", "peft-dora")),
    Target("DoRA step / LoRA step here", "training", "cpu", 1.03, "x", _ratio("dora", "lora")),
    Target("LoRA step / PEFT LoRA step", "training", "cpu", 0.95, "x", _ratio("lora", "peft-lora")),
    Target(
        "DoRA memory / PEFT LoRA memory, over the base",
        "memory",
        "cpu",
        1.0,
        "x",
        _memory_over_base("dora", "peft-lora"),
    ),
    Target("unfused DoRA / base, inference", "inference", "cpu", 1.05, "x", _ratio("dora", "base")),
    Target("fused DoRA / base, inference", "inference", "cpu", 1.0, "x", _ratio("dora-fused", "base")),
    Target(
        "strength of all layers changed",
        "handling",
        "cpu",
        20.0,
        "ms",
        _of_row("dora", lambda row: row.strength_ms),
        strictly=True,
    ),
    Target(
        "DoRA injected",
        "handling",
        "cpu",
        2.0,
        "s",
        _of_row("dora", lambda row: spread(row.seconds).median),
        strictly=True,
    ),
    Target("DoRA step / PEFT LoRA step", "training", "cuda", 1.0, "x", _ratio("dora", "peft-lora"), models=_GPU),
    Target(
        "DoRA step / PEFT DoRA step",
        "training",
        "cuda",
        0.6,
        "x",
        _ratio("dora", "peft-dora"),
        models=_GPU,
        ranks=(64,),
    ),
    Target(
        "DoRA step / LyCORIS DoRA step",
        "training",
        "cuda",
        1.0,
        "x",
        _ratio("dora", "lycoris-dora"),
        models=_GPU,
        strictly=True,
    ),
)
