"""Whose each uploaded file is: what a visitor has not uploaded is not read for them, wherever it lies."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["Received", "files_in"]

MOST_KEPT = 20_000  # records; those of files that are gone are dropped first


@dataclass
class _File:
    """One content under one name. Spellings that differ in case are one file on some disks, and several on others."""

    paths: set[str] = field(default_factory=set)
    owners: set[str] = field(default_factory=set)

    @property
    def is_there(self) -> bool:
        return any(map(os.path.exists, self.paths))


class Received:
    """The uploads of one server. Two visitors who send the same bytes under one name share a file: both own it."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()

    def add(self, paths: Iterable[str], *visitors: str) -> None:
        with self._lock:
            for path in map(os.path.realpath, paths):
                file = self._files.setdefault(path.casefold(), _File())
                file.paths.add(path)
                file.owners.update(visitors)
            if len(self._files) > MOST_KEPT:
                self._files = {key: file for key, file in self._files.items() if file.is_there}
            while len(self._files) > MOST_KEPT:
                del self._files[next(iter(self._files))]

    def is_of(self, path: object, visitor: str) -> bool:
        """Whether `path` is, letter for letter, that of a file which this visitor uploaded."""
        if not isinstance(path, str):
            return False
        file = self._files.get(path.casefold())
        return file is not None and path in file.paths and visitor in file.owners

    def may_see(self, path: str, visitor: str) -> bool:
        """Whether the file there is no upload, or one of this visitor; links and `..` are followed first."""
        try:
            file = self._files.get(os.path.realpath(path).casefold())
        except (OSError, ValueError):  # no path at all: whoever serves it says so
            return True
        return file is None or visitor in file.owners


def files_in(value: object) -> Iterator[object]:
    """What stands as a file's path anywhere in a parsed request."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        for inside in value.values():
            yield from files_in(inside)
    elif isinstance(value, (list, tuple)):
        for inside in value:
            yield from files_in(inside)
