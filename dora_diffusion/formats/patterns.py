"""PEFT's patterns of layer names, matched in bounded time.

A key of `alpha_pattern` is a regular expression for the end of a layer's name, from a dot on; the first one that fits
counts. The expressions come with the file, from whoever made it, and one that repeats something repeated can take for
ever. Nearly all are plain names, though, and those are looked up; of the rest only simple ones are tried, and have a
few seconds for all layers together.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import regex

__all__ = ["Patterns"]

SECONDS = 3.0  # a thousand ordinary expressions on a thousand layers need less than one
MAX_LENGTH = 300  # of an expression, and of a name to try it on; the longest path of a layer has about a hundred
_PLAIN = re.compile(
    r"(\^?)((?:[\w.-]|\\[^\w\s])*)\$?"
)  # all that fits has one length: a name, with dots for any letter
_COUNTED = re.compile(r"\{\d*,?\d*\}")  # spelt out when an expression is compiled
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")  # an escape or a class: one letter of a name
MAX_REPEATS, MAX_CHOICES = 3, 8
Holes = tuple[int, ...]  # where any letter may stand


class Patterns:
    """Expressions in the order of their table. Raises ValueError for those that cannot be used."""

    def __init__(self, patterns: Iterable[str]) -> None:
        # The numbers of the plain ones by their length, their holes, and the letters in between.
        self._plain: dict[int, dict[Holes, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        self._whole: dict[int, dict[Holes, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))  # with a ^
        self._free: list[tuple[int, str, regex.Pattern[str]]] = []
        self._seconds = SECONDS
        for i, pattern in enumerate(patterns):
            if found := _PLAIN.fullmatch(pattern):
                letters = re.findall(r"\\?.", found[2])
                holes = tuple(at for at, letter in enumerate(letters) if letter == ".")
                table = (self._whole if found[1] else self._plain)[len(letters)][holes]
                table.setdefault("".join(letter[-1] for letter in letters if letter != "."), i)
            else:
                self._free.append((i, pattern, _compiled(pattern)))

    def first(self, name: str) -> int | None:
        """The number of the first expression that fits this name's end, or None. Raises ValueError."""
        started = time.monotonic()
        best = min(self._plain_fits(name), default=None)
        for i, pattern, expression in self._free:
            if best is not None and i > best:
                break
            left = self._seconds - (time.monotonic() - started)
            if left <= 0 or len(name) > MAX_LENGTH:
                raise ValueError(f"the pattern {pattern[:80]!r} could take for ever to match")
            try:
                if expression.match(name, timeout=left) is not None:
                    best = i
                    break
            except TimeoutError as error:
                raise ValueError(f"the pattern {pattern[:80]!r} could take for ever to match") from error
        self._seconds -= time.monotonic() - started
        if self._seconds <= 0:
            raise ValueError("its patterns could take for ever to match")
        return best

    def _plain_fits(self, name: str) -> Iterator[int]:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        for start, tables in ((0, self._whole), *((start, self._plain) for start in starts)):
            end = name[start:]
            for holes, table in tables.get(len(end), {}).items():
                letters = "".join(letter for at, letter in enumerate(end) if at not in holes) if holes else end
                if letters in table:
                    yield table[letters]


def _is_simple(pattern: str) -> bool:
    """Whether matching takes at most a power of the name's length, and a small one.

    No group is repeated, nothing looks around or back, and little is repeated or left to choose at all.
    """
    shape = _ATOM.sub("x", pattern).replace("(?:", "(")
    repeats = re.findall(r"[*+?{]", shape)
    return (
        len(pattern) <= MAX_LENGTH
        and len(repeats) <= MAX_REPEATS
        and shape.count("|") <= MAX_CHOICES
        and not re.search(r"\)[*+?{]|\(\?|\[", shape)
        and not re.search(r"\\[1-9gk]", pattern)
        and all(len(count) <= 5 for count in _COUNTED.findall(shape))
    )


def _compiled(pattern: str) -> regex.Pattern[str]:
    if not _is_simple(pattern):
        raise ValueError(
            f"the pattern {pattern[:80]!r} could take for ever to match: a name with up to {MAX_REPEATS} repeats, none "
            "of a group, is matched"
        )
    try:
        return regex.compile(rf"(.*\.)?({pattern})$")
    except regex.error as error:
        raise ValueError(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from error
