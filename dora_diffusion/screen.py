"""Words on a terminal: text from outside (prompts, names, messages of other programs) is shown as it is, never obeyed.

rich reads `[red]` as a style, `:smile:` as a picture, and passes escape sequences on to the terminal; none of that may
be decided by a folder's name. Styles are given beside the text, by `Screen.say` and `styled`.
"""

from __future__ import annotations

import shlex
import sys
import unicodedata
from collections.abc import Iterable
from typing import IO

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

__all__ = ["PlainColumn", "Screen", "Words", "encode_anything", "printable", "shell_line", "styled"]

Words = str | tuple[str, str]  # text, or text and the style that rich knows by this name
# Terminals act on these categories, or show nothing of them: controls, formats (the bidirectional ones turn a name
# around), halves of characters (how Python holds a byte that is no UTF-8), separators of lines.
UNSHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # formats too, but writing in many languages and family emoji need them


def printable(text: object, keep: str = "") -> str:
    """The text in one line that shows every character: what would act on a terminal is written as an escape.

    `keep` are characters that are left as they are.
    """
    return "".join(
        c if c in keep or c in JOINERS or unicodedata.category(c) not in UNSHOWN else _escape(c) for c in str(text)
    )


def _escape(character: str) -> str:
    point = ord(character)
    if 0xDC80 <= point <= 0xDCFF:  # the byte that surrogateescape stands for
        return f"\\x{point - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shell_line(words: Iterable[str]) -> str:
    """A command to paste into a shell, which means these very words there and shows every character here."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    quoted = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if printable(c) == c else f"\\U{ord(c):08x}" for c in quoted) + "'"


def styled(*words: Words) -> Text:
    """One text of several pieces; line breaks are kept, all else is made printable."""
    pieces = [(word, "") if isinstance(word, str) else word for word in words]
    return Text.assemble(*((printable(text, keep="\n"), style) for text, style in pieces))


class Screen(Console):
    """A rich console on which text is text: no markup, no emoji names, no highlighting, no escape sequences."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, quiet=quiet, file=file, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: object) -> Text:  # type: ignore[override]
        """How rich turns every plain string into what it draws, the cells of tables too."""
        return super().render_str(printable(text, keep="\n"), **options)  # type: ignore[arg-type]

    def say(self, *words: Words, end: str = "\n", soft_wrap: bool = True) -> None:
        """Print text and styled text in a row; with `soft_wrap` a long path stays in one piece."""
        self.print(styled(*words), end=end, soft_wrap=soft_wrap)


class PlainColumn(ProgressColumn):
    """A column of a progress bar with one of the task's fields, or its description, as plain text."""

    def __init__(self, field: str | None = None, width: int = 0) -> None:
        super().__init__(Column(no_wrap=True))
        self.field, self.width = field, width

    def render(self, task: Task) -> Text:
        text = task.description if self.field is None else str(task.fields.get(self.field, ""))
        return Text(printable(text).ljust(self.width))


def encode_anything() -> None:
    """Let a terminal that knows no UTF-8 (the C locale) show escapes where it cannot show a character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
