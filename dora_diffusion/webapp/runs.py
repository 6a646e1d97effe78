"""Training runs on disk: what each was asked for, how it ended, and whose it is."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.errors import ConfigError, OutputError, TrainingError
from dora_diffusion.journal import read_log
from dora_diffusion.outputs import make_folder, whole_file, write_text
from dora_diffusion.training.toml import read_toml
from dora_diffusion.webapp.heavy import ready

if TYPE_CHECKING:
    from dora_diffusion.training.config import TrainConfig

__all__ = ["OVER", "SHARED", "START", "STEPS", "Run", "Runs", "parametrisation_of", "started_by"]

STATUS = "status.json"
FORM = "parametrisation.txt"  # beside published adapters, which have no configuration with them
SHARED = "shared.txt"  # holds a code that stands for the run where its owner must not be named
OVER = ("finished", "stopped", "failed", "interrupted")
STEPS = "steps"  # a folder of the run with its adapters as they were on the way
START = "start"  # a folder of the run with copies of the adapters that it goes on from
LEFT_OUT = {"images", "out"}  # where things lie says nothing of a run
STAMP = "%Y-%m-%d-%H%M%S"
STAMP_LETTERS = 17


@dataclass(frozen=True)
class Run:
    """One run as its folder has it. `phase` is how it ended; "interrupted" if the server ended before it did."""

    folder: Path
    phase: str
    text: str
    error: str = ""
    config: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def parametrisation(self) -> str:
        return str(self.config.get("parametrisation", "lora"))

    @property
    def adapters(self) -> tuple[Path, ...]:
        return tuple(path for kind in ("lora", "dora") if (path := self.folder / f"{kind}.safetensors").exists())

    @property
    def is_shared(self) -> bool:
        return (self.folder / SHARED).exists()

    @property
    def can_resume(self) -> bool:
        return self.phase in ("stopped", "interrupted", "failed") and (self.folder / "images").is_dir()

    @property
    def has_progress(self) -> bool:
        """Whether there is something to go on from: a checkpoint or the first of two adapters."""
        return bool(self.adapters) or any((self.folder / "checkpoints").glob("*.safetensors"))

    def train_config(self) -> TrainConfig:
        """What it was asked for, with the folder where it lies now. Raises ConfigError."""
        ready()
        from dora_diffusion.training.config import TrainConfig

        places = {"images": str(self.folder / "images"), "out": str(self.folder)}
        if start := self.config.get("start_from"):  # the folder with both twins, or one file in it
            name = Path(str(start)).name
            places["start_from"] = str(self.folder / START / ("" if name == START else name))
        return TrainConfig.from_values({**self.config, **places}, self.name)

    def differences(self, other: Run) -> dict[str, tuple[object, object]]:
        """What was asked for differently: each key with this run's value and the other's."""
        ours, theirs = ({k: _said(k, v) for k, v in run.config.items() if k not in LEFT_OUT} for run in (self, other))
        pairs = {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs}}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


class Runs:
    """All runs of one server, a folder for each visitor under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shared = root.parent / "shared"

    def new(self, visitor: str) -> Path:
        """An empty folder for a run that begins now. Raises OutputError."""
        home = self._home(visitor)
        stem = f"{datetime.now():{STAMP}}"
        for number in range(1, 1000):
            folder = home / (f"{stem}-{number}" if number > 1 else stem)
            if not folder.exists():
                return make_folder(folder)
        raise TrainingError("too many runs were started in this second. Try again.")

    def all(self, visitor: str) -> list[Run]:
        """The visitor's own, newest first."""
        home = self._home(visitor)
        folders = sorted(home.iterdir(), reverse=True) if home.is_dir() else []
        return [run for folder in folders if (run := read_run(folder)) is not None]

    def find(self, name: str, visitor: str) -> Run:
        """Raises TrainingError when this visitor has no such run."""
        for run in self.all(visitor):
            if run.name == name:
                return run
        raise TrainingError("this run is no longer there. Choose another one.")

    def folders(self, visitor: str) -> Iterator[Path]:
        """Of the visitor's own runs, and of what others share: their adapters in a place that names no owner."""
        for home in self.root.iterdir() if self.root.is_dir() else ():
            runs = home / "runs"
            for folder in runs.iterdir() if runs.is_dir() else ():
                if home.name == visitor:
                    yield folder
                elif (folder / SHARED).exists():
                    yield self._publish(folder)

    def delete(self, name: str, visitor: str) -> None:
        self.share(name, visitor, False)
        shutil.rmtree(self.find(name, visitor).folder)

    def share(self, name: str, visitor: str, shared: bool) -> None:
        """Let everybody on this server compare with the run's adapters, or no longer."""
        folder = self.find(name, visitor).folder
        mark = folder / SHARED
        if shared and not mark.exists():
            write_text(mark, secrets.token_hex(6))
        elif not shared and mark.exists():
            published = self._published(folder)
            mark.unlink()
            shutil.rmtree(published, ignore_errors=True)

    def _published(self, folder: Path) -> Path:
        code = (folder / SHARED).read_text(encoding="utf-8")
        return self.shared / f"{folder.name[:STAMP_LETTERS]}-{code}"

    def _publish(self, folder: Path) -> Path:
        """What a shared run has of adapters by now, where everybody may know the path. Raises OutputError."""
        published = self._published(folder)
        form = parametrisation_of(folder)
        if form != parametrisation_of(published):
            write_text(make_folder(published) / FORM, form)
        for path in (*folder.glob("*.safetensors"), *folder.glob(f"{STEPS}/*.safetensors")):
            place = published / path.relative_to(folder)
            if not place.exists() or _version(place) != _version(path):
                make_folder(place.parent)
                with whole_file(place) as unfinished:
                    shutil.copy2(path, unfinished)
        return published

    def _home(self, visitor: str) -> Path:
        return self.root / visitor / "runs"


def write_status(folder: Path, phase: str, text: str, error: str, config: TrainConfig) -> None:
    """Raises OutputError."""
    status = {"phase": phase, "text": text, "error": error, "config": config.model_dump(exclude_none=True)}
    write_text(folder / STATUS, json.dumps(status, indent=1))


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None where there is none.

    A run that says it goes on is one whose server has ended; how far it was its log says. Where status.json is not
    sound the run is known by its config.toml.
    """
    try:
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
        phase, text, error, config = (status[key] for key in ("phase", "text", "error", "config"))
        if not (all(isinstance(each, str) for each in (phase, text, error)) and isinstance(config, dict)):
            raise ValueError("not as it was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _run_without_status(folder)
    if phase in OVER:
        return Run(folder, phase, text, error, config)
    return Run(folder, "interrupted", f"interrupted when the server ended, {_reached(folder, config)}", error, config)


def _run_without_status(folder: Path) -> Run | None:
    try:
        config = read_toml(folder / "config.toml")
    except ConfigError:
        return None
    kinds = ("lora", "dora") if config.get("kind") == "both" else (config.get("kind", "dora"),)
    if all((folder / f"{kind}.safetensors").exists() for kind in kinds):
        return Run(folder, "finished", "finished; its status.json cannot be read", "", config)
    text = f"interrupted, {_reached(folder, config)}; its status.json cannot be read"
    return Run(folder, "interrupted", text, "", config)


def _reached(folder: Path, config: dict[str, object]) -> str:
    """How far a run came, by its log."""
    try:
        entries = read_log(folder / "log.jsonl").entries
    except OutputError:
        entries = ()
    if not entries or entries[-1].step == 0:
        return "before the first step" + (f" of the {_label(entries[-1].kind, config)}" if entries else "")
    last = entries[-1]
    return f"at step {last.step} of {config.get('steps', '?')} ({_label(last.kind, config)})"


def parametrisation_of(folder: Path) -> str:
    """Of the run in this folder, or of what another one has published here."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / FORM).read_text(encoding="utf-8").strip()
    try:
        return str(read_toml(folder / "config.toml").get("parametrisation", "lora"))
    except ConfigError:
        return "lora"


def _label(kind: str, config: dict[str, object]) -> str:
    return adapter_label(kind, str(config.get("parametrisation", "lora")))


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _said(key: str, value: object) -> object:
    """A value as people may see it: where a copy lies says nothing."""
    return "an earlier adapter" if key == "start_from" else value


def started_by(name: str) -> str:
    """A run's name as people read a date."""
    try:
        return f"{datetime.strptime(name[:STAMP_LETTERS], STAMP):%d %b, %H:%M:%S}"
    except ValueError:
        return name
