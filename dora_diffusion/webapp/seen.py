"""Which pictures a visitor was shown with their names: a vote on these is not blind, in another tab neither."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_diffusion.generation import GenerationRequest
    from dora_diffusion.webapp.shown import Shown

__all__ = ["Seen"]

MOST_KEPT = 50_000  # pictures; the oldest are forgotten
Key = tuple[str, "GenerationRequest", Path | None, float]


class Seen:
    """Kept for as long as the server runs. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, visitor: str, shown: Shown) -> None:
        """All of its pictures that are there."""
        keys = [_key(visitor, shown, cell.row, cell.column) for cell in shown.cells]
        with self._lock:
            for key in keys:
                self._keys[key] = None
                self._keys.move_to_end(key)
            while len(self._keys) > MOST_KEPT:
                self._keys.popitem(last=False)

    def all_of(self, visitor: str, shown: Shown, row: int, columns: Iterable[int]) -> bool:
        keys = [_key(visitor, shown, row, column) for column in columns]
        with self._lock:
            return shown.is_example or all(key in self._keys for key in keys)


def _key(visitor: str, shown: Shown, row: int, column: int) -> Key:
    each = shown.request.columns[column]
    return visitor, shown.request.picture(*shown.request.rows[row]), each.path, each.strength
