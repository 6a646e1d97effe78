"""The History tab: a visitor's runs, what they did differently, and going on with, sharing or deleting them."""

from __future__ import annotations

from html import escape

import gradio as gr

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.comparison.curves import draw_curves, read_curves
from dora_diffusion.errors import DoraDiffusionError, TrainingError
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.runs import Run, started_by
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train import TrainTab
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["HistoryTab"]

MOST_LISTED = 60
KINDS = {"both": ("lora", "dora"), "lora": ("lora",), "dora": ("dora",)}
EMPTY = "<div class='dd-empty'><p>There are no runs yet.</p></div>"
Update = tuple[object, ...]


class HistoryTab:
    def __init__(self, studio: Studio, compare: CompareTab, train: TrainTab) -> None:
        self.studio = studio
        self.compare = compare
        self.train = train

    def build(self) -> None:
        self.empty = gr.HTML(EMPTY, elem_id="no-runs")
        self.to_train = gr.Button("Train one", elem_id="to-train")
        with gr.Column(visible=False, elem_id="runs-there") as self.there:
            with gr.Row():
                self.run = gr.Dropdown([], label="Run", min_width=260, elem_id="run")
                self.other = gr.Dropdown([], label="Compared with", min_width=260, elem_id="other-run")
            self.facts = gr.HTML("", elem_id="run-facts")
            with gr.Row():
                self.look = gr.Button("Compare its adapters", elem_id="run-compare")
                self.train_on = gr.Button("Train on", elem_id="run-train-on")
                self.resume = gr.Button("Resume", elem_id="run-resume")
                self.share = gr.Button("Share", elem_id="run-share")
                self.delete = gr.Button("Delete", variant="stop", elem_id="run-delete")
            with gr.Row(visible=False, elem_id="run-sure") as self.sure:
                self.really = gr.Button("Delete it for good", variant="stop", elem_id="run-really")
                self.keep = gr.Button("Keep it", elem_id="run-keep")
        self.error = gr.HTML("", visible=False, elem_id="history-error")

    def connect(self, tab: gr.Tab, tabs: gr.Tabs) -> None:
        listed = [self.empty, self.to_train, self.there, self.run, self.other]
        shown = [self.facts, self.look, self.train_on, self.resume, self.share, self.sure, self.error]
        tab.select(self.list, self.run, listed, **parts.QUIET).then(
            self.show, [self.run, self.other], shown, **parts.QUIET
        )
        for choice in (self.run, self.other):
            choice.input(self.show, [self.run, self.other], shown, **parts.QUIET)
        self.to_train.click(lambda: gr.Tabs(selected="train"), None, tabs, queue=False, **parts.QUIET)
        self.delete.click(lambda: gr.update(visible=True), None, self.sure, queue=False, **parts.QUIET)
        self.keep.click(lambda: gr.update(visible=False), None, self.sure, queue=False, **parts.QUIET)
        for button, do in ((self.really, self.remove), (self.share, self.toggle_share)):
            done = button.click(do, self.run, self.error, **parts.QUIET)
            done.then(self.list, self.run, listed, **parts.QUIET).then(
                self.show, [self.run, self.other], shown, **parts.QUIET
            )
        self.look.click(self.choose, self.run, [*self.compare.pickers, tabs], **parts.QUIET)
        start = self.train.layout.start
        self.train_on.click(self.choose_start, self.run, [start, tabs], **parts.QUIET)
        self.resumed = self.resume.click(self.go_on, self.run, [self.error, tabs], **parts.QUIET)

    def list(self, chosen: str | None, page: gr.Request) -> Update:
        runs = self.studio.runs.all(visitor_of(page))[:MOST_LISTED]
        offered = [(_title(run), run.name) for run in runs]
        names = [run.name for run in runs]
        first = chosen if chosen in names else next(iter(names), None)
        before = names[names.index(first) + 1] if first and names.index(first) + 1 < len(names) else None
        return (
            gr.update(visible=not runs),
            gr.update(visible=not runs),
            gr.update(visible=bool(runs)),
            gr.update(choices=offered, value=first),
            gr.update(choices=[("no other run", ""), *offered], value=before or ""),
        )

    def show(self, name: str | None, other: str | None, page: gr.Request) -> Update:
        """The facts of a run, and which buttons make sense for it."""
        hidden = gr.update(visible=False)
        if not name:
            return "", hidden, hidden, hidden, hidden, hidden, gr.skip()
        try:
            run = self.studio.runs.find(name, visitor_of(page))
            compared = self.studio.runs.find(other, visitor_of(page)) if other and other != name else None
        except DoraDiffusionError as error:
            return "", hidden, hidden, hidden, hidden, hidden, parts.panel(error)
        job = self.studio.jobs.of(visitor_of(page))
        going = job is not None and job.name == name and not job.snapshot().is_over
        return (
            _facts(run, compared, job.snapshot().text if going and job else run.text),
            gr.update(visible=bool(run.adapters)),
            gr.update(visible=bool(run.adapters)),
            gr.update(visible=run.can_resume and not going),
            gr.update(visible=bool(run.adapters), value="Stop sharing" if run.is_shared else "Share"),
            hidden,
            parts.panel(None),
        )

    def remove(self, name: str, page: gr.Request) -> object:
        try:
            job = self.studio.jobs.of(visitor_of(page))
            if job is not None and job.name == name and not job.snapshot().is_over:
                raise TrainingError("this run is still going on. Stop it first, then delete it.")
            self.studio.runs.delete(name, visitor_of(page))
        except DoraDiffusionError as error:
            return parts.panel(error)
        return parts.panel(None)

    def toggle_share(self, name: str, page: gr.Request) -> object:
        try:
            run = self.studio.runs.find(name, visitor_of(page))
            self.studio.runs.share(name, visitor_of(page), not run.is_shared)
        except DoraDiffusionError as error:
            return parts.panel(error)
        return parts.panel(None)

    def choose(self, name: str, page: gr.Request) -> Update:
        """The run's adapters in the Compare tab."""
        try:
            adapters = self.studio.runs.find(name, visitor_of(page)).adapters
        except DoraDiffusionError as error:
            parts.toast(error)
            return gr.skip(), gr.skip(), gr.skip()
        keys = {path.stem: self.studio.shelf.key_of(path, visitor_of(page)) for path in adapters}
        return *(self.compare.choices(keys.get(kind, ""), page) for kind in ("lora", "dora")), gr.Tabs(
            selected="compare"
        )

    def choose_start(self, name: str, page: gr.Request) -> Update:
        """The run's adapter, and with it its twin, as what the Train tab goes on from."""
        try:
            adapters = self.studio.runs.find(name, visitor_of(page)).adapters
        except DoraDiffusionError as error:
            parts.toast(error)
            return gr.skip(), gr.skip()
        key = self.studio.shelf.key_of(adapters[-1], visitor_of(page)) if adapters else ""
        return self.train.starts(key, page), gr.Tabs(selected="train")

    def go_on(self, name: str, page: gr.Request) -> Update:
        try:
            self.studio.resume(name, visitor_of(page))
        except DoraDiffusionError as error:
            parts.toast(error)
            return parts.panel(error), gr.skip()
        return parts.panel(None), gr.Tabs(selected="train")


def _title(run: Run) -> str:
    kinds = KINDS.get(str(run.config.get("kind")), ())
    kind = " and ".join(adapter_label(each, run.parametrisation) for each in kinds)
    return f"{started_by(run.name)} · {kind} · {run.config.get('steps', '?')} steps · {run.phase}"


def _facts(run: Run, other: Run | None, text: str) -> str:
    curves = draw_curves(
        read_curves(run.folder / "log.jsonl"), int(str(run.config.get("steps", 1))), run.parametrisation
    )
    error = parts.error_panel(TrainingError(run.error)) if run.error else ""
    shared = " · shared with everybody on this server" if run.is_shared else ""
    status = f"<p class='dd-lead dd-run-{run.phase}'><b>{escape(text)}</b>{shared}</p>"
    return status + error + curves + (_differences(run, other) if other else "")


def _differences(run: Run, other: Run) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(key)}</th><td>{_value(ours)}</td><td>{_value(theirs)}</td></tr>"
        for key, (ours, theirs) in run.differences(other).items()
    )
    if not rows:
        return "<p class='dd-lead'>Both runs have the same configuration.</p>"
    when = started_by(other.name)
    head = f"<tr><th scope='col'>setting</th><th scope='col'>this run</th><th scope='col'>{when}</th></tr>"
    return (
        "<div class='dd-facts dd-scroll' tabindex='0' role='region' aria-label='different settings'>"
        f"<table>{head}{rows}</table></div>"
    )


def _value(value: object) -> str:
    return "–" if value is None else escape(str(value))
