"""Files appear under their name only when they are whole, and a folder that cannot be written to is said at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion.errors import OutputError

__all__ = ["make_folder", "save_png", "whole_file", "write_text"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name when the block ends well. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Choose a place that you may write to, with room left."
        ) from error


def write_text(path: Path, text: str) -> Path:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def save_png(image: Image.Image, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Lossless, with `metadata` as text chunks."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder if need be and make sure that it can be written to. Raises OutputError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}. "
            "Choose an output folder of your own (--out; --outputs of the web app)."
        ) from error
    return folder
