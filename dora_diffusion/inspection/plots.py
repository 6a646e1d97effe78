"""The paper's figure 2 for one's own runs: each layer's change of direction against its change of magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from dora_diffusion.inspection.analysis import Analysis, fit
from dora_diffusion.lettering.fonts import Lettering
from dora_diffusion.lettering.labels import distinct

__all__ = ["draw_analyses", "nice_ticks"]

Box = tuple[float, float, float, float]  # left, top, right, bottom
COLOURS = {"LoRA": "#d97706", "DoRA": "#2563eb", "full fine-tuning": "#15803d", "full difference": "#7c3aed"}
OTHERS = ("#be185d", "#0f766e", "#4d7c0f", "#6d28d9", "#b91c1c", "#0369a1")
INK, FAINT, GRID = "#1c1c1c", "#5a5a5a", "#e4e4e4"
SCALE = 2  # drawn twice as large and made smaller, so that lines are smooth
PANEL, GAP, MARGIN = (340, 300), 34, 22
MOST_IN_A_ROW = 3
SPECTRUM = 260
CAPTION = 46
EXPLANATION = (
    "A dot is a layer; vectors are the rows of W, one for each output.",
    "Magnitudes are in the weight's own units; 1 - cos has none: 0 is the same direction, 1 a right angle.",
)
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 48, 46


@dataclass(frozen=True)
class Axis:
    """A range, its ticks and how to write them; `log` shows powers of two."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def draw_analyses(analyses: Sequence[Analysis]) -> Image.Image:
    """A panel for each analysis with its layers, their line and correlation; below, all spectra in one panel."""
    if not analyses:
        raise ValueError("a plot needs at least one analysis")
    columns = min(len(analyses), MOST_IN_A_ROW)
    rows = -(-len(analyses) // columns)
    width = 2 * MARGIN + columns * PANEL[0] + (columns - 1) * GAP
    width = max(width, 2 * MARGIN + 640)
    height = 2 * MARGIN + rows * (PANEL[1] + GAP) + SPECTRUM + CAPTION
    image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    pen = Pen(ImageDraw.Draw(image))
    colours = _colours(analyses)
    names = _names(analyses, PANEL[0] - LEFT, 15)
    for i, (analysis, colour) in enumerate(zip(analyses, colours)):
        left = MARGIN + i % columns * (PANEL[0] + GAP)
        top = MARGIN + i // columns * (PANEL[1] + GAP)
        _scatter(pen, analysis, names[i], colour, (left, top, left + PANEL[0], top + PANEL[1]))
    top = MARGIN + rows * (PANEL[1] + GAP)
    _spectra(pen, analyses, colours, (MARGIN, top, width - MARGIN, top + SPECTRUM))
    for i, text in enumerate(EXPLANATION):
        pen.text(MARGIN + LEFT, top + SPECTRUM + 14 + 18 * i, text, FAINT, 12)
    return image.resize((width, height), Image.Resampling.LANCZOS)


class Pen:
    """Draws in points of the finished picture."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, colour, width=max(1, round(width * SCALE)), joint="curve")

    def dot(self, x: float, y: float, colour: str, r: float = 3.5) -> None:
        box = ((x - r) * SCALE, (y - r) * SCALE, (x + r) * SCALE, (y + r) * SCALE)
        self.draw.ellipse(box, fill=colour, outline="white", width=SCALE // 2)

    def text(self, x: float, y: float, text: str, colour: str = INK, size: int = 12, anchor: str = "la") -> None:
        Lettering(size * SCALE).write(self.draw, (x * SCALE, y * SCALE), text, colour, anchor)

    def upright(self, x: float, y: float, text: str, colour: str = INK, size: int = 12) -> None:
        """Text that reads upwards, centred at (x, y)."""
        font = Lettering(size * SCALE)
        label = Image.new("L", (math.ceil(font.length(text)) + 4, 2 * size * SCALE), 0)
        font.write(ImageDraw.Draw(label), (2, size * SCALE), text, 255, "lm")
        turned = label.rotate(90, expand=True)
        corner = (round(x * SCALE - turned.width / 2), round(y * SCALE - turned.height / 2))
        self.draw.bitmap(corner, turned, fill=colour)


def _scatter(pen: Pen, analysis: Analysis, name: str, colour: str, box: Box) -> None:
    points = [(layer.direction_change, layer.magnitude_change) for layer in analysis.matrices]
    line = fit(points)
    note = "" if line is None else f", correlation {line[2]:+.2f}"
    pen.text(box[0] + LEFT, box[1] + 2, name, INK, 15)
    pen.text(box[0] + LEFT, box[1] + 24, f"{analysis.kind}, {len(points)} layers{note}", FAINT, 12)
    x = _axis([p[0] for p in points], "change of direction: mean 1 - cos")
    y = _axis([p[1] for p in points], "change of magnitude: mean |m' - m0|")
    inside = _frame(pen, box, x, y)
    if line is not None:
        ends = [(value, line[0] * value + line[1]) for value in (min(p[0] for p in points), max(p[0] for p in points))]
        pen.line([_at(inside, x, y, *end) for end in _clipped(ends, y)], colour, 1.5)
    for point in points:
        pen.dot(*_at(inside, x, y, *point), colour)


def _spectra(pen: Pen, analyses: Sequence[Analysis], colours: Sequence[str], box: Box) -> None:
    """The share of ||dW||^2 within the first k singular values, a mean over the layers."""
    curves = [_mean_energy(analysis) for analysis in analyses]
    longest = max(2, max(len(curve) for curve in curves))
    doublings = tuple(2.0**i for i in range(int(math.log2(longest)) + 1))
    x = Axis(1, longest, doublings, "singular values taken, largest first", log=True)
    y = Axis(0, 1, (0, 0.25, 0.5, 0.75, 1), "share of the update's energy")
    pen.text(box[0] + LEFT, box[1] + 2, "Spectrum of the update, mean over the layers", INK, 15)
    at = box[0] + LEFT
    widest = (box[2] - at) / len(analyses) - 30
    for name, colour in zip(_names(analyses, widest, 12), colours):
        pen.dot(at + 5, box[1] + 32, colour, 5)
        pen.text(at + 14, box[1] + 24, name, FAINT, 12)
        at += 30 + Lettering(12).length(name)
    inside = _frame(pen, box, x, y)
    for curve, colour in zip(curves, colours):
        whole = [*enumerate(curve, 1), (longest, curve[-1])]
        pen.line([_at(inside, x, y, k, share) for k, share in whole], colour, 2)


def _mean_energy(analysis: Analysis) -> list[float]:
    """Cumulative energy at 1, 2, ... singular values; a layer with fewer has it all by then."""
    layers = [layer.singular_values for layer in analysis.matrices if any(layer.singular_values)]
    length = max((len(values) for values in layers), default=1)
    totals = [0.0] * length
    for values in layers:
        energy, all_of_it = 0.0, sum(value * value for value in values)
        for k in range(length):
            energy += values[k] ** 2 if k < len(values) else 0.0
            totals[k] += energy / all_of_it
    return [total / max(1, len(layers)) for total in totals]


def _frame(pen: Pen, box: Box, x: Axis, y: Axis) -> Box:
    """Grid, ticks and labels; returns the area for the data."""
    inside = (box[0] + LEFT, box[1] + TOP, box[2] - RIGHT, box[3] - BOTTOM)
    for tick in x.ticks:
        at = _at(inside, x, y, tick, y.low)
        pen.line([at, (at[0], inside[1])], GRID)
        pen.text(at[0], at[1] + 5, _number(tick), FAINT, 11, "ma")
    for tick in y.ticks:
        at = _at(inside, x, y, x.low, tick)
        pen.line([at, (inside[2], at[1])], GRID)
        pen.text(at[0] - 6, at[1], _number(tick), FAINT, 11, "rm")
    pen.line([(inside[0], inside[1]), (inside[0], inside[3]), (inside[2], inside[3])], FAINT)
    pen.text((inside[0] + inside[2]) / 2, inside[3] + 22, x.label, INK, 12, "ma")
    pen.upright(box[0] + 8, (inside[1] + inside[3]) / 2, y.label)
    return inside


def _at(inside: Box, x: Axis, y: Axis, a: float, b: float) -> tuple[float, float]:
    left, top, right, bottom = inside
    return left + x.place(a) * (right - left), bottom - y.place(b) * (bottom - top)


def _axis(values: Sequence[float], label: str) -> Axis:
    low, high = min(values, default=0.0), max(values, default=1.0)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    return Axis(min(ticks[0], low - 0.1 * step), max(ticks[-1], high + 0.1 * step), ticks, label)


def nice_ticks(low: float, high: float, about: int = 4) -> tuple[float, ...]:
    """Round numbers from just below `low` to just above `high`: steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(i * step for i in range(first, max(last, first + 1) + 1))


def _clipped(ends: list[tuple[float, float]], y: Axis) -> list[tuple[float, float]]:
    """The part of a line that is within the axis's range."""
    (x0, y0), (x1, y1) = ends
    if y0 == y1:
        return ends
    kept = []
    for a, b in ends:
        b_in = min(max(b, y.low), y.high)
        kept.append((a if b_in == b else x0 + (b_in - y0) * (x1 - x0) / (y1 - y0), b_in))
    return kept


def _colours(analyses: Sequence[Analysis]) -> list[str]:
    """Each kind its own colour; further files of a kind take others."""
    spare, taken, colours = list(OTHERS), set(), []
    for analysis in analyses:
        colour = COLOURS.get(analysis.kind, "")
        if not colour or colour in taken:
            colour = spare.pop(0) if spare else INK
        taken.add(colour)
        colours.append(colour)
    return colours


def _names(analyses: Sequence[Analysis], width: float, size: int) -> list[str]:
    """The analyses' names, none wider than `width` and no two alike."""
    font = Lettering(size)
    return distinct([analysis.name for analysis in analyses], lambda text: font.length(text) <= width)


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-15 else f"{value:.4g}"
