"""What pictures and captions were encoded to, on disk, by what it was made of: nothing is encoded twice.

One safetensors file for each, in a folder that all runs share. A file appears under its name only when it is whole,
so that several processes may work in the same folder; which one wrote it makes no difference.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dora_diffusion.data import fingerprints
from dora_diffusion.data.fingerprints import bytes_of
from dora_diffusion.errors import ConfigError, DataError, OutputError
from dora_diffusion.outputs import make_folder, whole_file, writing
from dora_diffusion.paths import given_path

__all__ = ["CACHE_VARIABLE", "Entry", "Store", "cache_folder"]

CACHE_VARIABLE = "DORA_DIFFUSION_CACHE"
VERSION = 1  # of what an entry holds; another one is another entry


def cache_folder() -> Path:
    """Where encodings lie: what DORA_DIFFUSION_CACHE says, or the user's folder for what can be made again.

    Raises ConfigError.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        try:
            return Path(given_path(named)).absolute()
        except ConfigError as error:
            raise ConfigError(f"{CACHE_VARIABLE}: {error}") from error
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # and so, says its specification, to be ignored
        try:
            caches = Path.home() / ".cache"
        except RuntimeError as error:
            raise ConfigError(f"there is no home folder: name one for encodings in {CACHE_VARIABLE}.") from error
    return caches / "dora-diffusion"


@dataclass(frozen=True)
class Entry:
    """One picture's or caption's encoding: in its file, or in memory where there was no room for a file."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Tensor] | None = None

    def load(self) -> Mapping[str, Tensor]:
        """The tensors. Raises DataError for a file that is gone or damaged since it was found."""
        if self.held is not None:
            return self.held
        found = _read(self.path)
        if found is None:
            raise DataError(
                f"{self.path}, where an encoded picture or caption was kept, is gone or damaged: start the run again, "
                "and it is encoded anew."
            )
        return found


@dataclass
class Store:
    """The entries in one folder. `fresh` counts those that were not there before, `unwritten` is why some are not."""

    folder: Path = field(default_factory=cache_folder)
    fresh: int = 0
    unwritten: str = ""
    _prepared: set[Path] = field(default_factory=set)  # folders that were looked at and cleared of left-overs
    _fingerprints: WeakKeyDictionary[nn.Module, str] = field(default_factory=WeakKeyDictionary)

    def read(self, *made_of: str | bytes) -> Mapping[str, Tensor] | None:
        """What these ingredients gave, if it is there and sound."""
        path = self._path(made_of)
        tensors = _read(path)
        if tensors is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # its age is that of its last use
        return tensors

    def find(self, *made_of: str | bytes) -> Entry | None:
        """The entry of these ingredients, if it is there and sound."""
        tensors = self.read(*made_of)
        return None if tensors is None else Entry(self._path(made_of), _shapes(tensors))

    def keep(self, tensors: Mapping[str, Tensor], *made_of: str | bytes) -> Entry:
        """Write what these ingredients gave. Where that cannot be, it stays in memory, and `unwritten` says why."""
        path, self.fresh = self._path(made_of), self.fresh + 1
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        shapes = _shapes(kept)
        try:
            if path.parent not in self._prepared:
                self._prepared.add(make_folder(path.parent))
            with whole_file(path) as temporary:
                temporary.write_bytes(save(kept, {"crc32": str(_checksum(kept))}))
        except (OutputError, OSError) as error:
            self.unwritten = str(error)
            return Entry(path, shapes, kept)
        return Entry(path, shapes)

    def of_weights(self, module: nn.Module) -> str:
        """A hash of all that a module is. It is made once: a store is for modules that stay as they are."""
        if module not in self._fingerprints:
            self._fingerprints[module] = fingerprints.of_weights(module)
        return self._fingerprints[module]

    def of_texts(self, pipe: DiffusionPipeline) -> str:
        """The same of a pipeline's text encoders and tokenizers."""
        encoders = {
            name: self.of_weights(part)
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and name.startswith("text_encoder")
        }
        return fingerprints.of_texts(pipe, encoders)

    def contents(self) -> list[tuple[int, float]]:
        """Bytes and time of the last use of each entry."""
        return [(found.st_size, found.st_mtime) for _, found in self._files()]

    def clear(self, unused_since: float) -> tuple[int, int]:
        """Delete what was last used before this time (seconds since the epoch); how many bytes and entries went.

        Raises OutputError.
        """
        size = count = 0
        for path, found in self._files():
            if found.st_mtime <= unused_since:
                with writing(path):
                    path.unlink(missing_ok=True)
                size, count = size + found.st_size, count + 1
        return size, count

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in sorted(self.folder.glob("encoded/*/*.safetensors")):
            with contextlib.suppress(FileNotFoundError):  # another process clears too
                if stat.S_ISREG((found := path.lstat()).st_mode):
                    yield path, found

    def _path(self, made_of: tuple[str | bytes, ...]) -> Path:
        digest = hashlib.sha256(f"{VERSION}".encode())
        for part in made_of:
            part = part.encode() if isinstance(part, str) else part
            digest.update(len(part).to_bytes(8, "little") + part)
        name = digest.hexdigest()
        return self.folder / "encoded" / name[:2] / f"{name}.safetensors"


def _read(path: Path) -> Mapping[str, Tensor] | None:
    """A file's tensors; None where there is none, or none that is sound."""
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if f'"crc32":"{_checksum(tensors)}"'.encode() in content else None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(name.encode(), found))
    return found
