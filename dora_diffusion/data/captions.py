"""Which caption belongs to which picture: the one reader of captions, for a folder and for files from a browser.

A caption stands, in this order, in cat.png.txt, cat.txt, cat.caption (sd-scripts' other suffix), or in its row of
metadata.jsonl or metadata.csv (of datasets' ImageFolder: "file_name", and "text", or "caption", or "prompt").
Names match whatever their Unicode form, and whatever their case where no name matches better. What cannot be told is a
problem, and no picture ever gets the caption of another.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dora_diffusion.errors import DataError

__all__ = ["CAPTION_SUFFIXES", "METADATA", "Captions", "is_caption_file", "named", "read_captions", "read_text"]

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "caption", "prompt")  # columns with the caption; the first that is there
# Where other programs keep captions that are not read here, such as sd-scripts in meta_cap.json.
UNREAD = {".json", ".jsonl", ".csv", ".tsv", ".parquet"}
PLACEHOLDERS = {"none", "null", "nan", "undefined"}  # what programs write where there is no caption
MENTIONED = 8


@dataclass(frozen=True)
class Captions:
    """A caption for each picture, or None; what is wrong, and what is good to know.

    `known` are the caption files: those that are used, and those that a problem or a note names.
    """

    texts: tuple[str | None, ...]
    known: frozenset[Path]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Offer:
    """A caption that a file has for a picture; the lowest rank is taken."""

    rank: int
    text: str
    source: str


@dataclass
class _Desk:
    """What has been found so far."""

    pictures: Sequence[Path]
    offers: list[list[_Offer]]
    problems: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)  # caption files that no picture has
    elsewhere: list[str] = field(default_factory=list)  # rows for pictures in subfolders
    empty: list[str] = field(default_factory=list)  # tables without a row
    unclear: set[int] = field(default_factory=set)

    def places(self, name: str, part: Callable[[Path], str]) -> list[int]:
        """The pictures of which this part is the name: as it is spelled, else whatever its case."""
        for key in (_composed, lambda text: _composed(text).casefold()):
            wanted = key(name)
            if found := [i for i, picture in enumerate(self.pictures) if key(part(picture)) == wanted]:
                return found
        return []

    def give(self, places: Sequence[int], offer: _Offer) -> None:
        if len(places) == 1:
            self.offers[places[0]].append(offer)
            return
        self.unclear.update(places)
        names = [self.pictures[i].name for i in places]
        alike = len(set(names)) == 1
        which = f"{len(names)} pictures are called {names[0]}" if alike else f"it fits {named(names)}"
        self.problems.append(f"{offer.source}: {which}, and whose caption it is cannot be told. Rename them.")


def is_caption_file(path: Path) -> bool:
    return path.suffix.lower() in CAPTION_SUFFIXES or path.name.lower() in METADATA


def read_captions(
    pictures: Sequence[Path], others: Iterable[Path], renamed: Callable[[str], str] | None = None
) -> Captions:
    """The captions that the other files have for these pictures.

    `renamed` says what became of a name on the way here, as of files that a browser sent: they lie in no folder any
    more, and have lost some characters. Two pictures may have one name then.
    """
    desk = _Desk(pictures, [[] for _ in pictures])
    given = sorted(others, key=lambda path: path.name)
    files = [path for path in given if is_caption_file(path)]
    unread = [path for path in given if path not in files and path.suffix.lower() in UNREAD]
    # cat.png.txt first: what it names exactly is no longer in question for cat.txt.
    sidecars = [path for path in files if path.name.lower() not in METADATA]
    exact = {path: places for path in sidecars if (places := desk.places(path.stem, lambda p: p.name))}
    settled = {place for places in exact.values() for place in places}
    for path in sidecars:
        places = exact.get(path) or desk.places(path.stem, lambda p: p.stem)
        open_places = [place for place in places if place not in settled]
        if path not in exact and len(places) > 1 and len(open_places) == 1:
            places = open_places
        rank = 0 if path in exact else 1 + CAPTION_SUFFIXES.index(path.suffix.lower())
        _take_sidecar(desk, path, places, rank)
    for path in files:
        if path.name.lower() in METADATA:
            _take_metadata(desk, path, renamed, rank=3 + METADATA.index(path.name.lower()))
    return _settled(desk, files, unread)


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark. Raises DataError, which names the file."""
    try:
        text = path.read_bytes().decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): "
            "save it again with UTF-8 encoding."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}.") from error
    if control := _control(text):  # UTF-16 without its mark, ISO-2022-JP and programs' own files are valid UTF-8 too
        raise DataError(
            f"{path.name} is no text in UTF-8 (it has the control character {control!r}): "
            "save it again with UTF-8 encoding."
        )
    return text


def _control(text: str) -> str | None:
    """The first control character that is none of white space."""
    return next((c for c in text if unicodedata.category(c) == "Cc" and not c.isspace()), None)


def _is_empty(text: str) -> bool:
    """Whether nothing of it can be seen: white space, and characters that only say how others are set."""
    return all(c.isspace() or unicodedata.category(c) == "Cf" for c in text)


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - MENTIONED} more" if len(names) > MENTIONED else ""
    return ", ".join(names[:MENTIONED]) + more


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS writes é as e and an accent


def _take_sidecar(desk: _Desk, path: Path, places: Sequence[int], rank: int) -> None:
    if not places:
        desk.homeless.append(path.name)
        return
    try:
        text = read_text(path).strip()
    except DataError as error:
        desk.problems.append(str(error))
        return
    if _is_empty(text):
        desk.problems.append(f"{path.name} is empty: write the caption into it, or delete it.")
        return
    desk.give(places, _Offer(rank, text, path.name))


def _take_metadata(desk: _Desk, path: Path, renamed: Callable[[str], str] | None, rank: int) -> None:
    try:
        text = read_text(path)
    except DataError as error:
        desk.problems.append(str(error))
        return
    rows = list(_json_rows(text) if path.suffix.lower() == ".jsonl" else _csv_rows(text))
    if not rows:
        desk.empty.append(path.name)
    for where, row in rows:
        source = f"{path.name}, {where}"
        wrong = row if isinstance(row, str) else _what_is_wrong(row)
        if wrong or isinstance(row, str):
            desk.problems.append(f"{source}: {wrong}.")
            continue
        name = str(row["file_name"]).replace("\\", "/")
        caption = str(row[_text_column(row) or ""]).strip()
        inside = str(PurePosixPath(name))
        if places := desk.places(renamed(inside) if renamed else inside, lambda p: p.name):
            desk.give(places, _Offer(rank, caption, source))
        elif not renamed and "/" in inside and _is_file(path.parent / inside):
            desk.elsewhere.append(inside)
        else:
            desk.problems.append(f"{source}: there is no picture {name!r}. Add it, or take the row out.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # as of a name that is too long
        return False


def _json_rows(text: str) -> Iterator[tuple[str, dict[str, object] | str]]:
    """The objects of a file of JSON lines, with where each stands; a text where it is none."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is a letter like others in JSON
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", f"{line[:60]!r} is no JSON ({error})"
            continue
        like = '{"file_name": "cat.png", "text": "a cat"}'
        yield f"line {number}", row if isinstance(row, dict) else f"{line[:60]!r} is not like {like}"


def _csv_rows(text: str) -> Iterator[tuple[str, dict[str, object] | str]]:
    """The rows of a table by its header, with where each stands; a text where it is none."""
    first = text.split("\n", 1)[0]
    comma = next((mark for mark in ",;\t" if "file_name" in [cell.strip(' "\r') for cell in first.split(mark)]), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, skipinitialspace=True, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                if twice := [name for name in ("file_name", *TEXTS) if header.count(name) > 1]:
                    yield f"line {reader.line_num}", f"it has more than one column {twice[0]}: leave one"
                    return
                continue
            if len(cells) != len(header):
                yield (
                    f"line {reader.line_num}",
                    f"{len(cells)} cells under {len(header)} columns: put a caption with {comma!r} in it into quotes",
                )
                continue
            yield f"line {reader.line_num}", dict(zip(header, cells))
    except csv.Error as error:
        yield f"line {reader.line_num}", f"is no row of a table ({error})"


def _text_column(row: dict[str, object]) -> str | None:
    return next((column for column in TEXTS if column in row), None)


def _what_is_wrong(row: dict[str, object]) -> str:
    """Why a row gives no caption, or ""."""
    name, column = row.get("file_name"), _text_column(row)
    if "file_name" in row and not isinstance(name, str):
        return f"its file_name is {json.dumps(name)}, which is no name"
    if not isinstance(name, str) or not name.strip():
        return f"it has no file_name (it has: {named(list(map(str, row))) or 'nothing'})"
    if column is None:
        return f"{name!r} has no text (the row has: {named(list(row))})"
    value = row[column]
    if isinstance(value, list):
        return f"the {column} of {name!r} is a list of {len(value)}; a picture has one caption: choose one"
    if not isinstance(value, str):
        return f"the {column} of {name!r} is {json.dumps(value)}; write the caption, or take the row out"
    if _is_empty(value):
        return f"the {column} of {name!r} is empty; write the caption, or take the row out"
    if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        return f"the {column} of {name!r} has half of a character in it (a lone surrogate); write it anew"
    if control := _control(value):
        return f"the {column} of {name!r} has the control character {control!r} in it; write it anew"
    return ""


def _settled(desk: _Desk, files: Sequence[Path], unread: Sequence[Path]) -> Captions:
    """The first of each picture's offers; what differs from it is said."""
    texts: list[str | None] = []
    differing = []
    for place, (picture, offers) in enumerate(zip(desk.pictures, desk.offers, strict=True)):
        offers = sorted(offers, key=lambda offer: offer.rank)
        best = [offer for offer in offers if offer.rank == offers[0].rank]
        if len({offer.text for offer in best}) > 1:
            where = named([offer.source for offer in best])
            desk.problems.append(f"{picture.name} has more than one caption ({where}): leave one.")
            desk.unclear.add(place)
        elif others := [offer.source for offer in offers if offer.text != offers[0].text]:
            differing.append(f"{picture.name} ({offers[0].source}, not {named(others)})")
        texts.append(offers[0].text if offers and place not in desk.unclear else None)
    taken = [(picture.name, text) for picture, text in zip(desk.pictures, texts, strict=True) if text is not None]
    remarks = {
        "captions that differ, of which the first is taken": differing,
        "captions of several lines, each taken whole": [name for name, text in taken if "\n" in text or "\r" in text],
        "captions that are no more than what programs write where there is none (None, nan)": [
            name for name, text in taken if text.casefold() in PLACEHOLDERS
        ],
        "captions not used, as no picture has their name": desk.homeless,
        "captions not used, of pictures in subfolders, which are not read": desk.elsewhere,
        "tables of captions without a row": desk.empty,
        f"files not read, though they may hold captions (only {', '.join(METADATA)} and text files are)": [
            path.name for path in unread
        ],
    }
    notes = tuple(f"{remark}: {named(names)}" for remark, names in remarks.items() if names)
    return Captions(tuple(texts), frozenset([*files, *unread]), tuple(desk.problems), notes)
