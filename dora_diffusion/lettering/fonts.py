"""Letters in pictures: for each piece of a text a font that has its characters, and words for what no font has.

Pillow's own font has little more than ASCII, and draws one and the same box for everything else.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

__all__ = ["Lettering", "clusters", "note_on_missing", "readable"]

# Sans-serif faces of many characters, of Linux, macOS and Windows; then every other font of the machine.
PREFERRED = (  # noqa: SIM905 - a list of them is forty lines
    "dejavusans sourcesanspro-regular notosans-regular liberationsans-regular arial segoeui helvetica arialunicode "
    "notosanscjk-regular sourcehansans-regular wqy-microhei wqy-zenhei pingfang hiraginosansgb msyh yugothr meiryo "
    "malgun applesdgothicneo nirmala leelawui symbola notosanssymbols2-regular seguisym applesymbols "
    "notoemoji-regular notocoloremoji seguiemj applecoloremoji"
).split()
SUFFIXES = (".ttf", ".otf", ".ttc", ".woff2")
OTHER_STYLES = ("bold", "italic", "oblique", "light", "black", "thin", "condensed", "narrow", "mono", "serif", "code")
UNFIT = ("lastresort", "adobeblank", "notdef")  # they have a box for everything
STRIKES = (109, 128, 136, 160, 96, 64, 32)  # sizes of fonts that are made of pictures: colour emoji
MISSING = "\U0010fffe"  # no character, and so in no font
JOINERS = ("\u200d", "\ufe0f", "\ufe0e")


@dataclass(frozen=True)
class _Face:
    """A font file at one size; `scale` makes what it draws that size where it cannot draw it itself."""

    font: ImageFont.FreeTypeFont
    plain: ImageFont.FreeTypeFont  # the same, a glyph for each character: to see which there are
    scale: float = 1.0

    def has(self, text: str) -> bool:
        return all(_has(self.plain, character) for character in text)

    def length(self, text: str) -> float:
        return self.font.getlength(text) * self.scale

    def write(self, pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str | int) -> None:
        """`at` is the left end of the line the letters stand on."""
        if self.scale == 1.0:
            pen.text(at, text, fill, font=self.font, anchor="ls")
            return
        left, top, right, bottom = self.font.getbbox(text, anchor="ls")
        size = (max(1, round(right - left)), max(1, round(bottom - top)))
        picture = Image.new("RGBA", size)
        ImageDraw.Draw(picture).text((-left, -top), text, fill, font=self.font, anchor="ls", embedded_color=True)
        small = picture.resize([max(1, round(side * self.scale)) for side in size], Image.Resampling.LANCZOS)
        corner = (round(at[0] + left * self.scale), round(at[1] + top * self.scale))
        whole: Image.Image = pen._image
        whole.paste(small.convert(whole.mode), corner, small.getchannel("A"))


@lru_cache(maxsize=65536)
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws the character, and not the box of those it lacks."""
    if character.isspace() or character in JOINERS or unicodedata.category(character) == "Cf":
        return True
    return _drawn(font, character) != _drawn(font, MISSING)


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[object, ...]:
    mask = font.getmask(character)
    return mask.size, bytes(mask), font.getlength(character)


class Lettering:
    """Text of one size in pixels. Deterministic for one machine: the fonts are tried in one order."""

    def __init__(self, size: int, fonts: Sequence[Path] | None = None) -> None:
        self.size = size
        self.fonts = tuple(fonts) if fonts is not None else font_files()

    def length(self, text: str) -> float:
        return sum(face.length(piece) for face, piece in self._pieces(self.readable(text)))

    def write(
        self, pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str | int, anchor: str = "la"
    ) -> None:
        """Draw one line. The anchor is Pillow's: l, m or r, then a (top of the line) or m (its middle)."""
        x, y = at
        text = self.readable(text)
        x -= {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]] * self.length(text)
        above, below = _own(self.size).font.getmetrics()
        y += {"a": float(above), "m": (above - below) / 2}[anchor[1]]
        for face, piece in self._pieces(text):
            face.write(pen, (x, y), piece, fill)
            x += face.length(piece)

    def readable(self, text: str) -> str:
        """The text as it is drawn: composed, in one line, and numbers in place of what no font has."""
        return "".join(
            cluster if self._face_of(cluster) else "".join(f"[U+{ord(character):04X}]" for character in cluster)
            for cluster in clusters(_plain(text))
        )

    def missing(self, text: str) -> tuple[str, ...]:
        """The characters that no font has, each once."""
        lacking = (cluster for cluster in clusters(_plain(text)) if not self._face_of(cluster))
        return tuple(dict.fromkeys(character for cluster in lacking for character in cluster))

    def _pieces(self, text: str) -> Iterator[tuple[_Face, str]]:
        """Each with its face. One face for the whole text where one has it, else for a word, else for a character."""
        if not text:
            return
        if (face := self._face_of(text)) is not None:
            yield face, text
            return
        faces = [(self._face_of(word), word) for word in _words(text)]
        split = [
            (face or self._face_of(part) or _own(self.size), part)
            for face, word in faces
            for part in ([word] if face else clusters(word))
        ]
        for face, group in groupby(split, key=lambda each: each[0]):
            yield face, "".join(part for _, part in group)

    def _face_of(self, text: str) -> _Face | None:
        return _face_of(text, self.size, self.fonts)


@lru_cache(maxsize=16384)
def _face_of(text: str, size: int, fonts: tuple[Path, ...]) -> _Face | None:
    """The first face that has all of the text."""
    return next((face for face in _faces(size, fonts) if face.has(text)), None)


def _faces(size: int, fonts: tuple[Path, ...]) -> Iterator[_Face]:
    yield _own(size)
    for path in fonts:
        if (face := _opened(path, size)) is not None:
            yield face


@lru_cache(maxsize=64)
def _own(size: int) -> _Face:
    """Pillow's own font."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a Pillow without FreeType has nothing but a bitmap of ASCII
    return _Face(font, font.font_variant(layout_engine=ImageFont.Layout.BASIC))


@lru_cache(maxsize=4096)
def _opened(path: Path, size: int) -> _Face | None:
    for strike in (size, *STRIKES):
        try:
            font = ImageFont.truetype(path, strike)
            return _Face(font, ImageFont.truetype(path, strike, layout_engine=ImageFont.Layout.BASIC), size / strike)
        except OSError:  # no font after all, or one of pictures that has other sizes
            continue
    return None


@lru_cache(maxsize=1)
def font_files() -> tuple[Path, ...]:
    """The fonts that came with our dependencies, and those of the machine: the plain, well-known ones first."""
    files = {path for folder in _folders() for path in _below(folder) if path.suffix.lower() in SUFFIXES}
    return tuple(sorted((path for path in files if not any(word in _name(path) for word in UNFIT)), key=_order))


def _order(path: Path) -> tuple[object, ...]:
    name = _name(path)
    place = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
    return place, any(style in name for style in OTHER_STYLES), name, str(path)


def _name(path: Path) -> str:
    return path.stem.lower().replace(" ", "")


def _folders() -> list[Path]:
    home, folders = Path.home(), []
    gradio = find_spec("gradio")  # without importing it: its Source Sans has all of Latin, Greek and Cyrillic
    if gradio is not None and gradio.origin:
        folders.append(Path(gradio.origin).parent / "templates" / "frontend" / "static" / "fonts")
    if sys.platform == "win32":
        folders.append(Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts")
        folders.append(Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft" / "Windows" / "Fonts")
    elif sys.platform == "darwin":
        folders += [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    else:
        shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = os.environ.get("XDG_DATA_HOME") or str(home / ".local" / "share")
        folders += [Path(folder) / "fonts" for folder in (own, *shared.split(":")) if folder]
        folders.append(home / ".fonts")
    return folders


def _below(folder: Path) -> Iterator[Path]:
    for inside, _, names in os.walk(folder):  # unreadable folders are passed over
        yield from (Path(inside) / name for name in names)


def _plain(text: str) -> str:
    """Composed, without line breaks; joiners only where Pillow can shape by them."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text if features.check("raqm") else "".join(c for c in text if unicodedata.category(c) != "Cf")


def _words(text: str) -> list[str]:
    """The words, with their blanks as words between them."""
    return ["".join(group) for _, group in groupby(text, key=str.isspace)]


def clusters(text: str) -> list[str]:
    """The text in what people take for one character: with its accents, and with what joiners join."""
    found: list[str] = []
    for character in text:
        belongs = unicodedata.category(character).startswith("M") or character in JOINERS
        if found and (belongs or found[-1].endswith("\u200d")):
            found[-1] += character
        else:
            found.append(character)
    return found


def readable(text: str, fonts: Sequence[Path] | None = None) -> str:
    """The text as pictures have it, at any size."""
    return Lettering(12, fonts).readable(text)


def note_on_missing(texts: Sequence[str], fonts: Sequence[Path] | None = None) -> str:
    """What no font of this machine has, and the way out, in one line for people; empty where there is nothing."""
    lettering = Lettering(12, fonts)
    missing = list(dict.fromkeys(character for text in texts for character in lettering.missing(text)))
    if not missing:
        return ""
    named = ", ".join(f"U+{ord(each):04X} ({unicodedata.name(each, 'no name').lower()})" for each in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"No font on this machine has {named}{more}, so the picture shows their numbers. Install a font that has them, "
        "such as Noto Sans, Noto Sans CJK or Noto Color Emoji, then draw again."
    )
