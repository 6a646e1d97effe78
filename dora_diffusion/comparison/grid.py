"""A comparison as one labelled picture: a column each for the base and the adapters, a row for each prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from dora_diffusion.comparison.request import Cell, Column, CompareRequest, written_number
from dora_diffusion.lettering.fonts import Lettering, note_on_missing
from dora_diffusion.lettering.labels import distinct, wrapped

__all__ = ["draw_grid", "enlarge", "grid_note"]

SMALLEST_CELL = 160  # pixels; pictures of small bases are enlarged so that a person can see them
GAP = 10
MARGIN = 16
HEADER = 30
ROW_LABEL = 190
LINE, CAPTION = 17, 18
INK = "#1c1c1c"
FAINT = "#6a6a6a"


def draw_grid(request: CompareRequest, cells: Sequence[Cell]) -> Image.Image:
    """The grid of these cells; cells that are not there yet stay empty."""
    if not cells:
        raise ValueError("a grid needs at least one cell")
    width, height = enlarge(cells[0].image).size
    columns, rows = request.columns, request.rows
    title, small = Lettering(18), Lettering(12)
    headings = _headings(columns, width, title)
    header = HEADER * max(len(lines) for lines in headings)
    size = (
        2 * MARGIN + ROW_LABEL + len(columns) * (width + GAP) - GAP,
        2 * MARGIN + header + len(rows) * (height + CAPTION + GAP) - GAP,
    )
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for i, lines in enumerate(headings):
        for k, line in enumerate(lines):
            title.write(pen, (_x(i, width) + width / 2, MARGIN + k * HEADER), line, INK, "ma")
    labels = _row_labels(request.prompts, (height + CAPTION - 4) // LINE - 1, small)
    for row, (prompt, seed) in enumerate(rows):
        top = MARGIN + header + row * (height + CAPTION + GAP)
        lines = labels[prompt]
        for i, line in enumerate([*lines, f"seed {seed}"]):
            small.write(pen, (MARGIN, top + 4 + LINE * i), line, INK if i < len(lines) else FAINT)
    for cell in cells:
        left = _x(cell.column, width)
        top = MARGIN + header + cell.row * (height + CAPTION + GAP)
        grid.paste(enlarge(cell.image), (left, top))
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline="#dddddd")
        note = "" if cell.column == 0 else f"mean |difference| to base {cell.difference:.1f}"
        small.write(pen, (left, top + height + 3), note, FAINT)
    return grid


def grid_note(request: CompareRequest) -> str:
    """What of the grid's texts no font on this machine can show, for people; empty where all is shown."""
    return note_on_missing([*request.prompts, *request.headings])


def _row_labels(prompts: Sequence[str], most_lines: int, font: Lettering) -> dict[str, list[str]]:
    """The prompts in lines beside their rows; one that needs more lines than a row has is shortened."""

    def lines(text: str) -> list[str]:
        return wrapped(text, ROW_LABEL - GAP, font.length)

    labels = distinct(prompts, lambda text: len(lines(text)) <= most_lines)
    return {prompt: lines(label) for prompt, label in zip(prompts, labels)}


def _headings(columns: Sequence[Column], width: int, font: Lettering) -> list[list[str]]:
    """Each column's heading in one line, or in two where one is wider than a picture."""
    strengths = ["" if each.path is None else f"strength {written_number(each.strength)}" for each in columns]
    labels = [column.label for column in columns]
    parts = [[part for part in both if part] for both in zip(labels, strengths)]
    if all(font.length(", ".join(words)) <= width for words in parts):
        return [[", ".join(words)] for words in parts]
    narrow = (distinct(texts, lambda text: font.length(text) <= width) for texts in (labels, strengths))
    return [[part for part in both if part] for both in zip(*narrow)]


def enlarge(image: Image.Image, smallest: int = SMALLEST_CELL) -> Image.Image:
    """Small pictures by a whole factor, so that both sides have at least `smallest` pixels."""
    factor = -(-smallest // min(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def _x(column: int, width: int) -> int:
    return MARGIN + ROW_LABEL + column * (width + GAP)
