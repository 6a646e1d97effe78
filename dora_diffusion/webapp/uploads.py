"""Pictures from a browser: checked, and copied into a run's folder under names made here.

The names that people see are kept beside the files and only ever shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from gradio_client.utils import strip_invalid_filename_characters

from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.data.captions import CAPTION_SUFFIXES, METADATA, is_caption_file, named, read_captions
from dora_diffusion.data.folder import ImageFolder, is_passed_over, read_folder, remarks_on, without_masks
from dora_diffusion.data.pictures import SUFFIXES, is_picture, read_picture, trouble_with
from dora_diffusion.errors import DataError
from dora_diffusion.outputs import copy_file, make_folder, write_text

__all__ = [
    "ACCEPTED",
    "Sent",
    "Upload",
    "check_pictures",
    "chosen",
    "duplicates",
    "put_into",
    "read_uploads",
    "row_troubles",
    "sort_files",
    "thumbnail",
]

ACCEPTED = [*sorted(SUFFIXES), *CAPTION_SUFFIXES, *(Path(name).suffix for name in METADATA)]
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


@dataclass(frozen=True)
class Sent:
    """What a browser sent: pictures, what is wrong with captions, and what else is to be said of the files."""

    uploads: tuple[Upload, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sort_files(files: Sequence[Path]) -> Sent:
    """Pictures, their captions, and what is to be said of the rest. Raises DataError where there is no picture."""
    wanted = [file for file in files if not is_passed_over(file.name)]
    pictures = without_masks([file for file in wanted if is_picture(file.name)])
    strange = [file.name for file in wanted if file not in pictures and not is_caption_file(file)]
    if files and not pictures:
        first = (strange or [file.name for file in files])[0]
        raise DataError(f"{first} is no picture. Add files of these kinds: {', '.join(ACCEPTED)}.")
    _limit(pictures, [file for file in wanted if file.name not in strange])
    captions = read_captions(pictures, wanted, _as_sent)
    uploads: list[Upload] = []
    for picture, text in zip(pictures, captions.texts, strict=True):
        same = sum(upload.path.name == picture.name for upload in uploads)
        label = f"{picture.name} ({same + 1})" if same else picture.name
        uploads.append(Upload(picture, label, text or ""))
    strange = [name for name in strange if name not in {file.name for file in captions.known}]
    passed_over = (f"passed over: {named(strange)}",) if strange else ()
    return Sent(tuple(uploads), captions.problems, (*captions.notes, *passed_over))


def read_uploads(files: Sequence[Path]) -> tuple[Upload, ...]:
    """The pictures among the files, with their captions. Raises DataError, also for captions that cannot be used."""
    sent = sort_files(files)
    if sent.problems:
        raise DataError("\n".join(sent.problems))
    return sent.uploads


def _limit(pictures: Sequence[Path], files: Sequence[Path]) -> None:
    """Raise DataError where that is more than this page takes."""
    if len(pictures) > MOST_PICTURES:
        raise DataError(f"{len(pictures)} pictures are more than the {MOST_PICTURES} this page takes. Choose the best.")
    sizes = [(file.name, file.stat().st_size) for file in files]
    for name, size in sizes:
        if size > MOST_BYTES:
            raise DataError(f"{name} has {size / 1024**2:.0f} MB; a picture may have 20 MB. Make it smaller.")
    if sum(size for _, size in sizes) > MOST_BYTES_TOGETHER:
        raise DataError("the files together are larger than 1 GB. Make the pictures smaller, or choose fewer.")


def _as_sent(name: str) -> str:
    """What becomes of a file's name when a browser sends it: Gradio drops its folder, and characters that harm."""
    return strip_invalid_filename_characters(PurePosixPath(name).name)


def check_pictures(uploads: Sequence[Upload], smallest: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Decode all pictures once: what is wrong with each that cannot be used, by label; and notes on the others.

    `smallest` is the shortest side in pixels that is useful.
    """
    looked = {upload.label: trouble_with(upload.path, smallest) for upload in uploads}
    bad = {label: trouble for label, (trouble, _) in looked.items() if trouble}
    return bad, remarks_on({label: notes for label, (_, notes) in looked.items()})


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


def put_into(folder: Path, uploads: Sequence[Upload], instance_prompt: str, smallest: int = 16) -> ImageFolder:
    """Copy the pictures, write their captions beside them, and read the folder as the training will.

    Raises DataError, with the names people know, when a picture or a caption is missing or broken.
    """
    make_folder(folder)
    labels: dict[str, str] = {}
    for number, upload in enumerate(uploads, 1):
        copy = folder / f"picture-{number:03d}{upload.path.suffix.lower()}"
        labels[copy.name] = upload.label
        copy_file(upload.path, copy)
        if any(0xD800 <= ord(letter) < 0xE000 for letter in upload.caption):
            raise DataError(
                f"the caption of {upload.label} has half of a character in it (a lone surrogate): retype it."
            )
        if upload.caption.strip():
            write_text(copy.with_suffix(".txt"), upload.caption.strip() + "\n")
    try:
        return read_folder(folder, instance_prompt, smallest=smallest)
    except DataError as error:
        raise DataError(_as_people_know_it(str(error), folder, labels)) from error


def chosen(uploads: Sequence[Upload], rows: Sequence[tuple[str, str]]) -> tuple[Upload, ...]:
    """The pictures that stand in the table's rows of label and caption, with the captions that they have there.

    They keep their own order, so that a table sorted another way trains the same. Raises DataError for rows that name
    no picture, or one twice.
    """
    if troubles := row_troubles(rows, [upload.label for upload in uploads]):
        raise DataError("\n".join(troubles))
    captions = dict(rows)
    return tuple(replace(each, caption=captions[each.label]) for each in uploads if each.label in captions)


def row_troubles(rows: Sequence[tuple[str, str]], labels: Sequence[str]) -> list[str]:
    """What is wrong with rows of label and caption, where these are the pictures there are."""
    names = [label for label, _ in rows]
    troubles = [
        f"the table has {label} more than once: delete one of its rows"
        for label in dict.fromkeys(names)
        if label and names.count(label) > 1
    ]
    for label, caption in rows:
        if not label:
            troubles.append(f"a row of the table has a caption and no picture ({caption[:40]!r}): delete the row")
        elif label not in labels:
            troubles.append(
                f"the table names {label!r}, which is none of the pictures: delete the row, or add them anew"
            )
    return troubles


def thumbnail(path: Path) -> str:
    """A small copy as a data URL; empty for what cannot be read."""
    try:
        small = read_picture(path, about=THUMBNAIL * 2).image
    except DataError:
        return ""
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _as_people_know_it(message: str, folder: Path, labels: Mapping[str, str]) -> str:
    for name, label in labels.items():
        message = message.replace(name, label)
    message = message.replace(f" in {folder}", "").replace(f"{folder}/", "")
    return message.replace("move them out of the folder, then start again", "remove them from the list")
