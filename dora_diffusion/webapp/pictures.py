"""The pictures that browsers are shown: lossless PNG files under names that nobody can guess and that say nothing."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from dora_diffusion.outputs import copy_file, make_folder, save_png, write_text

__all__ = ["Album", "Albums", "url_of"]

KEPT_ALBUMS = 200  # older ones are deleted, so that the folder does not grow without end


class Album:
    """The pictures of one comparison, one vote or one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, image: Image.Image, metadata: dict[str, str] | None = None) -> Path:
        """Raises OutputError."""
        return save_png(image, self._new("png"), metadata)

    def add_plain(self, path: Path) -> Path:
        """The pixels alone under a new name and with no time of their own, so that nothing says what drew them."""
        with Image.open(path) as image:
            copy = save_png(Image.frombytes(image.mode, image.size, image.tobytes()), self._new("png"))
        os.utime(copy, (0, 0))
        return copy

    def add_text(self, text: str, suffix: str) -> Path:
        return write_text(self._new(suffix), text)

    def copy_in(self, path: Path) -> Path:
        """A file under a new name, to be downloaded."""
        return copy_file(path, self._new(path.suffix.lstrip(".")))

    def _new(self, suffix: str) -> Path:
        return self.folder / f"{secrets.token_urlsafe(12)}.{suffix}"


class Albums:
    """All of one server's, the newest kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_folder(folder)

    def new(self) -> Album:
        albums = sorted(self.folder.iterdir(), key=lambda album: album.stat().st_mtime)
        for old in albums[: max(0, len(albums) - KEPT_ALBUMS + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return Album(make_folder(self.folder / secrets.token_urlsafe(12)))


def url_of(path: Path) -> str:
    """Relative, so that it works behind a proxy's path too; the file route asks for the login like the page itself."""
    return "gradio_api/file=" + quote(str(path))
