"""A comparison as one HTML file with everything inside: figures, loss curves, pictures, adapters, commands."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from dora_diffusion.comparison.curves import Curve, draw_curves
from dora_diffusion.comparison.request import Cell, CompareRequest
from dora_diffusion.formats.files import AdapterFile, read_what_fits
from dora_diffusion.formats.findings import counted

__all__ = ["write_report"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #6a6a6a; --line: #ddd; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --faint: #aaa; --line: #444; --paper: #16181c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.lead { color: var(--faint); margin: 0 0 1.2rem } .scroll { overflow-x: auto }
table { border-collapse: collapse } th, td { padding: .35rem .8rem; text-align: left; vertical-align: top }
table.figures td:not(:first-child), table.figures th:not(:first-child) { text-align: right;
       font-variant-numeric: tabular-nums } table.figures tr { border-bottom: 1px solid var(--line) }
table.pictures { table-layout: fixed; width: 100%; min-width: 34rem } table.pictures th:first-child { width: 9rem }
table.pictures td { padding: .3rem } table.pictures img { width: 100%; max-width: 15rem; display: block;
       border: 1px solid var(--line); border-radius: 6px; background: #fff }
small { color: var(--faint) } code, pre { background: color-mix(in srgb, var(--ink) 8%, transparent);
       border-radius: 4px } pre { padding: .8rem; overflow-x: auto } svg { width: 100%; max-width: 44rem }
.dd-curves text { fill: var(--faint); font-size: 11px } .dd-gridline { stroke: var(--line) }
"""


def write_report(
    title: str,
    request: CompareRequest,
    cells: Sequence[Cell],
    *,
    base_name: str,
    curves: Mapping[str, Curve] | None = None,
    commands: Sequence[str] = (),
) -> str:
    """The page's HTML: it refers to no other file and no other host."""
    paths = dict.fromkeys(column.path for column in request.adapters if column.path)  # a sweep has each often
    files = [read_what_fits(path, partial=request.partial) for path in paths]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=lead>Base <b>{escape(base_name)}</b> · {request.num_inference_steps} steps · the same prompts, "
        "seeds and settings in every column.</p>",
        _figures(files),
        _curves(curves) if curves else "",
        "<h2>Side by side</h2>",
        _pictures(request, cells),
        "<h2>The adapters</h2>",
        _adapters(files),
        "<h2>Try next</h2><pre>" + "\n".join(escape(c) for c in commands) + "</pre>" if commands else "",
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>" + "\n".join(parts) + "</html>\n"
    )


def _figures(files: Sequence[AdapterFile]) -> str:
    """Held-out loss of the base and of each adapter, where the adapters' headers have it."""
    rows, base_loss = [], _base_loss(files)
    for file in files:
        loss = _training(file).get("held_out_loss")
        if base_loss is not None and isinstance(loss, float):
            change = 100 * (loss / base_loss - 1)
            rows.append(f"<tr><td>{file.config.kind_label}<td>{loss:.4f}<td>{change:+.1f} %")
    if not rows:
        return ""
    return (
        "<h2>Held-out loss</h2><p class=lead>On pictures the adapters were not trained on, at fixed noise and "
        "timesteps; lower is better.</p><table class=figures><tr><th>Model<th>Held-out loss<th>Against the base"
        f"<tr><td>base<td>{base_loss:.4f}<td>" + "".join(rows) + "</table>"
    )


def _training(file: AdapterFile) -> dict[str, str | int | float | None]:
    return file.description.training if file.description else {}


def _base_loss(files: Sequence[AdapterFile]) -> float | None:
    values = [_training(file).get("held_out_loss_base") for file in files]
    return next((value for value in values if isinstance(value, float)), None)


def _curves(curves: Mapping[str, Curve]) -> str:
    steps = max(len(curve.loss) for curve in curves.values())
    return "<h2>While training</h2>" + draw_curves(curves, steps)


def _pictures(request: CompareRequest, cells: Sequence[Cell]) -> str:
    place = {(cell.row, cell.column): cell for cell in cells}
    head = "".join(f"<th>{escape(heading)}" for heading in request.headings)
    body = []
    for row, (prompt, seed) in enumerate(request.rows):
        body.append(f"<tr><th>{escape(prompt)}<br><small>seed {seed}</small>")
        for i in range(len(request.columns)):
            cell = place.get((row, i))
            body.append("<td>" + (_picture(cell) if cell else ""))
    return f"<div class=scroll><table class=pictures><tr><th>{head}{''.join(body)}</table></div>"


def _picture(cell: Cell) -> str:
    note = "" if cell.column == 0 else f"mean |difference| to base {cell.difference:.1f}"
    description = escape(f"{cell.caption}: {cell.prompt}", quote=True)
    return f"<img alt='{description}' src='{_data_url(cell.image)}'><small>{escape(cell.caption)}<br>{note}</small>"


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _left_out(file: AdapterFile) -> str:
    return f" <small>({counted(len(file.left_out))} left out)</small>" if file.left_out else ""


def _adapters(files: Sequence[AdapterFile]) -> str:
    rows = []
    for file in files:
        config, path = file.config, file.path
        training = _training(file)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        parameters = sum(tensor.numel() for tensor in file.tensors.values())
        rows.append(
            f"<tr><td>{escape(path.name)}<td>{config.kind_label}<td>{config.rank}<td>{config.alpha:g}"
            f"<td>{len(file.layers)}{_left_out(file)}<td>{parameters:,}<td>{path.stat().st_size / 1024:,.0f} KiB"
            f"<td>{training.get('steps', '')}<td><code>{digest[:12]}</code>"
        )
    head = "<tr><th>File<th>Kind<th>Rank<th>Alpha<th>Layers<th>Parameters<th>Size<th>Steps<th>SHA-256"
    return f"<div class=scroll><table class=figures>{head}{''.join(rows)}</table></div>"
