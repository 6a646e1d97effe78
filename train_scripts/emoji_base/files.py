"""Writing so that a reader, or an interrupted run, never meets half a file or folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, moved into place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder`, swapped into its place when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}-new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}-old-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def append_json_line(path: Path, record: dict[str, float | int | str]) -> None:
    """Adds one record to a JSONL log."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")
