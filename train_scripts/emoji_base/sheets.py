"""Pictures of pictures: sample grids and the labelled contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from dora_diffusion.lettering.fonts import Lettering
from dora_diffusion.lettering.labels import distinct

from .files import write_atomically


def _save(sheet: Image.Image, path: Path) -> None:
    with write_atomically(path) as temporary:
        sheet.save(temporary, format="PNG")


def save_pairs(first: Tensor, second: Tensor, path: Path, columns: int = 12) -> None:
    """Rows of originals with the reconstructions under them; both uint8 [N, H, W, 3]."""
    size = first.shape[1]
    rows = -(-len(first) // columns)
    sheet = Image.new("RGB", (columns * size, rows * 2 * size), "white")
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        left, top = k % columns * size, k // columns * 2 * size
        sheet.paste(Image.fromarray(a.numpy()), (left, top))
        sheet.paste(Image.fromarray(b.numpy()), (left, top + size))
    _save(sheet, path)


def save_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], path: Path, columns: int = 10) -> None:
    """A grid of pictures with a small label under each."""
    font = Lettering(9)
    size = pictures[0].width
    cell_width, cell_height = size + 24, size + 16
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    short = distinct(labels, lambda text: font.length(text) <= cell_width)
    for k, (picture, label) in enumerate(zip(pictures, short, strict=True)):
        left, top = k % columns * cell_width, k // columns * cell_height
        sheet.paste(picture, (left + 12, top + 2))
        middle = left + cell_width // 2
        font.write(draw, (middle, top + size + 3), label, "#444", "ma")
    # 256 colours are enough for icons and keep the landed folder small.
    _save(sheet.quantize(256, dither=Image.Dither.NONE), path)
