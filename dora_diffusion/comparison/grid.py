"""A comparison as one labelled picture: a column each for the base and the adapters, a row for each prompt and seed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dora_diffusion.comparison.request import Cell, Column, CompareRequest

__all__ = ["draw_grid", "enlarge"]

SMALLEST_CELL = 160  # pixels; pictures of small bases are enlarged so that a person can see them
GAP = 10
MARGIN = 16
HEADER = 30
ROW_LABEL = 190
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK = "#1c1c1c"
FAINT = "#6a6a6a"


def draw_grid(request: CompareRequest, cells: Sequence[Cell]) -> Image.Image:
    """The grid of these cells; cells that are not there yet stay empty."""
    if not cells:
        raise ValueError("a grid needs at least one cell")
    width, height = enlarge(cells[0].image).size
    caption = 18
    columns, rows = request.columns, request.rows
    title, small = ImageFont.load_default(size=18), ImageFont.load_default(size=12)
    headings = _headings(columns, width, title)
    header = HEADER * max(len(lines) for lines in headings)
    size = (
        2 * MARGIN + ROW_LABEL + len(columns) * (width + GAP) - GAP,
        2 * MARGIN + header + len(rows) * (height + caption + GAP) - GAP,
    )
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for i, lines in enumerate(headings):
        for k, line in enumerate(lines):
            pen.text((_x(i, width) + width / 2, MARGIN + k * HEADER), line, INK, font=title, anchor="ma")
    for row, (prompt, seed) in enumerate(rows):
        top = MARGIN + header + row * (height + caption + GAP)
        lines = [*textwrap.wrap(prompt, 26)[:5], f"seed {seed}"]
        for i, line in enumerate(lines):
            pen.text((MARGIN, top + 4 + 17 * i), line, FAINT if i == len(lines) - 1 else INK, font=small)
    for cell in cells:
        left = _x(cell.column, width)
        top = MARGIN + header + cell.row * (height + caption + GAP)
        grid.paste(enlarge(cell.image), (left, top))
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline="#dddddd")
        note = "" if cell.column == 0 else f"mean |difference| to base {cell.difference:.1f}"
        pen.text((left, top + height + 3), note, FAINT, font=small)
    return grid


def _headings(columns: Sequence[Column], width: int, font: Font) -> list[list[str]]:
    """Each column's heading in one line, or in two where one is wider than a picture."""
    parts = [
        (column.label,) if column.path is None else (column.label, f"strength {column.strength:g}")
        for column in columns
    ]
    if all(font.getlength(", ".join(words)) <= width for words in parts):
        return [[", ".join(words)] for words in parts]
    return [[_shortened(word, width, font) for word in words] for words in parts]


def _shortened(text: str, width: int, font: Font) -> str:
    """The text with its middle left out where it is wider than `width`: names differ at their ends."""
    keep = len(text)
    while font.getlength(short := _middle_out(text, keep)) > width and keep > 2:
        keep -= 1
    return short


def _middle_out(text: str, keep: int) -> str:
    return text if keep >= len(text) else f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def enlarge(image: Image.Image, smallest: int = SMALLEST_CELL) -> Image.Image:
    """Small pictures by a whole factor, so that both sides have at least `smallest` pixels."""
    factor = -(-smallest // min(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _x(column: int, width: int) -> int:
    return MARGIN + ROW_LABEL + column * (width + GAP)
