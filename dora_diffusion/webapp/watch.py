"""What every page of a visitor shows of their training: asked for again and again, and on load."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.comparison.curves import draw_curves, read_curves
from dora_diffusion.errors import TrainingError
from dora_diffusion.screen import shell_line
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.header import Header
from dora_diffusion.webapp.jobs import JobState, TrainingJob, earlier_previews
from dora_diffusion.webapp.pictures import url_of
from dora_diffusion.webapp.runs import Run
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train_layout import LOG_TAIL, TrainLayout
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["Watch"]

Update = tuple[object, ...]


class Watch:
    """Fills `outputs`, in this order: header, job panel, buttons, and the Compare tab's pickers."""

    def __init__(self, studio: Studio, header: Header, train: TrainLayout, compare: CompareTab) -> None:
        self.studio = studio
        self.compare = compare
        self._shown: dict[Path, str] = {}
        self.outputs = [
            train.seen,
            header.brand,
            header.chip,
            header.halt,
            train.panel,
            train.job_error,
            train.plot,
            train.previews,
            train.log,
            train.command,
            train.links,
            train.go,
            train.halt,
            train.look,
            train.resume,
            *compare.pickers,
        ]

    def look(self, seen: Sequence[object], page: gr.Request) -> Update:
        """Everything that is new since the page last asked; nothing when nothing is."""
        visitor = visitor_of(page)
        job = self.studio.jobs.of(visitor)
        if job is not None:
            return self._job(job, seen, page)
        run = next(iter(self.studio.runs.all(visitor)), None) if not seen else None
        device = self.studio.painter.device
        now = (seen[0] if seen else (run.name if run else ""), -1, False, device)
        if tuple(seen) == now:
            return (gr.skip(),) * len(self.outputs)
        rest = self._left_over(run) if run and run.phase != "finished" else (gr.skip(),) * (len(self.outputs) - 2)
        return now, parts.header(self.studio.base_label, device), *rest

    def _job(self, job: TrainingJob, seen: Sequence[object], page: gr.Request) -> Update:
        state = job.snapshot()
        now = (job.name, state.version, state.stopping, self.studio.painter.device)
        if tuple(seen) == now:
            return (gr.skip(),) * len(self.outputs)
        going = not state.is_over
        folder = Path(job.config.out)
        return (
            now,
            parts.header(self.studio.base_name, self.studio.painter.device),
            parts.chip(state),
            _stop_button(state),
            parts.job_panel(state),
            parts.panel(state.error),
            draw_curves(job.curves, job.config.steps, job.config.parametrisation),
            _previews(job.previews, job.config.preview_prompts, job.config.parametrisation),
            gr.update(value=parts.told("\n".join(job.log[-LOG_TAIL:])), visible=True),
            gr.update(value=self._command(folder), visible=True),
            gr.update(value=_config_link(job), visible=True),
            gr.update(visible=not going),
            _stop_button(state),
            gr.update(visible=state.phase == "finished"),
            gr.update(visible=state.phase in ("stopped", "failed")),
            *self._picked(state, page),
        )

    def _left_over(self, run: Run) -> Update:
        """A run of an earlier server that did not finish: how it ended, and the way on."""
        state = JobState(run.name, run.phase, run.text)  # type: ignore[arg-type]
        error = TrainingError(run.error) if run.error else None
        hidden = gr.update(visible=False)
        return (
            parts.chip(state),
            hidden,
            parts.job_panel(state),
            parts.panel(error),
            draw_curves(
                read_curves(run.folder / "log.jsonl"), int(str(run.config.get("steps", 1))), run.parametrisation
            ),
            self._earlier(run),
            gr.skip(),
            gr.update(value=self._command(run.folder), visible=True),
            gr.skip(),
            gr.update(visible=True),
            hidden,
            hidden,
            gr.update(visible=run.can_resume),
            gr.skip(),
            gr.skip(),
        )

    def _earlier(self, run: Run) -> str:
        """The previews of an earlier server's run; copied for the pages once, however often these are loaded."""
        if run.folder not in self._shown:
            found = earlier_previews(run.folder, self.studio.albums.new())
            self._shown[run.folder] = _previews(found, run.config.get("preview_prompts"), run.parametrisation)
        return self._shown[run.folder]

    def _command(self, folder: Path) -> str:
        shown = self.studio.shown_path(folder)
        return shell_line(["dora-diffusion", "train", str(shown / "config.toml"), "--out", f"outputs/{folder.name}"])

    def _picked(self, state: JobState, page: gr.Request) -> Update:
        """The pickers of the Compare tab: what was just trained is chosen there."""
        if not state.is_over or not state.adapters:
            return gr.skip(), gr.skip()
        keys = {path.stem: self.studio.shelf.key_of(path, visitor_of(page)) for path in state.adapters}
        lora, dora = (
            self.compare.choices(keys[kind], page) if kind in keys else gr.skip() for kind in ("lora", "dora")
        )
        return lora, dora


def _stop_button(state: JobState) -> object:
    return gr.update(
        visible=not state.is_over,
        value="Stopping…" if state.stopping else "Stop",
        interactive=not state.stopping,
    )


def _previews(previews: Sequence[tuple[str, int, Path]], prompts: object, parametrisation: str) -> str:
    """A row for each kind, oldest first; all drawn from the same seed."""
    if not previews or not isinstance(prompts, list) or not prompts:
        return ""
    rows = []
    for kind in ("lora", "dora"):
        pictures = "".join(
            f"<figure><img src='{url_of(path)}' alt='after {step} steps'><figcaption>{step}</figcaption></figure>"
            for made, step, path in previews
            if made == kind
        )
        label = adapter_label(kind, parametrisation)
        rows.append(f"<div class='dd-strip'><b>{label}</b>{pictures}</div>" if pictures else "")
    prompt = escape(str(prompts[0]))
    return f"<div class='dd-previews'><p>“{prompt}”, the same seed, after so many steps</p>{''.join(rows)}</div>"


def _config_link(job: TrainingJob) -> str:
    if job.config_file is None:
        return ""
    link = f"<a class='dd-link' href='{url_of(job.config_file)}' download='config.toml'>Download config</a>"
    return f"<div class='dd-links'>{link}</div>"
