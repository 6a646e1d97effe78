"""The adapter files that the pages offer: those under the outputs folder, and those that were uploaded.

Pages name an adapter by its key. A key is only ever looked up among the files that are there, so that nothing a browser
sends becomes a path.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.files import AdapterFile, read_adapter_file
from dora_diffusion.outputs import make_folder, write_text

__all__ = ["Shelf", "Shelved"]

SKIPPED = {"checkpoints", "cache"}  # half-trained adapters, and what browsers have sent but not handed in
MOST_OFFERED = 500


@dataclass(frozen=True)
class Shelved:
    """One adapter file, the key that pages use for it and the name that people see."""

    key: str
    label: str
    path: Path


class Shelf:
    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.uploaded = make_folder(outputs / "web" / "adapters")

    def all(self) -> list[Shelved]:
        """Newest first."""
        dated = sorted(((path.stat().st_mtime, path) for path in self._files()), reverse=True)
        return [self._shelved(path) for _, path in dated[:MOST_OFFERED]]

    def find(self, key: str) -> Shelved:
        """Raises AdapterFileError when there is no such adapter any more."""
        for shelved in self.all():
            if shelved.key == key:
                return shelved
        raise AdapterFileError("the adapter that was chosen is no longer there. Choose another one from the list.")

    def key_of(self, path: Path) -> str:
        return path.relative_to(self.outputs).with_suffix("").as_posix()

    def pair(self) -> tuple[str | None, str | None]:
        """The keys to begin with: the newest LoRA and DoRA trained together, else the newest two of any kind."""
        shelved = self.all()
        for each in shelved:
            lora, dora = each.path.with_name("lora.safetensors"), each.path.with_name("dora.safetensors")
            if lora.exists() and dora.exists():
                return self.key_of(lora), self.key_of(dora)
        keys: list[str | None] = [each.key for each in shelved[:2]]
        first, second = (*keys, None, None)[:2]
        return first, second

    def take_in(self, upload: Path) -> Shelved:
        """Keep an uploaded file under a name made from its content. Raises AdapterFileError when it is no adapter."""
        try:
            read_adapter_file(upload)
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(upload), upload.name)) from error
        path = self.uploaded / f"{_digest(upload)}.safetensors"
        shutil.copyfile(upload, path)
        write_text(path.with_suffix(".txt"), upload.stem)
        return self._shelved(path)

    def card(self, key: str) -> str:
        """One line on the adapter, read from its file: kind, rank, alpha, size. Raises AdapterFileError."""
        file = read_adapter_file(self.find(key).path)
        return " · ".join(_facts(file))

    def _files(self) -> Iterator[Path]:
        for path in self.outputs.rglob("*.safetensors"):
            inside = path.relative_to(self.outputs).parts
            if path.is_file() and not any(part in SKIPPED or part.startswith(".") for part in inside):
                yield path

    def _shelved(self, path: Path) -> Shelved:
        key = self.key_of(path)
        given_name = path.with_suffix(".txt")
        if path.parent == self.uploaded and given_name.is_file():
            return Shelved(key, f"{given_name.read_text(encoding='utf-8')} (uploaded)", path)
        return Shelved(key, key.removeprefix("web/"), path)


def _facts(file: AdapterFile) -> Iterator[str]:
    yield file.config.kind_label
    yield f"rank {file.config.rank}"
    yield f"alpha {file.config.alpha:g}"
    yield f"{len(file.layers)} layers"
    training = file.description.training if file.description else {}
    if steps := training.get("steps"):
        yield f"{steps} steps"
    yield f"{file.path.stat().st_size / 1024:,.0f} KiB"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
