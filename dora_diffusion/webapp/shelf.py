"""The adapter files that a visitor is offered: the packaged pair, those everybody shares, and their own.

Pages name an adapter by its key. A key is only ever looked up among the files that are there, so that nothing a browser
sends becomes a path.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.outputs import copy_file, make_folder, write_text
from dora_diffusion.webapp.example import EXAMPLE
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.runs import STEPS, Runs, parametrisation_of, started_by

__all__ = ["SAMPLES", "Shelf", "Shelved"]

SKIPPED = {"checkpoints", "web"}  # half-trained adapters; what visitors own
MOST_OFFERED = 300
MOST_UPLOADS = 50
SAMPLES = ("sample/lora", "sample/dora")
SAMPLE_LABELS = {"sample/lora": "Sample LoRA (openmoji style)", "sample/dora": "Sample DoRA (openmoji style)"}


@dataclass(frozen=True)
class Shelved:
    """One adapter file, the key that pages use for it and the name that people see."""

    key: str
    label: str
    path: Path
    is_strangers: bool = False  # another visitor shares it: offered, but nobody else's page chooses it by itself


class Shelf:
    """`outputs` is what the command line writes to, for everybody here; under its `web` each visitor has a folder."""

    def __init__(self, outputs: Path, visitors: Path, with_samples: bool = True) -> None:
        self.outputs = outputs
        self.visitors = visitors
        self.runs = Runs(visitors)
        self.shared = self.runs.shared
        self.with_samples = with_samples

    def all(self, visitor: str) -> list[Shelved]:
        """Newest first, the packaged pair last."""
        dated = sorted(_dated(self._files(visitor)), reverse=True)
        samples = [Shelved(key, SAMPLE_LABELS[key], self._sample(key)) for key in SAMPLES if self.with_samples]
        return [self._shelved(path, visitor) for _, path in dated[:MOST_OFFERED]] + samples

    def find(self, key: str, visitor: str) -> Shelved:
        """Raises AdapterFileError when there is no such adapter for this visitor, or no more."""
        for shelved in self.all(visitor):
            if shelved.key == key:
                return shelved
        raise AdapterFileError("the adapter that was chosen is no longer there. Choose another one from the list.")

    def find_digest(self, sha256: str, visitor: str) -> Shelved | None:
        return next((each for each in self.all(visitor) if file_digest(each.path) == sha256), None)

    def key_of(self, path: Path, visitor: str) -> str:
        return self._shelved(path.resolve(), visitor).key

    def pair(self, visitor: str) -> tuple[str | None, str | None]:
        """The keys to begin with: the newest twins, else the packaged pair, else the newest two of any kind.

        What other visitors share is never among them.
        """
        shelved = [each for each in self.all(visitor) if not each.is_strangers]
        for each in shelved:
            lora, dora = each.path.with_name("lora.safetensors"), each.path.with_name("dora.safetensors")
            if each.key not in SAMPLES and lora.exists() and dora.exists():
                return self.key_of(lora, visitor), self.key_of(dora, visitor)
        if self.with_samples:
            return SAMPLES
        keys: list[str | None] = [each.key for each in shelved[:2]]
        first, second = (*keys, None, None)[:2]
        return first, second

    def take_in(self, upload: Path, visitor: str) -> Shelved:
        """Keep an uploaded file under a name made from its content; one that is read in part is an adapter too.

        Raises AdapterFileError when it is none.
        """
        ready()
        from dora_diffusion.formats.files import read_what_fits

        if upload.suffix.lower() != ".safetensors":
            raise AdapterFileError(f"{upload.name} is no .safetensors file; other kinds can run code when opened.")
        try:
            read_what_fits(upload)
        except AdapterFileError as error:
            raise AdapterFileError(str(error).replace(str(upload), upload.name)) from error
        folder = make_folder(self._uploads(visitor))
        path = folder / f"{file_digest(upload)[:16]}.safetensors"
        if not path.exists() and len(list(folder.glob("*.safetensors"))) >= MOST_UPLOADS:
            raise AdapterFileError(f"you have uploaded {MOST_UPLOADS} adapters, which is as many as are kept.")
        copy_file(upload, path)
        write_text(path.with_suffix(".txt"), upload.stem)
        return self._shelved(path, visitor)

    def _files(self, visitor: str) -> Iterator[Path]:
        # os.walk, and no glob, which ends in an error where a folder goes while it looks: that of a run being replaced,
        # or of a file being written.
        for folder, inside, names in os.walk(self.outputs):
            inside[:] = [name for name in inside if name not in SKIPPED and not name.startswith(".")]
            for path in (Path(folder) / name for name in names if name.endswith(".safetensors")):
                if path.is_file() and not path.name.startswith("."):
                    yield path
        yield from self._uploads(visitor).glob("*.safetensors")
        for runs in self.runs.folders(visitor):
            yield from (*runs.glob("*.safetensors"), *runs.glob("steps/*.safetensors"))

    def _uploads(self, visitor: str) -> Path:
        return self.visitors / visitor / "adapters"

    @staticmethod
    def _sample(key: str) -> Path:
        return EXAMPLE / f"{key.removeprefix('sample/')}.safetensors"

    def _shelved(self, path: Path, visitor: str) -> Shelved:
        """Keys name no visitor: `mine/` and `shared/` are all that others see of a folder."""
        if path.is_relative_to(self.shared):
            return self._shelved_of_strangers(path)
        if not path.is_relative_to(self.visitors):
            key = path.relative_to(self.outputs).with_suffix("").as_posix()
            return Shelved(key, key, path)
        if path.parent == self._uploads(visitor):
            name = path.with_suffix(".txt")
            label = name.read_text(encoding="utf-8") if name.is_file() else path.stem
            return Shelved(f"uploaded/{path.stem}", f"{label} (uploaded)", path)
        run, kind, trained = _trained(path)
        return Shelved(f"mine/{run.name}/{path.stem}", f"{kind} {trained}", path)

    @staticmethod
    def _shelved_of_strangers(path: Path) -> Shelved:
        run, kind, trained = _trained(path)
        code = run.name.rpartition("-")[2]
        return Shelved(f"shared/{code}/{path.stem}", f"{kind} shared, {trained}", path, is_strangers=True)


def _trained(path: Path) -> tuple[Path, str, str]:
    """The run's folder, which kind it is, and when it was trained how far."""
    run = path.parent.parent if path.parent.name == STEPS else path.parent
    kind, _, step = path.stem.partition("-")
    kind = adapter_label(kind, parametrisation_of(run))
    return run, kind, f"trained {started_by(run.name)}" + (f", after {int(step)} steps" if step.isdigit() else "")


def _dated(paths: Iterable[Path]) -> Iterator[tuple[float, Path]]:
    """Each with the time of its last change, without those that have gone meanwhile."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            yield path.stat().st_mtime, path
