"""Files appear under their name only when they are whole, and a folder that cannot be written to is said at once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion.errors import ConfigError, OutputError
from dora_diffusion.paths import fitting, obstacle

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_output",
    "check_places",
    "clear_left_overs",
    "copy_file",
    "held",
    "make_folder",
    "save_png",
    "scratch_folder",
    "whole_file",
    "write_text",
    "writing",
]

# A scratch folder, or with a suffix a file as earlier versions wrote it.
LEFT_OVER = re.compile(r"\..*\.[a-z0-9_]{8}\.tmp(\.\w+)?")
CERTAINLY_DEAD = 24 * 3600  # seconds, where nobody can be asked whether the process lives


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing `path`, as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Choose a place that you may write to, with room left."
        ) from error


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder beside a path, which is gone when the block ends.

    It is locked while this process works in it, so that what a killed one left is told from it. Raises OSError.
    """
    folder, lock = _new_scratch(beside)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _new_scratch(beside: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=beside.parent, prefix=fitting(f".{beside.name}", ".", 200), suffix=".tmp"))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # taken for a left over before it was locked
            lock = _lock(folder)
            if folder.exists():
                return folder, lock
            _unlock(lock)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process, of all that ask for it so. Raises OutputError while another one has it."""
    with writing(folder):
        try:
            lock = _lock(folder)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is training into {folder}. Wait until it has ended, stop it, or give another folder."
            ) from error
    try:
        yield
    finally:
        _unlock(lock)


def clear_left_overs(folder: Path, depth: int = 1) -> None:
    """Remove what killed processes were writing in this folder and, `depth` deep, in the folders in it.

    What live ones write stays.
    """
    with contextlib.suppress(OSError):  # what cannot be looked at or removed is in nobody's way
        for path in list(folder.iterdir()):
            is_folder = path.is_dir() and not path.is_symlink()
            if LEFT_OVER.fullmatch(path.name) and _is_left_over(path):
                shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)
            elif is_folder and depth > 0:
                clear_left_overs(path, depth - 1)


def _is_left_over(path: Path) -> bool:
    """Whether no process holds it any more."""
    try:
        lock = _lock(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # it was finished meanwhile
        return False
    if lock is None:
        return time.time() - path.stat().st_mtime > CERTAINLY_DEAD
    _unlock(lock)
    return True


def _lock(path: Path) -> int | None:
    """Hold a file or folder, for as long as this process lives; None where that cannot be done.

    Raises BlockingIOError while somebody else holds it.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name when the block ends well. Raises OutputError."""
    with writing(path):
        path = _replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path) as scratch:
            temporary = scratch / fitting(f"file{path.suffix}", "", 40)
            yield temporary
            temporary.chmod(0o644)
            with temporary.open("rb+") as file:
                os.fsync(file)  # a name that outlives a power cut, and bytes that do not, would be a file of zeros
            temporary.replace(path)


def write_text(path: Path, text: str) -> Path:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def copy_file(source: Path, path: Path) -> Path:
    """Raises OutputError."""
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)
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
    """Create the folder if need be, make sure that it can be written to, and clear it of what killed processes left.

    Raises OutputError.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file has room on a full disk too
            file.flush()
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}. "
            "Choose an output folder of your own (--out; --outputs of the web app)."
        ) from error
    clear_left_overs(folder)
    return folder
