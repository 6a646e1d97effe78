"""The Train tab: pictures in, a LoRA and a DoRA out, with everything to see on the way.

The form belongs to the page; the job belongs to the server, and every page shows it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import gradio as gr

from dora_diffusion.comparison.curves import draw_curves
from dora_diffusion.errors import DataError, DoraDiffusionError, TrainingError
from dora_diffusion.outputs import make_folder
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.compare import CompareTab, toast
from dora_diffusion.webapp.jobs import TrainingJob
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.uploads import (
    ACCEPTED,
    Upload,
    check_pictures,
    put_into,
    read_uploads,
    thumbnail,
    with_captions,
)

__all__ = ["TrainTab"]

KINDS = [("Train both", "both"), ("LoRA", "lora"), ("DoRA", "dora")]
HEADERS = ["", "Picture", "Caption"]
DEFAULT_STEPS = 200
MOST_STEPS = 2000
LOG_TAIL = 8
Update = tuple[object, ...]
Table = list[list[str]]


class TrainTab:
    def __init__(self, studio: Studio, compare: CompareTab) -> None:
        self.studio = studio
        self.compare = compare

    def build(self, chip: gr.HTML, tabs: gr.Tabs) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self._build_form()
            with gr.Column(scale=6, min_width=300):
                self._build_job()
        self._connect(chip, tabs)

    def _build_form(self) -> None:
        self.files = gr.File(
            label="Pictures, and captions as .txt",
            file_count="multiple",
            file_types=ACCEPTED,
            height=150,
            elem_id="pictures",
        )
        self.table = gr.Dataframe(
            headers=HEADERS,
            datatype=["html", "str", "str"],
            type="array",
            column_count=3,
            static_columns=[0, 1],
            column_widths=["64px", "38%", "auto"],
            label="Captions (click one to edit it)",
            max_height=260,
            wrap=True,
            visible=False,
            elem_id="captions",
        )
        self.prompt = gr.Textbox(
            label="Caption of pictures that have none",
            placeholder="such as: openmoji style, or: a photo of sks dog",
            elem_id="instance-prompt",
        )
        self.kind = gr.Radio(KINDS, value="both", label="Adapters", elem_id="kind")
        self.steps = gr.Slider(1, MOST_STEPS, value=DEFAULT_STEPS, step=1, label="Steps of each", elem_id="train-steps")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"), gr.Row():
            self.rank = gr.Slider(1, 128, value=16, step=1, label="Rank", min_width=140, elem_id="rank")
            self.rate = gr.Number(
                None,
                label="Learning rate",
                placeholder="what suits the base",
                step=0.0001,
                min_width=140,
                elem_id="rate",
            )
        self.checks = gr.HTML(parts.checklist(_nothing_yet()), elem_id="checks")
        self.go = gr.Button("Train", variant="primary", interactive=False, elem_id="train")
        self.halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-train")
        self.error = gr.HTML("", visible=False, elem_id="train-error")
        self.trouble = gr.State("")  # what is wrong with the pictures, so that they are decoded once and not per key
        self.seen = gr.State(("", -1))  # the job and its version that this page shows

    def _build_job(self) -> None:
        self.panel = gr.HTML(parts.job_panel(None), elem_id="job")
        self.job_error = gr.HTML("", visible=False, elem_id="job-error")
        self.plot = gr.HTML("", elem_id="curves")
        self.look = gr.Button("Compare these two", visible=False, elem_id="compare-these")
        self.log = gr.Textbox(
            label="Log", lines=LOG_TAIL, max_lines=LOG_TAIL, interactive=False, visible=False, elem_id="log"
        )

    def _connect(self, chip: gr.HTML, tabs: gr.Tabs) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        pictures = [self.table, self.trouble, self.error, self.checks, self.go]
        self.files.change(
            self.take_pictures, [self.files, self.prompt], pictures, show_progress="minimal", api_visibility="private"
        )
        for change in (self.table.change, self.prompt.change):
            change(self.check, [self.table, self.prompt, self.trouble], [self.checks, self.go], **quiet)
        watched = [self.seen, chip, self.panel, self.job_error, self.plot, self.log]
        self.watched = [*watched, self.go, self.halt, self.look, *self.compare.pickers]
        form = [self.files, self.table, self.prompt, self.kind, self.steps, self.rank, self.rate]
        started = self.go.click(self.start, form, [self.error, self.go], **quiet)
        started.then(self.watch, [self.seen, self.trouble, self.table, self.prompt], self.watched, **quiet)
        self.halt.click(self.stop, None, self.halt, queue=False, **quiet)
        self.look.click(lambda: gr.Tabs(selected="compare"), None, tabs, queue=False, **quiet)
        timer = gr.Timer(1.0)
        timer.tick(self.watch, [self.seen, self.trouble, self.table, self.prompt], self.watched, **quiet)

    def take_pictures(self, files: list[str] | None, prompt: str) -> Update:
        """What was uploaded: the caption table, the trouble with the pictures, error, checklist and button."""
        trouble, table, error = "", [], None
        try:
            uploads = read_uploads([Path(file) for file in files or ()])
            table = [[_picture_tag(upload), upload.label, upload.caption] for upload in uploads]
            if uploads:
                check_pictures(uploads)
        except DoraDiffusionError as problem:
            toast(problem)
            trouble, error = str(problem), problem
        shown = gr.update(value=table, visible=bool(table))
        return shown, trouble, _panel(error), *self.check(table, prompt, trouble)

    def check(self, table: Table, prompt: str, trouble: str) -> Update:
        """The checklist and whether Train can be pressed."""
        lines = _checks(_rows(table), prompt, trouble)
        job = self.studio.jobs.last
        if job is not None and not job.snapshot().is_over:
            return gr.skip(), gr.skip()
        return parts.checklist(lines), gr.update(interactive=all(lines.values()))

    def start(
        self, files: list[str] | None, table: Table, prompt: str, kind: str, steps: int, rank: int, rate: float | None
    ) -> Update:
        """Start the job; what is wrong goes into the error panel and leaves the form as it is."""
        try:
            self.studio.jobs.refuse_if_busy()
            uploads = with_captions(
                read_uploads([Path(file) for file in files or ()]), {row[1]: row[2] for row in _rows(table)}
            )
            if not uploads:
                raise DataError("there are no pictures. Add at least one; 10 to 20 of one style work well.")
            name, folder = self._new_run(kind)
            try:
                config = self._config(folder, prompt, kind, steps, rank, rate)
                put_into(folder / "images", uploads, prompt)
                self.studio.jobs.start(name, config)
            except DoraDiffusionError:
                shutil.rmtree(folder, ignore_errors=True)  # it holds nothing but copies
                raise
        except DoraDiffusionError as error:
            toast(error)
            return _panel(error), gr.skip()
        return _panel(None), gr.update(visible=False)

    def _new_run(self, kind: str) -> tuple[str, Path]:
        stem = f"{datetime.now():%Y-%m-%d-%H%M%S}"
        for number in range(1, 1000):
            name = f"{stem}-{number}" if number > 1 else stem
            folder = self.studio.web / name
            if not folder.exists():
                return name, make_folder(folder)
        raise TrainingError("too many runs were started in this second. Try again.")

    def _config(self, folder: Path, prompt: str, kind: str, steps: int, rank: int, rate: float | None) -> TrainConfig:
        values: dict[str, object] = {
            "images": str(folder / "images"),
            "out": str(folder),
            "base": self.studio.base_name,
            "kind": kind,
            "instance_prompt": prompt.strip() or None,
            "steps": int(steps),
            "rank": int(rank),
            "alpha": float(rank),
            "learning_rate": rate or None,
            "validate_every": max(10, int(steps) // 10),
        }
        return TrainConfig.from_values(values, "the form")

    def stop(self) -> object:
        self.studio.jobs.stop()
        return gr.update(value="Stopping…", interactive=False)

    def watch(self, seen: tuple[str, int], trouble: str, table: Table, prompt: str) -> Update:
        """Everything that shows the job, for a page that last saw `seen`; nothing when nothing is new."""
        job = self.studio.jobs.last
        if job is None:
            return (gr.skip(),) * len(self.watched)
        state = job.snapshot()
        now = (job.name, 2 * state.version + state.stopping)
        if tuple(seen) == now:
            return (gr.skip(),) * len(self.watched)
        lines = _checks(_rows(table), prompt, trouble)
        ready = state.is_over and all(lines.values())
        return (
            now,
            parts.chip(state),
            parts.job_panel(state),
            _panel(state.error),
            draw_curves(job.curves, job.config.steps),
            gr.update(value="\n".join(job.log[-LOG_TAIL:]), visible=True),
            gr.update(visible=state.is_over, interactive=ready),
            gr.update(
                visible=not state.is_over,
                value="Stopping…" if state.stopping else "Stop",
                interactive=not state.stopping,
            ),
            gr.update(visible=state.phase == "finished"),
            *self._picked(job),
        )

    def _picked(self, job: TrainingJob) -> Update:
        """The pickers of the Compare tab: what was just trained is chosen there."""
        state = job.snapshot()
        if not state.is_over or not state.adapters:
            return gr.skip(), gr.skip()
        keys = [self.studio.shelf.key_of(path.resolve()) for path in state.adapters]
        if len(keys) == 1:
            return self.compare.choices(keys[0]), gr.skip()
        return self.compare.choices(keys[0]), self.compare.choices(keys[1])


def _nothing_yet() -> dict[str, bool]:
    return {"Add at least one picture; 10 to 20 of one style, or 5 of one subject, work well.": False}


def _checks(rows: Table, prompt: str, trouble: str) -> dict[str, bool]:
    """What must be so before a run can start, in words, and whether it is."""
    if trouble:
        return {trouble: False}
    if not rows:
        return _nothing_yet()
    bare = sum(not row[2].strip() for row in rows)
    lines = {f"{len(rows)} {'picture' if len(rows) == 1 else 'pictures'}, all readable": True}
    if not bare:
        lines["every picture has a caption"] = True
    elif prompt.strip():
        lines[f"{bare} of them with the caption “{prompt.strip()}”"] = True
    else:
        lines[f"{bare} without a caption: write it in the table, or one for all below it"] = False
    return lines


def _rows(table: Sequence[Sequence[object]]) -> Table:
    """The table's rows that hold a picture: an empty table comes as one row of nothing."""
    return [[str(cell or "") for cell in row] for row in table if len(row) == len(HEADERS) and row[1]]


def _picture_tag(upload: Upload) -> str:
    url = thumbnail(upload.path)
    return f"<img src='{url}' alt=''>" if url else "✕"


def _panel(error: DoraDiffusionError | None) -> object:
    return gr.update(value=parts.error_panel(error), visible=error is not None)
