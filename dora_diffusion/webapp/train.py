"""The Train tab: pictures in, a LoRA and a DoRA out.

The form belongs to the page; the job belongs to the server, and every page of its visitor shows it (watch.py).
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dora_diffusion.data.folder import smallest_side
from dora_diffusion.errors import DataError, DoraDiffusionError
from dora_diffusion.outputs import copy_file, make_folder
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.lengths import refuse_long, too_long
from dora_diffusion.webapp.runs import START
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train_form import PRESETS, Costing, Pictures, TrainForm, checks
from dora_diffusion.webapp.train_layout import HEADERS, NEW, TrainLayout, kinds, norm_axes
from dora_diffusion.webapp.uploads import (
    Sent,
    Upload,
    check_pictures,
    chosen,
    duplicates,
    put_into,
    sort_files,
    thumbnail,
)
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["TrainTab", "start_run"]

Update = tuple[object, ...]
Table = list[list[str]]  # as it comes from the page


class TrainTab:
    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.layout = TrainLayout()
        self.costing = Costing(studio)

    def build(self) -> None:
        page = self.layout
        page.build()
        pictures = [page.uploads, page.table, page.found, page.error]
        state = [page.table, page.found, *page.settings]
        start = [page.checks, page.go]
        for came in (
            page.files.upload(
                self.take_dropped,
                page.files,
                [page.files, *pictures],
                show_progress="minimal",
                api_visibility="private",
            ),
            page.folder.upload(
                self.take_pictures, page.folder, pictures, show_progress="minimal", api_visibility="private"
            ),
            page.samples.click(self.take_samples, None, pictures, **parts.QUIET),
        ):
            checked = came.then(self.check, state, start, **parts.QUIET)
            measured = checked.then(self.measure, [page.uploads, *state], None, **parts.QUIET)
            measured.then(self.check, state, start, **parts.QUIET)  # with the form as it is by then
        chosen = [page.steps, page.rank, page.batch, page.rate, page.more]
        page.preset.input(self.choose, page.preset, chosen, **parts.QUIET)
        # A list that was filled an hour ago would lack what was trained since.
        page.start.focus(self.starts, page.start, page.start, queue=False, **parts.QUIET)
        plain = [page.table, page.prompt, page.steps, page.start, page.rate, page.preview, page.seed, page.keep]
        plain += [page.factor]
        gr.on([field.change for field in plain], self.check, state, start, **parts.LATEST)
        costly = [field.change for field in (page.kind, page.rank, page.batch, page.more, page.norm_axis)]
        costly += [field.change for field in (page.parametrisation, page.full_matrix)]
        page.parametrisation.change(
            self.parametrise, page.parametrisation, [page.kind, page.norm_axis, page.lokr], queue=False, **parts.QUIET
        )
        changed = gr.on(costly, self.check, state, start, **parts.LATEST)
        measured = changed.then(self.measure, [page.uploads, *state], None, **parts.QUIET)
        measured.then(self.check, state, start, **parts.QUIET)
        self.started = page.go.click(
            self.start, [page.uploads, page.table, *page.settings], [page.error, page.go], **parts.QUIET
        )
        page.halt.click(self.stop, None, page.halt, queue=False, **parts.QUIET)
        self.resumed = page.resume.click(self.resume, page.seen, [page.error, page.resume], **parts.QUIET)

    def take_dropped(self, files: list[str] | None) -> Update:
        """As take_pictures; the table shows what was dropped, and the drop zone is free for another choice."""
        return None, *self.take_pictures(files)

    def take_pictures(self, files: list[str] | None) -> Update:
        """What was uploaded: the files, the caption table, what was found out about them, and the error panel."""
        found, table, error = Pictures(), [], None
        paths = [Path(file) for file in files or ()]
        try:
            sent = sort_files(paths)
            table = [[_picture_tag(upload), upload.label, upload.caption] for upload in sent.uploads]
            found = self._look_over(sent)
            if found.bad:
                raise DataError(f"{found.trouble}\nReplace them, or delete their rows from the table.")
        except DoraDiffusionError as problem:
            parts.toast(problem)
            error = problem
            found = found if found.bad else Pictures(str(problem))
        return [str(path) for path in paths], gr.update(value=table, visible=bool(table)), found, parts.panel(error)

    def _look_over(self, sent: Sent) -> Pictures:
        """What is found out about the pictures once, so that they are not decoded again for every key."""
        bad, notes = check_pictures(sent.uploads, smallest_side(self.studio.painter.size or 0))
        labels = tuple(upload.label for upload in sent.uploads)
        return Pictures("", labels, tuple(bad.items()), duplicates(sent.uploads), (*sent.problems, *sent.notes, *notes))

    def take_samples(self) -> Update:
        """The pictures that come with the package, as if they had been uploaded."""
        ready()
        from dora_diffusion.demo import sample_folder

        try:
            files = [path for path in sorted(sample_folder().iterdir()) if path.suffix in (".png", ".txt")]
        except DoraDiffusionError as error:
            return gr.skip(), gr.skip(), gr.skip(), parts.panel(error)
        return self.take_pictures([str(path) for path in files])

    def choose(self, preset: str) -> Update:
        chosen = PRESETS[preset]
        return chosen.steps, chosen.rank, chosen.batch_size, chosen.rate, list(chosen.more)

    def parametrise(self, parametrisation: str) -> Update:
        """What is trained as it is called then, and LoKr's own fields where they count."""
        names = gr.update(choices=kinds(parametrisation)), gr.update(choices=norm_axes(parametrisation))
        return *names, gr.update(visible=parametrisation == "lokr")

    def starts(self, chosen: str | None, page: gr.Request) -> object:
        """The adapters that can be gone on from."""
        return parts.adapter_choices(self.studio.shelf.all(visitor_of(page)), chosen, NEW)

    def check(self, page: gr.Request, table: Table, found: Pictures, *settings: Any) -> Update:
        """The checklist, and whether Train can be pressed."""
        form = TrainForm(*settings)
        rows = rows_of(table)
        long = too_long(self.studio, [*(caption for _, caption in rows), form.prompt, form.preview]) if rows else {}
        lines = checks(rows, form, found, self.costing.of(form), long, self.studio.cautions())
        job = self.studio.jobs.of(visitor_of(page))
        busy = job is not None and not job.snapshot().is_over
        ready = all(good is not False for good in lines.values())
        return parts.checklist(lines), gr.skip() if busy else gr.update(interactive=ready)

    def measure(self, files: list[str], table: Table, found: Pictures, *settings: Any) -> None:
        """Find out what a run like this costs, if that is not known; what cannot be measured is left out."""
        form = TrainForm(*settings)
        bad = dict(found.bad)
        if found.refused or not files or self.costing.of(form) is not None:
            return
        with contextlib.suppress(DoraDiffusionError):  # the start will say it, in the panel
            uploads = chosen(sort_files([Path(file) for file in files]).uploads, rows_of(table))
            self.costing.measure(form, [upload for upload in uploads if upload.label not in bad])

    def start(self, page: gr.Request, files: list[str], table: Table, *settings: Any) -> Update:
        """Start the job; what is wrong goes into the error panel and leaves the form as it is."""
        try:
            uploads = chosen(sort_files([Path(file) for file in files or ()]).uploads, rows_of(table))
            start_run(self.studio, visitor_of(page), uploads, TrainForm(*settings))  # type: ignore[arg-type]
        except DoraDiffusionError as error:
            parts.toast(error)
            return parts.panel(error), gr.skip()
        return parts.panel(None), gr.update(visible=False)

    def stop(self, page: gr.Request) -> object:
        self.studio.jobs.stop(visitor_of(page))
        return gr.update(value="Stopping…", interactive=False)

    def resume(self, seen: Sequence[object], page: gr.Request) -> Update:
        """Go on with the run that the page shows."""
        try:
            self.studio.resume(str(seen[0]) if seen else "", visitor_of(page))
        except DoraDiffusionError as error:
            parts.toast(error)
            return parts.panel(error), gr.skip()
        return parts.panel(None), gr.update(visible=False)


def start_run(studio: Studio, visitor: str, uploads: Sequence[Upload], form: TrainForm) -> None:
    """Copy the pictures into a run's own folder and start it. Raises DoraDiffusionError and leaves nothing behind."""
    studio.jobs.refuse_if_busy(visitor)
    if not uploads:
        raise DataError("there are no pictures. Add at least one; 10 to 20 of one style work well.")
    folder = studio.runs.new(visitor)
    try:
        long = refuse_long(studio, uploads, form)
        captions = [each for upload in uploads if (each := upload.caption.strip()) and each not in long]
        start = _copy_start(studio.shelf.find(form.start, visitor).path, form.kind, folder) if form.start else None
        config = form.config(folder / "images", folder, studio.base_name, captions, start)
        put_into(folder / "images", uploads, form.prompt, smallest_side(studio.painter.size or 0))
        studio.jobs.start(folder.name, config, visitor, studio.albums.new())
    except DoraDiffusionError:
        shutil.rmtree(folder, ignore_errors=True)  # it holds nothing but copies
        raise


def _copy_start(path: Path, kind: str, run: Path) -> Path:
    """Keep with the run what it goes on from: a file, or for twins a folder with both, where the file has its twin."""
    folder = make_folder(run / START)
    twins = {each: path.with_name(re.sub("^(lora|dora)", each, path.name)) for each in ("lora", "dora")}
    if kind == "both" and len(set(twins.values())) == 2 and all(twin.is_file() for twin in twins.values()):
        for each, twin in twins.items():
            copy_file(twin, folder / f"{each}.safetensors")
        return folder
    return copy_file(path, folder / path.name)


def rows_of(table: Sequence[Sequence[object]]) -> list[tuple[str, str]]:
    """Label and caption of the table's rows that hold anything: an empty table comes as one row of nothing."""
    rows = [(str(row[1] or ""), str(row[2] or "")) for row in table if len(row) == len(HEADERS)]
    return [(label, caption) for label, caption in rows if label or caption.strip()]


def _picture_tag(upload: Upload) -> str:
    url = thumbnail(upload.path)
    return f"<img src='{url}' alt=''>" if url else "✕"
