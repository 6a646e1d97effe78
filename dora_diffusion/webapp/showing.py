"""A comparison as it comes onto the page: picture by picture, in the view that was chosen, then with its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gradio as gr

from dora_diffusion.comparison.export import metadata_of, record_of
from dora_diffusion.comparison.request import Cell
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp import cells, parts
from dora_diffusion.webapp.drawing import Drawing
from dora_diffusion.webapp.exports import command_line, export_files, export_links
from dora_diffusion.webapp.pictures import Album
from dora_diffusion.webapp.shown import Placed, Shown
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.views import BLIND, chosen_pair, hidden_grid, pairs_of, show_view
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["Showing", "update"]

TELL_EVERY = 0.5  # seconds; a message for every step of a quick base would take longer than the step
SKIP = gr.skip()
FREE = gr.update(interactive=True)  # the choice of a view, when nothing is drawn
Update = tuple[object, ...]


class Showing:
    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def draw(self, make: Callable[[], Shown], view: str, pair: str, page: gr.Request) -> Iterator[Update]:
        """Draw what `make` asks for; what is wrong with it fills the error panel.

        The view is kept meanwhile: another one would be overwritten by the next picture, with its name on it.
        """
        kept = gr.update(value=view, interactive=False)
        busy = parts.status_line("starting", busy=True)
        yield update(status=busy, error=parts.panel(None), buttons=_buttons(True), view=kept, changed=parts.changed(""))
        try:
            shown, visitor = make(), visitor_of(page)
            drawing = self.studio.painter.begin(str(page.session_hash), shown.request, visitor)
            album, ours = self.studio.albums.new(), True
            try:
                for now, text in self._stream(drawing, shown, album):
                    if now is None:  # the pictures of before stay until there is something to draw
                        yield update(status=parts.status_line(text, busy=True))
                        continue
                    shown = now
                    yield self._growing(shown, text, view, visitor)
            finally:
                ours = self.studio.painter.end(str(page.session_hash), drawing)
            if ours:
                yield self._finished(shown, drawing, album, view, pair, visitor)
        except DoraDiffusionError as error:
            parts.toast(error)
            yield update(status=parts.status_line(""), error=parts.panel(error), buttons=_buttons(False), view=FREE)

    def _growing(self, shown: Shown, text: str, view: str, visitor: str) -> Update:
        """A comparison that is being drawn takes the place of the one before, whose files go with it."""
        hidden = gr.update(visible=False)
        html = hidden_grid(shown) if view == BLIND else cells.grid(shown, drawing=not shown.is_whole)
        self._named(shown, view, visitor)
        status = parts.status_line(text, busy=not shown.is_whole)
        return update(html=html, status=status, shown=shown, links=hidden, command=hidden)

    def _named(self, shown: Shown, view: str, visitor: str) -> None:
        if view != BLIND and not shown.is_example:
            self.studio.seen.add(visitor, shown)

    def _stream(self, drawing: Drawing, shown: Shown, album: Album) -> Iterator[tuple[Shown | None, str]]:
        """What is shown, None while waiting, and the status line after every event; cells are saved as they come."""
        record = record_of(drawing.request, self.studio.base_name, self.studio.packing)
        seconds, told, total = 0.0, 0.0, drawing.request.pictures
        for event in drawing:
            at = len(shown.cells) + 1
            if isinstance(event, Cell):
                shown = shown.with_cell(Placed.of(event, album.add(event.image, metadata_of(record, event))))
                seconds += event.seconds
                cached = sum(cell.cached for cell in shown.cells)
                kept = f", {cached} of them from the cache" if cached else ""
                done = f"{total} pictures in {seconds:.1f} s{kept}"
                yield shown, done if shown.is_whole else f"picture {at + 1} of {total}"
            elif event.text:
                yield None, event.text
            elif time.monotonic() > told + TELL_EVERY:
                told = time.monotonic()
                yield shown, f"picture {at} of {total} · step {event.done} of {event.total}"

    def _finished(self, shown: Shown, drawing: Drawing, album: Album, view: str, pair: str, visitor: str) -> Update:
        status = parts.status_line("stopped") if drawing.was_stopped else gr.skip()
        if not shown.is_whole:
            html = self.view(shown, view, pair, visitor) if shown.cells else gr.skip()
            return update(html=html, status=status, buttons=_buttons(False), view=FREE)
        links = export_links(*export_files(shown, album, self.studio))
        command = command_line(shown.request, self.studio)
        return update(
            html=self.view(shown, view, pair, visitor),
            status=status,
            buttons=_buttons(False),
            shown=shown,
            links=gr.update(value=links, visible=True),
            command=gr.update(value=command, visible=True),
            view=FREE,
            pair=gr.update(choices=list(pairs_of(shown)), value=chosen_pair(shown, pair)),
        )

    def view(self, shown: Shown, view: str, pair: str, visitor: str) -> str:
        """The HTML of a view; pictures that it names are seen from now on."""
        self._named(shown, view, visitor)
        return show_view(shown, view, pair, self.studio.albums)


def update(
    html: object = SKIP,
    status: object = SKIP,
    error: object = SKIP,
    buttons: tuple[object, object] = (SKIP, SKIP),
    shown: object = SKIP,
    links: object = SKIP,
    command: object = SKIP,
    view: object = SKIP,
    pair: object = SKIP,
    changed: object = SKIP,
) -> Update:
    """What a drawing changes on the page, in the order of its outputs."""
    return html, status, error, *buttons, shown, links, command, view, pair, changed


def _buttons(drawing: bool) -> tuple[object, object]:
    return gr.update(visible=not drawing), gr.update(visible=drawing)
