"""The loss curves of a run, under way or finished, as an inline drawing: no plotting library, light and dark alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.journal import read_log

__all__ = ["COLOURS", "Curve", "draw_curves", "read_curves"]

COLOURS = {"lora": "#d97706", "dora": "#2563eb", "base": "#6b7280"}
WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 28, 26
MOST_POINTS = 300  # a finer line would not be seen
SMOOTHING = 0.95


@dataclass
class Curve:
    """The training loss of each step from the first on, and (step, held-out loss) where it was measured.

    The held-out loss at step 0 is the base's.
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


def read_curves(log: Path) -> dict[str, Curve]:
    """The curves of a run's log.jsonl, by kind; empty when there is none. What is not sound in it is left out."""
    curves: dict[str, Curve] = {}
    for entry in read_log(log).entries:
        curve = curves.setdefault(entry.kind, Curve())
        curve.loss += [entry.loss] if entry.loss is not None else []
        if entry.held_out_loss is not None:
            curve.held_out.append((entry.step, entry.held_out_loss))
    return curves


def draw_curves(curves: Mapping[str, Curve], steps: int, parametrisation: str = "lora") -> str:
    """An <svg>: each step's loss faint, smoothed thin, the held-out loss thick, the base's dashed; the x axis ends at
    `steps`, and the kinds are called as those of this parametrisation are."""
    smoothed = {kind: _smooth(curve.loss) for kind, curve in curves.items()}
    base_loss = next((loss for curve in curves.values() for step, loss in curve.held_out if step == 0), None)
    span = _span(curves, smoothed)
    if span is None:
        return ""
    low, high = span

    def line(points: Sequence[tuple[float, float]], kind: str, style: str) -> str:
        if not points:
            return ""
        places = " ".join(f"{_x(step, steps):.1f},{_y(value, low, high):.1f}" for step, value in _thin(points))
        return f"<polyline points='{places}' fill='none' stroke='{COLOURS[kind]}' stroke-linejoin='round' {style}/>"

    parts = [_axes(low, high, steps)]
    if base_loss is not None:
        y = f"{_y(base_loss, low, high):.1f}"
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y}' y2='{y}' stroke='{COLOURS['base']}' "
            "stroke-dasharray='6 5'/>"
        )
    for kind, curve in list(curves.items()):
        parts.append(line(list(enumerate(curve.loss, 1)), kind, "stroke-opacity='.18'"))
        parts.append(line(list(enumerate(smoothed[kind], 1)), kind, "stroke-opacity='.75' stroke-width='1.5'"))
        parts.append(line(curve.held_out, kind, "stroke-width='3'"))
        parts += [
            f"<circle cx='{_x(step, steps):.1f}' cy='{_y(value, low, high):.1f}' r='3.5' fill='{COLOURS[kind]}'/>"
            for step, value in curve.held_out
        ]
    return (
        f"<svg class='dd-curves' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='loss curves'>"
        + "".join(parts)
        + _legend(curves, parametrisation)
        + "</svg>"
    )


def _span(curves: Mapping[str, Curve], smoothed: Mapping[str, list[float]]) -> tuple[float, float] | None:
    """The range of the y axis. Single steps scatter widely, so their farthest tenth does not count."""
    raw = sorted(value for curve in curves.values() for value in curve.loss)
    raw = raw[len(raw) // 20 : len(raw) - len(raw) // 20]
    calm = [value for line in smoothed.values() for value in line]
    values = raw + calm + [value for curve in curves.values() for _, value in curve.held_out]
    if not values:
        return None
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _x(step: float, steps: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps)


def _y(value: float, low: float, high: float) -> float:
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share


def _axes(low: float, high: float, steps: int) -> str:
    parts = []
    for value in (low, (low + high) / 2, high):
        y = _y(value, low, high)
        parts.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' class='dd-gridline'/>")
        parts.append(f"<text x='{LEFT - 7}' y='{y + 4:.1f}' text-anchor='end'>{value:.3f}</text>")
    for step in (0, steps // 2, steps):
        parts.append(f"<text x='{_x(step, steps):.1f}' y='{HEIGHT - 8}' text-anchor='middle'>{step}</text>")
    return "".join(parts)


def _legend(curves: Mapping[str, Curve], parametrisation: str) -> str:
    parts, x = [], LEFT
    for kind in curves:
        parts.append(f"<circle cx='{x + 5}' cy='12' r='5' fill='{COLOURS[kind]}'/>")
        parts.append(f"<text x='{x + 15}' y='16' class='dd-key'>{adapter_label(kind, parametrisation)}</text>")
        x += 70
    note = "thick: held out (dashed: the base) · thin: training, smoothed"
    parts.append(f"<text x='{WIDTH - RIGHT}' y='16' text-anchor='end'>{note}</text>")
    return "".join(parts)


def _smooth(values: Sequence[float]) -> list[float]:
    smoothed: list[float] = []
    for i, value in enumerate(values):
        keep = min(SMOOTHING, i / (i + 1))  # a plain mean at first, so that the line does not start at one sample
        smoothed.append(keep * smoothed[-1] + (1 - keep) * value if smoothed else value)
    return smoothed


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = -(-len(points) // MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
