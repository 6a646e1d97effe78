"""The Compare tab: one prompt and a few seeds through the base, a LoRA and a DoRA, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.comparison.export import read_record
from dora_diffusion.comparison.request import CompareRequest, written_number, written_size
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.cards import full_card, inspection, short_card
from dora_diffusion.webapp.compare_layout import CompareLayout
from dora_diffusion.webapp.forms import Chosen, changed_settings, compare_request, restored, sweep_of
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.showing import Showing, update
from dora_diffusion.webapp.shown import Shown, packaged_example
from dora_diffusion.webapp.studio import EMBEDDED_NAME, Studio
from dora_diffusion.webapp.views import BLIND, GRID, SLIDER
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["CompareTab"]

SWEEP = "A sweep: its prompts, seeds and strengths are those of its own form below, not those above."
Update = tuple[object, ...]


class CompareTab:
    """Connects the layout to what draws; `pickers` is for those who have made new adapters."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.example = packaged_example() if studio.base_name == EMBEDDED_NAME else None
        self.layout = CompareLayout(self.example)
        self.showing = Showing(studio)

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
        shown += [page.view, page.pair, page.changed]
        running = {"concurrency_limit": None, "concurrency_id": "compare", **parts.QUIET}  # the painter lets one draw
        drawn = [start(self.draw, page.form, shown, **running) for start in (page.go.click, page.prompt.submit)]
        again = [page.shown, *page.form]
        drawn += [strength.release(self.draw_again, again, shown, **running) for strength in page.strengths]
        drawn.append(page.sweep_go.click(self.sweep, page.sweep_form, shown, **running))
        page.halt.click(self.stop, None, None, queue=False, **parts.QUIET)
        looks = [page.shown, page.view, page.pair]
        gr.on([page.view.change, page.pair.change], self.look, looks, page.look_shown, **parts.LATEST)
        page.restore.upload(self.restore, page.restore, page.restored, **parts.QUIET)
        sized = [page.sweeps.expand, *(field.change for field in page.sweep_form)]
        gr.on(sized, self.sweep_size, page.sweep_form, page.sweep_note, **parts.LATEST)
        seen = [page.facts.expand, *(picker.change for picker in page.pickers)]
        gr.on(seen, self.show_facts, list(page.pickers), page.facts_shown, **parts.LATEST)
        page.look_inside.click(
            self.look_inside, list(page.pickers), page.inside, show_progress="minimal", api_visibility="private"
        )
        for picker in page.pickers:  # what was found out about others
            picker.change(lambda: "", None, page.inside, queue=False, **parts.QUIET)
        fields = [field.change for field in page.asked]
        gr.on(fields, self.mark, [page.shown, *page.asked], page.changed, **parts.LATEST)
        for event in drawn:
            event.then(self.mark, [page.shown, *page.asked], page.changed, **parts.QUIET)
        page.votes.connect(self.studio, page.shown, drawn)

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
        partial: bool,
        view: str,
        pair: str,
        page: gr.Request,
    ) -> Iterator[Update]:
        """Yields what `update` has a place for."""
        visitor = visitor_of(page)
        keys = self._filled((first, second), visitor)
        chosen = [Chosen(key, at) for key, at in zip(keys, (first_strength, second_strength)) if key]
        yield from self.showing.draw(
            lambda: Shown(
                *compare_request(
                    self.studio, visitor, prompt, seeds, chosen, steps, guidance, negative_prompt, size, partial
                )
            ),
            view,
            pair,
            page,
        )

    def draw_again(self, page: gr.Request, shown: Shown | None, *form: Any) -> Iterator[Update]:
        """After a strength was changed; nothing before there was a first comparison."""
        if shown is None or shown.is_example or shown.is_sweep:
            yield update()
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
        guidance: str,
        negative_prompt: str,
        size: str,
        partial: bool,
        page: gr.Request,
    ) -> Iterator[Update]:
        visitor = visitor_of(page)
        keys = [key for key in self._filled((first, second), visitor) if key]
        more = (steps, guidance, negative_prompt, size, partial)
        yield from self.showing.draw(
            lambda: Shown(*sweep_of(self.studio, visitor, prompts, seeds, strengths, keys, *more), is_sweep=True),
            GRID,
            "",
            page,
        )

    def _filled(self, pickers: tuple[str | None, str | None], visitor: str) -> list[str | None]:
        """What the pickers stand for: None is one that a page just opened has not filled yet, "" is no adapter."""
        preset = self.studio.shelf.pair(visitor)
        return [at_first if key is None else key for key, at_first in zip(pickers, preset)]

    def mark(self, page: gr.Request, shown: Shown | None, *form: Any) -> object:
        """Says that the pictures are not those that the form asks for; nothing where they are."""
        if shown is None or not shown.cells:
            return parts.changed("")
        visitor = visitor_of(page)
        prompt, seeds, first, first_strength, second, second_strength, *more, prompts, sweep_seeds, strengths = form
        keys = self._filled((first, second), visitor)
        try:
            paths = [self.studio.shelf.find(key, visitor).path for key in keys if key]
        except DoraDiffusionError:  # said where it is chosen
            paths = []
        if shown.is_sweep:
            asked = (prompts, sweep_seeds, strengths)
        else:
            asked = (prompt, seeds, [at for key, at in zip(keys, (first_strength, second_strength)) if key])
        return parts.changed(_mark(shown, changed_settings(shown.request, paths, *asked, *more)))

    def stop(self, page: gr.Request) -> None:
        self.studio.painter.stop(str(page.session_hash))

    def look(self, shown: Shown | None, view: str, pair: str, page: gr.Request) -> Update:
        """Another view of the same pictures."""
        if shown is None or not shown.cells:
            return _skips(4)
        html = self.showing.view(shown, view, pair, visitor_of(page))
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
            return _skips(13)
        try:
            record = read_record(Path(file))
        except DoraDiffusionError as error:
            parts.toast(error)
            return *_skips(12), parts.panel(error)
        found, missing = restored(self.studio, visitor_of(page), record)
        adapters: list[object] = []
        for chosen in (*found, None, None)[:2]:  # another adapter must not stay in the place of one that is missing
            adapters += [self.choices(chosen.key if chosen else "", page), chosen.strength if chosen else gr.skip()]
        seeds = ", ".join(map(str, record.seeds))
        note = parts.status_line("; ".join(missing) or "the picture's request is restored: press Compare")
        settings = (record.num_inference_steps, _as_typed(record.guidance_scale), record.negative_prompt)
        size = written_size(record.width, record.height)
        return record.prompts[0], seeds, *adapters, *settings, size, record.partial, note, parts.panel(None)

    def sweep_size(
        self,
        prompts: str,
        seeds: str,
        strengths: str,
        first: str | None,
        second: str | None,
        steps: int,
        guidance: str,
        negative_prompt: str,
        size: str,
        partial: bool,
        page: gr.Request,
    ) -> str:
        """How many pictures a sweep is, and how long it takes."""
        visitor = visitor_of(page)
        keys = [key for key in self._filled((first, second), visitor) if key]
        try:
            more = (steps, guidance, negative_prompt, size, partial)
            request, _ = sweep_of(self.studio, visitor, prompts, seeds, strengths, keys, *more)
        except DoraDiffusionError as error:
            return parts.status_line(parts.said(error))
        return parts.status_line(f"{request.pictures} pictures, {self._time(request)}")

    def _time(self, request: CompareRequest) -> str:
        ready()
        from dora_diffusion.console import clock

        seconds = self.studio.painter.seconds_for(request.pictures, request.num_inference_steps)
        return f"about {clock(seconds)}" if seconds else "time not measured yet"


def _mark(shown: Shown, names: list[str]) -> str:
    """In words, that these settings are others than those of the pictures."""
    if not names:
        return SWEEP if shown.is_sweep else ""
    listed = ", ".join(names)
    if shown.is_example:
        return f"The form asks for other pictures than this example ({listed}): press Compare to draw them."
    button = "Draw the sweep" if shown.is_sweep else "Compare"
    return f"Settings changed ({listed}): these pictures show the earlier ones. Press {button} to draw anew."


def _as_typed(guidance: float | None) -> str:
    return "" if guidance is None else written_number(guidance)


def _skips(count: int) -> tuple[object, ...]:
    return (gr.skip(),) * count
