"""Folders of pictures: what is read, what is refused, and what the message says."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dora_diffusion.data.cache import to_pixels
from dora_diffusion.data.folder import open_image, read_folder
from dora_diffusion.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_captions_come_from_sidecars_then_metadata_then_the_instance_prompt(folder: Path) -> None:
    (folder / "0.txt").write_text("from the sidecar\n")
    lines = [{"file_name": "0.png", "text": "not used"}, {"file_name": "1.png", "text": "from metadata"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions = [image.caption for image in read_folder(folder, "the instance prompt").images]
    assert captions == ["from the sidecar", "from metadata", "the instance prompt"]


def test_a_byte_order_mark_is_no_part_of_a_caption(folder: Path) -> None:
    (folder / "0.txt").write_bytes("\ufeffcafé".encode())
    assert read_folder(folder, "x").images[0].caption == "café"


def test_files_that_are_no_pictures_are_named_not_dropped_silently(folder: Path) -> None:
    (folder / "notes.md").write_text("notes")
    (folder / "more").mkdir()
    assert read_folder(folder, "x").ignored == ("more/", "notes.md")


def test_transparency_becomes_white_and_exif_rotation_is_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


def test_pixels_are_the_middle_square_in_minus_one_to_one() -> None:
    array = np.zeros((20, 60, 3), dtype=np.uint8)
    array[:, 20:40] = 255
    pixels = to_pixels(Image.fromarray(array), 20)
    assert pixels.shape == (3, 20, 20)
    assert pixels.min() == pixels.max() == 1


def _claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_bad_picture_is_listed_with_its_reason(folder: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.jpg").write_bytes(b"this is no picture at all")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "bomb.png").write_bytes(_claims(60_000, 60_000))
    (folder / "big.png").write_bytes(_claims(11_000, 10_000))
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    with pytest.raises(DataError) as error:
        read_folder(folder, "x")
    message = str(error.value)
    assert message.startswith("6 of 9 pictures")
    for expected in ("cut.png: is damaged", "noise.jpg: is no picture", "empty.webp: is no picture", "dot.png: 1 x 1"):
        assert expected in message
    assert "bomb.png: claims more than" in message and "big.png: 11000 x 10000 is more than" in message
    assert "move them out of the folder" in message


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "missing", "no folder at"),
        (lambda folder: folder / "0.png", "is a file; images must be a folder"),
        (lambda folder: _mkdir(folder / "new"), "has no pictures"),
    ],
)
def test_a_folder_that_is_missing_a_file_or_empty_is_said_so(folder: Path, make, expected: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=expected):
        read_folder(make(folder), "x")


def _mkdir(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("0.txt", "caf\xe9".encode("latin-1"), "not UTF-8 text"),
        ("0.txt", b"  \n", "is empty"),
        ("metadata.jsonl", b"{not json}", "line 1"),
        ("metadata.jsonl", b'{"file_name": "9.png", "text": "x"}', "no picture '9.png'"),
        ("metadata.jsonl", b'{"file": "0.png"}', "KeyError"),
    ],
)
def test_a_bad_caption_file_is_named(folder: Path, name: str, content: bytes, expected: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as error:
        read_folder(folder, "x")
    assert name in str(error.value)


def test_pictures_without_a_caption_ask_for_an_instance_prompt(folder: Path) -> None:
    with pytest.raises(DataError, match="--instance-prompt"):
        read_folder(folder)
