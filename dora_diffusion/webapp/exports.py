"""What a finished comparison can be taken away as: the labelled grid, one HTML file, the command line."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path

from dora_diffusion.comparison.export import command_of, metadata_of, record_of
from dora_diffusion.comparison.request import CompareRequest
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.pictures import Album, url_of
from dora_diffusion.webapp.shown import Shown
from dora_diffusion.webapp.studio import Studio

__all__ = ["command_line", "export_files", "export_links"]


def export_files(shown: Shown, album: Album, studio: Studio) -> tuple[Path, Path, str]:
    """The grid as a PNG that restores the request, the report with all pictures inside, and what is to say of them."""
    ready()
    from dora_diffusion.comparison.grid import draw_grid, grid_note
    from dora_diffusion.comparison.report import write_report

    cells = [placed.cell() for placed in shown.cells]
    record = record_of(shown.request, studio.base_name, studio.packing)
    grid = album.add(draw_grid(shown.request, cells), metadata_of(record))
    command = parts.told(command_line(shown.request, studio))  # it is made to be handed on
    html = write_report("Side by side", shown.request, cells, base_name=studio.base_label, commands=(command,))
    return grid, album.add_text(html, "html"), grid_note(shown.request)


def export_links(grid: Path, report: Path, note: str = "") -> str:
    """`note` is what must be said of the grid."""
    links = (
        (grid, "comparison.png", "Labelled grid (PNG)"),
        (report, "comparison.html", "Everything in one HTML file"),
    )
    items = "".join(
        f"<a class='dd-link' href='{url_of(path)}' download='{name}'>{escape(text)}</a>" for path, name, text in links
    )
    return (
        f"<div class='dd-links'>{items}<span>A picture of the grid is saved by clicking it.</span>"
        + (f"<span class='dd-warn'>{escape(note)}</span>" if note else "")
        + "</div>"
    )


def command_line(request: CompareRequest, studio: Studio) -> str:
    """As a terminal in the folder above the outputs would take it."""
    shown = tuple(
        replace(column, path=studio.shown_path(column.path)) if column.path else column for column in request.adapters
    )
    return command_of(replace(request, adapters=shown), studio.base_name, studio.packing)
