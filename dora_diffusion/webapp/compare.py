"""The Compare tab: one prompt and a few seeds through the base, a LoRA and a DoRA, cell by cell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.comparison.export import metadata_of, read_record, record_of
from dora_diffusion.comparison.request import Cell, CompareRequest, written_size
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp import cells, parts
from dora_diffusion.webapp.cards import full_card, inspection, short_card
from dora_diffusion.webapp.compare_layout import CompareLayout
from dora_diffusion.webapp.drawing import Drawing
from dora_diffusion.webapp.exports import command_line, export_files, export_links
from dora_diffusion.webapp.forms import Chosen, compare_request, restored, sweep_of
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.pictures import Album
from dora_diffusion.webapp.shown import Placed, Shown, packaged_example
from dora_diffusion.webapp.studio import EMBEDDED_NAME, Studio
from dora_diffusion.webapp.views import BLIND, GRID, SLIDER, hidden_grid, show_view
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["CompareTab"]

TELL_EVERY = 0.5  # seconds; a message for every step of a quick base would take longer than the step
Update = tuple[object, ...]


class CompareTab:
    """Connects the layout to what draws; `pickers` is for those who have made new adapters."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.example = packaged_example() if studio.base_name == EMBEDDED_NAME else None
        self.layout = CompareLayout(self.example)

    def build(self) -> None:
        page = self.layout
        page.build()
        self.pickers = page.pickers
        self.on_open = [*page.pickers, *page.cards]
        for picker, upload, card in zip(page.pickers, page.uploads, page.cards):
            picker.change(self.show_card, picker, [card, page.error], **parts.QUIET)
            upload.upload(self.take_in, upload, [picker, page.error], api_visibility="private")
            # A list that was filled an hour ago would lack what was made since.
            picker.focus(self.choices, picker, picker, queue=False, **parts.QUIET)
        shown = [page.grid, page.status, page.error, page.go, page.halt, page.shown, page.links, page.command]
        running = {"concurrency_limit": None, "concurrency_id": "compare", **parts.QUIET}  # the painter lets one draw
        for start in (page.go.click, page.prompt.submit):
            start(self.draw, page.form, shown, **running)
        for strength in page.strengths:
            strength.release(self.draw_again, [page.shown, *page.form], shown, **running)
        page.halt.click(self.stop, None, None, queue=False, **parts.QUIET)
        looks = [page.shown, page.view, page.pair]
        gr.on([page.view.change, page.pair.change], self.look, looks, page.look_shown, **parts.LATEST)
        page.restore.upload(self.restore, page.restore, page.restored, **parts.QUIET)
        page.sweep_go.click(self.sweep, page.sweep_form, [*shown, page.view], **running)
        sized = [page.sweeps.expand, *(field.change for field in page.sweep_form)]
        gr.on(sized, self.sweep_size, page.sweep_form, page.sweep_note, **parts.LATEST)
        seen = [page.facts.expand, *(picker.change for picker in page.pickers)]
        gr.on(seen, self.show_facts, list(page.pickers), page.facts_shown, **parts.LATEST)
        page.look_inside.click(
            self.look_inside, list(page.pickers), page.inside, show_progress="minimal", api_visibility="private"
        )
        page.votes.connect(self.studio, page.shown)

    def draw(
        self,
        prompt: str,
        seeds: str,
        first: str | None,
        first_strength: float,
        second: str | None,
        second_strength: float,
        steps: int,
        guidance: str,
        negative_prompt: str,
        size: str,
        view: str,
        pair: str,
        page: gr.Request,
    ) -> Iterator[Update]:
        """Yields what the grid, status line, error panel, buttons, page's memory, links and command show."""
        visitor = visitor_of(page)
        keys = self._filled((first, second), visitor)
        chosen = [Chosen(key, at) for key, at in zip(keys, (first_strength, second_strength)) if key]
        yield from self._drawn(
            lambda: compare_request(
                self.studio, visitor, prompt, seeds, chosen, steps, guidance, negative_prompt, size
            ),
            view,
            pair,
            page,
        )

    def draw_again(self, page: gr.Request, shown: Shown | None, *form: Any) -> Iterator[Update]:
        """After a strength was changed; nothing before there was a first comparison."""
        if shown is None or shown.is_example or len(shown.request.columns) > cells.COLUMNS:
            yield (gr.skip(),) * 8
            return
        yield from self.draw(*form, page)  # type: ignore[call-arg]

    def sweep(
        self,
        prompts: str,
        seeds: str,
        strengths: str,
        first: str | None,
        second: str | None,
        steps: int,
        page: gr.Request,
    ) -> Iterator[Update]:
        visitor = visitor_of(page)
        keys = [key for key in self._filled((first, second), visitor) if key]
        for update in self._drawn(
            lambda: sweep_of(self.studio, visitor, prompts, seeds, strengths, keys, steps), GRID, "", page
        ):
            yield *update, GRID

    def _filled(self, pickers: tuple[str | None, str | None], visitor: str) -> list[str | None]:
        """What the pickers stand for: None is one that a page just opened has not filled yet, "" is no adapter."""
        preset = self.studio.shelf.pair(visitor)
        return [at_first if key is None else key for key, at_first in zip(pickers, preset)]

    def _drawn(self, make: object, view: str, pair: str, page: gr.Request) -> Iterator[Update]:
        yield gr.skip(), parts.status_line("starting", busy=True), parts.panel(None), *_buttons(True), *_skips(3)
        try:
            request, names = make()  # type: ignore[operator]
            drawing = self.studio.painter.begin(str(page.session_hash), request, visitor_of(page))
            album, ours = self.studio.albums.new(), True
            try:
                shown = Shown(request, names)
                for now, text in self._stream(drawing, shown, album):
                    if now is None:  # the pictures of before stay until there is something to draw
                        yield gr.skip(), parts.status_line(text, busy=True), *_skips(6)
                        continue
                    shown = now
                    html = hidden_grid(shown) if view == BLIND else cells.grid(shown, drawing=not shown.is_whole)
                    kept = shown if shown.is_whole else gr.skip()  # before anybody reads that it is done
                    yield html, parts.status_line(text, busy=not shown.is_whole), *_skips(3), kept, *_skips(2)
            finally:
                ours = self.studio.painter.end(str(page.session_hash), drawing)
            if ours:
                yield self._finished(shown, drawing, album, view, pair)
        except DoraDiffusionError as error:
            parts.toast(error)
            yield gr.skip(), parts.status_line(""), parts.panel(error), *_buttons(False), *_skips(3)

    def _stream(self, drawing: Drawing, shown: Shown, album: Album) -> Iterator[tuple[Shown | None, str]]:
        """What is shown, None while waiting, and the status line after every event; cells are saved as they come."""
        record = record_of(drawing.request, self.studio.base_name, self.studio.packing)
        seconds, told, total = 0.0, 0.0, drawing.request.pictures
        for event in drawing:
            at = len(shown.cells) + 1
            if isinstance(event, Cell):
                placed = Placed.of(event, album.add(event.image, metadata_of(record, event)))
                shown = Shown(shown.request, shown.names, (*shown.cells, placed))
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

    def _finished(self, shown: Shown, drawing: Drawing, album: Album, view: str, pair: str) -> Update:
        status = parts.status_line("stopped") if drawing.was_stopped else gr.skip()
        if not shown.is_whole:
            html = cells.grid(shown) if shown.cells else gr.skip()
            return html, status, gr.skip(), *_buttons(False), shown if shown.cells else gr.skip(), *_skips(2)
        links = export_links(*export_files(shown, album, self.studio))
        command = command_line(shown.request, self.studio)
        return (
            show_view(shown, view, pair, self.studio.albums),
            status,
            gr.skip(),
            *_buttons(False),
            shown,
            gr.update(value=links, visible=True),
            gr.update(value=command, visible=True),
        )

    def stop(self, page: gr.Request) -> None:
        self.studio.painter.stop(str(page.session_hash))

    def look(self, shown: Shown | None, view: str, pair: str) -> Update:
        """Another view of the same pictures."""
        if shown is None or not shown.cells:
            return _skips(4)
        html = show_view(shown, view, pair, self.studio.albums)
        return html, *(gr.update(visible=there) for there in (view == SLIDER, view == BLIND, view != BLIND))

    def preset(self, page: gr.Request) -> Update:
        """Pickers and cards of a page that was just opened."""
        keys = self.studio.shelf.pair(visitor_of(page))
        return *(self.choices(key, page) for key in keys), *(self.show_card(key, page)[0] for key in keys)

    def choices(self, chosen: str | None, page: gr.Request) -> object:
        """The adapters to choose from; one that is no longer there is let go."""
        return parts.adapter_choices(self.studio.shelf.all(visitor_of(page)), chosen, ("none", ""))

    def show_card(self, key: str | None, page: gr.Request) -> Update:
        try:
            return short_card(self.studio.shelf.find(key, visitor_of(page)) if key else None), gr.skip()
        except DoraDiffusionError as error:
            return short_card(None), parts.panel(error)

    def show_facts(self, first: str | None, second: str | None, page: gr.Request) -> object:
        html = []
        for key in (first, second):
            try:
                html += [full_card(self.studio.shelf.find(key, visitor_of(page)), self.studio)] if key else []
            except DoraDiffusionError as error:
                html.append(parts.error_panel(error))
        return f"<div class='dd-cards'>{''.join(html)}</div>"

    def look_inside(self, first: str | None, second: str | None, page: gr.Request) -> str:
        try:
            return inspection(
                [self.studio.shelf.find(key, visitor_of(page)) for key in (first, second) if key], self.studio
            )
        except DoraDiffusionError as error:
            return parts.error_panel(error)

    def take_in(self, upload: str, page: gr.Request) -> Update:
        try:
            key = self.studio.shelf.take_in(Path(upload), visitor_of(page)).key
            return self.choices(key, page), parts.panel(None)
        except DoraDiffusionError as error:
            parts.toast(error)
            return gr.skip(), parts.panel(error)

    def restore(self, file: str | None, page: gr.Request) -> Update:
        """The form as the picture's metadata has it, and what could not be restored."""
        if file is None:
            return _skips(12)
        try:
            record = read_record(Path(file))
        except DoraDiffusionError as error:
            parts.toast(error)
            return *_skips(11), parts.panel(error)
        found, missing = restored(self.studio, visitor_of(page), record)
        adapters: list[object] = []
        for chosen in (*found, None, None)[:2]:
            picked = self.choices(chosen.key, page) if chosen else gr.skip()
            adapters += [picked, chosen.strength if chosen else gr.skip()]
        seeds = ", ".join(map(str, record.seeds))
        note = parts.status_line("; ".join(missing) or "the picture's request is restored: press Compare")
        settings = (record.num_inference_steps, _as_typed(record.guidance_scale), record.negative_prompt)
        size = written_size(record.width, record.height)
        return record.prompts[0], seeds, *adapters, *settings, size, note, parts.panel(None)

    def sweep_size(
        self,
        prompts: str,
        seeds: str,
        strengths: str,
        first: str | None,
        second: str | None,
        steps: int,
        page: gr.Request,
    ) -> str:
        """How many pictures a sweep is, and how long it takes."""
        visitor = visitor_of(page)
        keys = [key for key in self._filled((first, second), visitor) if key]
        try:
            request, _ = sweep_of(self.studio, visitor, prompts, seeds, strengths, keys, steps)
        except DoraDiffusionError as error:
            return parts.status_line(parts.said(error))
        return parts.status_line(f"{request.pictures} pictures, {self._time(request)}")

    def _time(self, request: CompareRequest) -> str:
        ready()
        from dora_diffusion.console import clock

        seconds = self.studio.painter.seconds_for(request.pictures, request.num_inference_steps)
        return f"about {clock(seconds)}" if seconds else "time not measured yet"


def _buttons(drawing: bool) -> tuple[object, object]:
    return gr.update(visible=not drawing), gr.update(visible=drawing)


def _as_typed(guidance: float | None) -> str:
    return "" if guidance is None else f"{guidance:g}"


def _skips(count: int) -> tuple[object, ...]:
    return (gr.skip(),) * count
