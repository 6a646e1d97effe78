"""Pictures that were drawn before, kept in memory for as long as there is room."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

from PIL import Image

__all__ = ["PictureCache", "file_digest"]

MOST_BYTES = 64 * 1024**2


class PictureCache:
    """Pictures by a key that says all that decides them; the least used go first. Safe to use from several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._pictures: OrderedDict[str, Image.Image] = OrderedDict()
        self._bytes = 0

    def find(self, key: str) -> Image.Image | None:
        with self._lock:
            image = self._pictures.get(key)
            if image is not None:
                self._pictures.move_to_end(key)
            return image

    def keep(self, key: str, image: Image.Image) -> None:
        with self._lock:
            if (before := self._pictures.pop(key, None)) is not None:
                self._bytes -= _bytes(before)
            self._pictures[key] = image
            self._bytes += _bytes(image)
            while self._bytes > self.most_bytes:
                self._bytes -= _bytes(self._pictures.popitem(last=False)[1])


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; worked out again only when the file has changed."""
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _digest(path: Path, _changed: int, _size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
