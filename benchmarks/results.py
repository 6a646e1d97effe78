"""Results as they are kept: one JSON file, one entry for each case, rank and mode, in a stable order.

A run replaces the entries it measured and keeps the others, so a long benchmark can be run in pieces; every entry
says on which machine, with which versions and on which day it was measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.agreement import Agreement
from dora_diffusion.errors import DoraDiffusionError

__all__ = ["Entry", "Machine", "ResultsError", "Row", "default_path", "describe_machine", "load", "save", "today"]

Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | bool | None"
PACKAGES = ("torch", "diffusers", "peft", "lycoris-lora", "triton", "tilelang", "dora-diffusion")


class ResultsError(DoraDiffusionError):
    """A results file that cannot be read."""


@dataclass(frozen=True)
class Machine:
    """Where and with what an entry was measured."""

    processor: str
    accelerator: str | None
    threads: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One variant's figures; which of them are there depends on the mode."""

    seconds: Sequence[float] = ()  # one of each round
    agreement: Agreement | None = None
    peak_mb: float | None = None
    strength_ms: float | None = None
    strength_touches_weights: bool | None = None


@dataclass(frozen=True)
class Entry:
    """One case, rank and mode."""

    case: str
    about: str
    rank: int
    mode: str
    device: str
    dtype: str
    rounds: int
    reference: str
    quick: bool
    date: str
    machine: Machine
    rows: Mapping[str, Row]
    others: float | None = None  # processors that other programs kept busy meanwhile; None where it is not known
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def key(self) -> str:
        return f"{self.case}, rank {self.rank}, {self.dtype}, {self.mode}"


def default_path(benchmark: str, device: torch.device, quick: bool) -> Path:
    ending = "-quick" if quick else ""
    return Path(__file__).parent / "results" / f"{benchmark}-{device.type}{ending}.json"


def save(path: Path, entries: Sequence[Entry]) -> None:
    """Write these entries into the file, in place of older ones of the same case, rank, dtype and mode."""
    kept = {entry.key: entry for entry in (*load(path), *entries)}
    content = {key: _rounded(dataclasses.asdict(kept[key])) for key in sorted(kept)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    part.replace(path)


def load(path: Path) -> list[Entry]:
    """The entries of a file, none where there is no file. Raises ResultsError."""
    if not path.exists():
        return []
    try:
        return [_entry(stored) for stored in json.loads(path.read_text()).values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{path} holds no results of this version ({error}); name another file or delete it."
        ) from error


def _entry(stored: dict[str, object]) -> Entry:
    rows = {name: _row(row) for name, row in stored.pop("rows").items()}  # type: ignore[attr-defined]
    machine = Machine(**stored.pop("machine"))  # type: ignore[arg-type]
    return Entry(**stored, rows=rows, machine=machine)  # type: ignore[arg-type]


def _row(stored: dict[str, object]) -> Row:
    agreement = stored.pop("agreement")
    return Row(**stored, agreement=Agreement(**agreement) if isinstance(agreement, dict) else None)  # type: ignore[arg-type]


def _rounded(value: Json) -> Json:
    """Floats to five digits: more is noise, and makes every line of a diff change."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def describe_machine(device: torch.device) -> Machine:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with the build's suffix
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(_processor(), accelerator, torch.get_num_threads(), versions)


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} logical processors"


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
