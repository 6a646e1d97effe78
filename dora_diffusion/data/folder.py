"""A folder of pictures to train on: find them, check them, caption them.

pictures.py says what a picture is read as, captions.py whose caption is whose; a picture that has none has the instance
prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.data.captions import Captions, named, read_captions
from dora_diffusion.data.pictures import SUFFIXES, is_picture, trouble_with
from dora_diffusion.errors import DataError
from dora_diffusion.paths import obstacle

__all__ = [
    "ImageFolder",
    "TrainingImage",
    "alike_in",
    "first_caption",
    "is_passed_over",
    "list_pictures",
    "read_folder",
    "remarks_on",
    "smallest_side",
    "without_masks",
]

MENTIONED = 8
MASKS = ("-masklabel", "-condlabel")  # OneTrainer's, beside the picture that they belong to
PRESENT_EVERYWHERE = {"thumbs.db", "desktop.ini", "__macosx"}  # systems leave them in every folder; no one misses them


@dataclass(frozen=True)
class TrainingImage:
    path: Path
    caption: str


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder, sorted by name, the files in it that were passed over, and what else is to be said."""

    path: Path
    images: tuple[TrainingImage, ...]
    ignored: tuple[str, ...]
    notes: tuple[str, ...] = ()


def smallest_side(size: int) -> int:
    """The shortest side in pixels of a picture that is still useful where pictures of this side are trained."""
    return max(16, size // 4)


def read_folder(path: str | os.PathLike[str], instance_prompt: str | None = None, *, smallest: int = 16) -> ImageFolder:
    """Read a folder of pictures and captions; all pictures are decoded once to find broken ones now.

    `smallest` is the shortest side in pixels that is still useful. Raises DataError, which lists every bad file.
    """
    folder = Path(path)
    pictures = list_pictures(folder)
    looked = {p: trouble_with(p, smallest) for p in pictures}
    _refuse(
        [f"{p.name}: {trouble}" for p, (trouble, _) in looked.items() if trouble],
        f"of {len(pictures)} pictures in {folder} cannot be used",
        "Replace them or move them out of the folder, then start again.",
    )
    captions = _captions(folder, pictures)
    _refuse(captions.problems, f"of the captions in {folder} cannot be used", "Mend them, then start again.")
    missing = [p.name for p, text in zip(pictures, captions.texts, strict=True) if text is None]
    if missing and not (instance_prompt or "").strip():
        raise DataError(
            f"{len(missing)} pictures in {folder} have no caption ({', '.join(missing[:3])}…): give an instance prompt "
            "(--instance-prompt 'a photo of sks dog'), or a text file beside each picture."
            + "".join(f"\nThere are {note}." for note in captions.notes)
        )
    images = tuple(
        TrainingImage(p, instance_prompt or "" if text is None else text)
        for p, text in zip(pictures, captions.texts, strict=True)
    )
    noted = {p.name: notes for p, (_, notes) in looked.items()}
    entries = _entries(folder)
    within = _full_subfolders(entries)
    unread = (f"pictures in subfolders are not read: {named([f'{p.name}/' for p in within])}",) if within else ()
    notes = (*remarks_on(noted), *captions.notes, *unread)
    known = {*pictures, *captions.known, *within}
    passed_over = [p for p in entries if p not in known]
    return ImageFolder(folder, images, tuple(p.name + "/" * p.is_dir() for p in passed_over), notes)


def alike_in(trained: Sequence[TrainingImage], measured: Sequence[TrainingImage]) -> tuple[str, ...]:
    """What is to be said of pictures that are the same file's bytes: among those trained on, and those measured on."""
    first: dict[str, str] = {}
    twice, seen = [], []
    for image in trained:
        digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
        twice += [f"{image.path.name} (as {first[digest]})"] if digest in first else []
        first.setdefault(digest, image.path.name)
    for image in measured:
        digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
        seen += [f"{image.path.name} (as {first[digest]})"] if digest in first else []
    remarks = {
        "the same pictures more than once, each of which is trained on": twice,
        "held-out pictures that are trained on too, so the held-out loss is not of unseen pictures": seen,
    }
    return tuple(f"{remark}: {named(names)}" for remark, names in remarks.items() if names)


def remarks_on(notes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What is to be said of pictures by their names, those together that it is the same of."""
    alike: dict[str, list[str]] = {}
    for name, each in notes.items():
        for note in each:
            alike.setdefault(note, []).append(name)
    return tuple(f"{named(names)}: {note}" for note, names in alike.items())


def first_caption(path: str | os.PathLike[str], instance_prompt: str | None = None) -> str:
    """What the folder's first picture is trained with; no picture is opened. Raises DataError."""
    pictures = list_pictures(path)
    text = _captions(Path(path), pictures).texts[0]
    return instance_prompt or "" if text is None else text


def list_pictures(path: str | os.PathLike[str]) -> list[Path]:
    """The picture files of a folder by name, not opened yet. Raises DataError when there are none."""
    try:
        return _listed(Path(path))
    except OSError as error:
        raise DataError(f"cannot read the folder {path}: {error.strerror}. Check its name and permissions.") from error


def _listed(folder: Path) -> list[Path]:
    if reason := obstacle(folder):
        raise DataError(f"no pictures at {folder}: it {reason}.")
    if not folder.exists():
        raise DataError(f"no folder at {folder}. Check the path given as images.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; images must be a folder of pictures.")
    entries = _entries(folder)
    files = [p for p in entries if p.is_file()]
    pictures = _pictures_of(files)
    if not pictures:
        found = f" It holds {len(files)} other files ({', '.join(p.name for p in files[:3])})." if files else ""
        if within := _full_subfolders(entries):
            raise DataError(
                f"{folder} has no pictures itself, but its subfolders have ({', '.join(p.name for p in within[:3])}): "
                f"give one of these, such as {within[0]}, or put the pictures into one folder."
            )
        raise DataError(f"{folder} has no pictures.{found} Put in some of: {', '.join(sorted(SUFFIXES))}.")
    return pictures


def is_passed_over(name: str) -> bool:
    """Whether this is one of the files that systems leave everywhere (.DS_Store, ._1.png, Thumbs.db), or hidden."""
    return name.startswith(".") or name.lower() in PRESENT_EVERYWHERE


def _entries(folder: Path) -> list[Path]:
    """What lies in the folder, by name. Raises DataError."""
    try:
        return sorted(p for p in folder.iterdir() if not is_passed_over(p.name))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}. Check its permissions.") from error


def _pictures_of(files: Iterable[Path]) -> list[Path]:
    return without_masks([p for p in files if is_picture(p.name)])


def without_masks(pictures: Sequence[Path]) -> list[Path]:
    """The pictures that are not another's mask by their names (cat-masklabel.png beside cat.jpg)."""
    stems = {p.stem for p in pictures}
    return [p for p in pictures if not any(p.stem.endswith(end) and p.stem[: -len(end)] in stems for end in MASKS)]


def _full_subfolders(entries: Sequence[Path]) -> list[Path]:
    """Those that have pictures in them."""
    return [p for p in entries if p.is_dir() and os.access(p, os.R_OK | os.X_OK) and _pictures_of(_entries(p))]


def _captions(folder: Path, pictures: Sequence[Path]) -> Captions:
    return read_captions(pictures, (p for p in _entries(folder) if p.is_file()))


def _refuse(problems: Sequence[str], what: str, way_out: str) -> None:
    """Raise DataError with the problems, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - MENTIONED} more" if len(problems) > MENTIONED else ""
        listed = "\n  ".join(problems[:MENTIONED])
        raise DataError(f"{len(problems)} {what}:\n  {listed}{more}\n{way_out}")
