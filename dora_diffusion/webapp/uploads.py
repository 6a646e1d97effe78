"""Pictures from a browser: checked, and copied into a run's folder under names made here.

The names that people see are kept beside the files and only ever shown.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.data.folder import SUFFIXES, ImageFolder, read_folder
from dora_diffusion.errors import DataError
from dora_diffusion.outputs import copy_file, make_folder, write_text

__all__ = [
    "ACCEPTED",
    "Upload",
    "check_pictures",
    "duplicates",
    "put_into",
    "read_uploads",
    "thumbnail",
    "with_captions",
]

ACCEPTED = [*sorted(SUFFIXES), ".txt"]
MOST_PICTURES = 200
MOST_BYTES = 20 * 1024**2  # a picture
MOST_BYTES_TOGETHER = 1024**3
THUMBNAIL = 64


@dataclass(frozen=True)
class Upload:
    """One picture: the file that was sent, the name people know it by, and its caption."""

    path: Path
    label: str
    caption: str = ""


def read_uploads(files: Sequence[Path]) -> tuple[Upload, ...]:
    """The pictures among the files, with captions from text files of the same name. Raises DataError."""
    strange = [file.name for file in files if file.suffix.lower() not in ACCEPTED]
    if strange and len(strange) == len(files):
        raise DataError(f"{strange[0]} is no picture and no caption. Add files of these kinds: {', '.join(ACCEPTED)}.")
    files = [file for file in files if file.name not in strange]  # what a folder held beside its pictures
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if len(pictures) > MOST_PICTURES:
        raise DataError(f"{len(pictures)} pictures are more than the {MOST_PICTURES} this page takes. Choose the best.")
    sizes = {file.name: file.stat().st_size for file in files}
    for name, size in sizes.items():
        if size > MOST_BYTES:
            raise DataError(f"{name} has {size / 1024**2:.0f} MB; a picture may have 20 MB. Make it smaller.")
    if sum(sizes.values()) > MOST_BYTES_TOGETHER:
        raise DataError("the files together are larger than 1 GB. Make the pictures smaller, or choose fewer.")
    captions = {file.stem: _text(file) for file in files if file.suffix.lower() == ".txt"}
    uploads: list[Upload] = []
    for picture in pictures:
        same = sum(upload.path.name == picture.name for upload in uploads)
        label = f"{picture.name} ({same + 1})" if same else picture.name
        uploads.append(Upload(picture, label, captions.get(picture.stem, "")))
    return tuple(uploads)


def check_pictures(uploads: Sequence[Upload]) -> None:
    """Decode all pictures once. Raises DataError, which lists the bad ones by the names people know."""
    with tempfile.TemporaryDirectory(dir=uploads[0].path.parent) as folder:
        put_into(Path(folder), uploads, instance_prompt="anything: captions are checked later")


def duplicates(uploads: Sequence[Upload]) -> tuple[tuple[str, str], ...]:
    """Pictures that are the same bytes as one before them, each with the name of that one."""
    first: dict[str, str] = {}
    pairs = []
    for upload in uploads:
        digest = file_digest(upload.path)
        if digest in first:
            pairs.append((first[digest], upload.label))
        first.setdefault(digest, upload.label)
    return tuple(pairs)


def put_into(folder: Path, uploads: Sequence[Upload], instance_prompt: str) -> ImageFolder:
    """Copy the pictures, write their captions beside them, and read the folder as the training will.

    Raises DataError, with the names people know, when a picture or a caption is missing or broken.
    """
    make_folder(folder)
    labels: dict[str, str] = {}
    for number, upload in enumerate(uploads, 1):
        copy = folder / f"picture-{number:03d}{upload.path.suffix.lower()}"
        labels[copy.name] = upload.label
        copy_file(upload.path, copy)
        if upload.caption.strip():
            write_text(copy.with_suffix(".txt"), upload.caption.strip() + "\n")
    try:
        return read_folder(folder, instance_prompt)
    except DataError as error:
        raise DataError(_as_people_know_it(str(error), folder, labels)) from error


def with_captions(uploads: Sequence[Upload], captions: Mapping[str, str]) -> tuple[Upload, ...]:
    """The captions of the table, by label."""
    return tuple(replace(upload, caption=captions.get(upload.label, upload.caption)) for upload in uploads)


def thumbnail(path: Path) -> str:
    """A small copy as a data URL; empty for what cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (THUMBNAIL * 2, THUMBNAIL * 2))
            small = ImageOps.exif_transpose(image)
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.convert("RGBA").save(buffer, format="PNG")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not UTF-8 text: save it again with UTF-8 encoding.") from error


def _as_people_know_it(message: str, folder: Path, labels: Mapping[str, str]) -> str:
    for name, label in labels.items():
        message = message.replace(name, label)
    message = message.replace(f" in {folder}", "").replace(f"{folder}/", "")
    return message.replace("move them out of the folder, then start again", "remove them from the list")
