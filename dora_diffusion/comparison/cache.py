"""Pictures that were drawn before, kept in memory for as long as there is room."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

__all__ = ["PictureCache", "file_digest"]

MOST_BYTES = 32 * 1024**2


class PictureCache:
    """Pictures by a key that says all that decides them; the least used go first. Safe to use from several threads.

    They are kept as PNG files: less than half the memory, and no metadata hangs on them.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def find(self, key: str) -> Image.Image | None:
        with self._lock:
            file = self._files.get(key)
            if file is None:
                return None
            self._files.move_to_end(key)
        with Image.open(BytesIO(file)) as image:
            return image.copy()

    def keep(self, key: str, image: Image.Image) -> None:
        written = BytesIO()
        image.save(written, format="PNG", compress_level=1)
        file = written.getvalue()
        with self._lock:
            self._bytes += len(file) - len(self._files.pop(key, b""))
            self._files[key] = file
            while self._bytes > self.most_bytes:
                self._bytes -= len(self._files.popitem(last=False)[1])


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
