"""Files of one JSON table a line, written a line at a time: a run's log and the blind votes.

A disk may fill, and a machine lose its power, in the middle of a line. So each line is written whole or not at all, and
what of a file is sound is read whatever the rest looks like.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.errors import OutputError
from dora_diffusion.outputs import writing

__all__ = ["Journal", "LogEntry", "RunLog", "append_entry", "read_journal", "read_log"]

KINDS = ("lora", "dora")  # as injection.Kind has them, without its import of torch


@dataclass(frozen=True)
class Journal:
    """The sound entries, in their order, and how many lines were none."""

    entries: tuple[dict[str, object], ...]
    unsound: int


def append_entry(path: Path, entry: Mapping[str, object]) -> None:
    """Add a line; where there is no room for all of it the file stays as it was. Raises OutputError."""
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        rest = memoryview((_gap(path, before) + json.dumps(entry) + "\n").encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def _gap(path: Path, size: int) -> str:
    """What parts a new line from one that was cut."""
    if size == 0:
        return ""
    with path.open("rb") as file:
        file.seek(size - 1)
        return "" if file.read(1) == b"\n" else "\n"


def read_journal(path: Path) -> Journal:
    """The file's entries; none where there is no file. Blank lines are nothing, zeros around an entry too.

    Raises OutputError for a file that cannot be read at all.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Journal((), 0)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}. Move it away.") from error
    entries, unsound = [], 0
    for line in lines:
        text = line.strip(b"\0 \t\r")
        if not text:
            unsound += bool(line.strip())  # zeros stand where something was
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            unsound += 1
    return Journal(tuple(entries), unsound)


@dataclass(frozen=True)
class LogEntry:
    """A line of a run's log.jsonl: after step `step` of the `kind`, or of its base at step 0."""

    kind: str
    step: int
    loss: float | None
    held_out_loss: float | None
    written: dict[str, object]  # as it stands in the file


@dataclass(frozen=True)
class RunLog:
    """The sound entries of a log, in their order, and how many lines were none."""

    entries: tuple[LogEntry, ...]
    unsound: int


def read_log(path: Path) -> RunLog:
    """Raises OutputError for a file that cannot be read at all."""
    journal = read_journal(path)
    entries = tuple(entry for line in journal.entries if (entry := _log_entry(line)) is not None)
    return RunLog(entries, journal.unsound + len(journal.entries) - len(entries))


def _log_entry(line: dict[str, object]) -> LogEntry | None:
    kind, step = line.get("kind"), line.get("step")
    if kind not in KINDS or type(step) is not int or step < 0:
        return None
    losses = [line.get(key) for key in ("loss", "held_out_loss")]
    if not all(loss is None or (type(loss) in (int, float) and math.isfinite(loss)) for loss in losses):  # type: ignore[arg-type]
        return None
    loss, held_out = (None if loss is None else float(loss) for loss in losses)  # type: ignore[arg-type]
    return LogEntry(str(kind), step, loss, held_out, line)
