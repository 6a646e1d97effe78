"""The code points of H.273 by which PNG (cICP), AVIF and HEIF (colr) say what colours their numbers mean.

Pillow does not read them. Only those of the picture that is shown count: a file may hold depth and gain maps beside it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["CodePoints", "code_points"]

PNG = b"\x89PNG\r\n\x1a\n"
MOST = 16 * 1024**2  # bytes of a container's description; a camera's has some thousands


@dataclass(frozen=True)
class CodePoints:
    """Colour primaries and transfer characteristics by their numbers, and whether they win over an ICC profile."""

    primaries: int
    transfer: int
    win: bool


def code_points(file: BinaryIO) -> CodePoints | None:
    """What the file says, None where it says nothing or is of another kind; it is wound back to its beginning."""
    try:
        head = file.read(8)
        if head == PNG:
            return _of_png(file)
        if head[4:] == b"ftyp":
            file.seek(0)
            return _of_heif(_description(file))
        return None
    except (struct.error, IndexError, ValueError):  # damaged: the decoder says it better
        return None
    finally:
        file.seek(0)


def _of_png(file: BinaryIO) -> CodePoints | None:
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"cICP":
            primaries, transfer = file.read(2)
            return CodePoints(primaries, transfer, win=True)
        if name in (b"IDAT", b"IEND"):
            return None
        file.seek(length + 4, 1)
    return None


def _description(file: BinaryIO) -> bytes:
    """The contents of the box `meta` at the top."""
    while len(head := file.read(8)) == 8:
        size, name = struct.unpack(">I4s", head)
        begun = 8
        if size == 1:
            size, begun = struct.unpack(">Q", file.read(8))[0], 16
        if name == b"meta":
            return file.read(min(size - begun, MOST))[4:]
        if size < begun:
            return b""
        file.seek(size - begun, 1)
    return b""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and contents of each box."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield name, data[at + 8 : at + size]
        at += size


def _of_heif(meta: bytes) -> CodePoints | None:
    boxes = dict(_boxes(meta))
    if b"pitm" not in boxes or b"iprp" not in boxes:
        return None
    primary = int.from_bytes(boxes[b"pitm"][4:], "big")
    parts = list(_boxes(boxes[b"iprp"]))
    properties = [each for name, data in parts if name == b"ipco" for each in _boxes(data)]
    for number in (n for name, data in parts if name == b"ipma" for n in _properties_of(primary, data)):
        name, data = properties[number - 1]
        if name == b"colr" and data[:4] == b"nclx":
            primaries, transfer = struct.unpack_from(">HH", data, 4)
            return CodePoints(primaries, transfer, win=False)
    return None


def _properties_of(item: int, data: bytes) -> Iterator[int]:
    """The numbers, from 1, of an item's properties in a box `ipma`."""
    long_ids, long_numbers = data[0] > 0, bool(data[3] & 1)
    count, at = struct.unpack_from(">I", data, 4)[0], 8
    for _ in range(count):
        own, number = struct.unpack_from(">IB" if long_ids else ">HB", data, at)
        at += 5 if long_ids else 3
        for _ in range(number):
            entry = struct.unpack_from(">H" if long_numbers else ">B", data, at)[0]
            at += 2 if long_numbers else 1
            if own == item and entry & (0x7FFF if long_numbers else 0x7F):
                yield entry & (0x7FFF if long_numbers else 0x7F)
