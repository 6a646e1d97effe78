"""Files appear under their name only when they are whole, and a folder that cannot be written to is said at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion.errors import ConfigError, OutputError
from dora_diffusion.paths import fitting, obstacle

__all__ = ["check_output", "check_places", "make_folder", "save_png", "whole_file", "write_text"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name when the block ends well. Raises OutputError."""
    try:
        path = _replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = fitting(f".tmp{path.suffix}", "", 40)
        prefix = fitting(f".{path.stem}", ".", 255 - 40 - 8)  # mkstemp adds eight letters
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
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


def _replaceable(path: Path) -> Path:
    """The file that writing to `path` replaces: a link stays, and what it leads to is written.

    Raises OutputError where something else than a file stands there: renaming would put a file in a device's place.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError:  # a NUL in it, which obstacle() says
        target = path
    if reason := obstacle(target):
        raise OutputError(f"cannot write {path}: it {reason}. Choose another place.")
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder. Give the name of a file, such as one in it.")
    return target


def check_output(path: Path, inputs: Iterable[Path] = ()) -> Path:
    """Make sure, before any work, that a file can be written here and that it is none of `inputs`.

    The folder is made if need be. Raises OutputError and ConfigError.
    """
    target = _replaceable(path)
    if any(target.exists() and not obstacle(other) and other.exists() and target.samefile(other) for other in inputs):
        raise ConfigError(f"{path} is what is read, and would be replaced. Give another name for what is written.")
    make_folder(target.parent)
    return path


def check_places(folder: Path, files: Iterable[str], folders: Iterable[str]) -> None:
    """Make sure that nothing in `folder` stands in the way of the files and folders that will be written there.

    Raises OutputError.
    """
    for name in files:
        _replaceable(folder / name)
    for name in folders:
        place = folder / name
        if obstacle(place) or place.is_file():
            raise OutputError(f"{place} is in the way, where a folder is needed. Move it, or give another folder.")
        if place.is_dir():
            make_folder(place)


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
