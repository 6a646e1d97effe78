"""What all tabs share: how events are sent, and pieces of HTML, where every text from outside is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

import gradio as gr

from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp.jobs import JobState
from dora_diffusion.webapp.shelf import Shelved
from dora_diffusion.webapp.wording import in_form_words

__all__ = [
    "LATEST",
    "QUIET",
    "adapter_choices",
    "changed",
    "checklist",
    "chip",
    "error_panel",
    "header",
    "job_panel",
    "panel",
    "said",
    "status_line",
    "toast",
    "told",
]

QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# For one listener on several fields: an answer that is late must not overwrite the one to what was typed since.
LATEST = {**QUIET, "trigger_mode": "always_last"}
HEADLINES = {
    "ConfigError": "A setting cannot be used",
    "TargetError": "A setting cannot be used",
    "DataError": "The pictures cannot be used",
    "AdapterFileError": "The adapter cannot be used",
    "AdapterMismatchError": "The adapter does not fit this base",
    "BaseModelError": "The base model cannot be used",
    "PromptError": "The prompt cannot be used",
    "OutputError": "A file cannot be written",
    "QueueFullError": "Too many are waiting",
    "TrainingError": "The training cannot go on",
}
CHIPS = {
    "waiting": "training waits for its turn",
    "preparing": "preparing the training",
    "finished": "training finished",
    "stopped": "training stopped",
    "failed": "training failed",
    "interrupted": "training interrupted",
}
# The way to a visitor's folder, whose name stands for them, and to an upload.
HIDDEN = re.compile(r"[^\s'\"]*/web/(?:visitors/[0-9a-f]{16}|cache/[0-9a-f]{64})/")
MARKS = {True: "dd-ok", False: "dd-bad", None: "dd-hint"}


def told(text: str) -> str:
    """A text as it may leave the server: files below a visitor's folder by what the visitor knows of them."""
    return HIDDEN.sub("", text)


def said(error: DoraDiffusionError) -> str:
    """As told."""
    return told(str(error))


def header(base_name: str, device: str | None) -> str:
    return (
        "<div class='dd-brand'><h1>DoRA Diffusion</h1>"
        f"<p>base <b>{escape(base_name)}</b> · device <b>{escape(device or 'starting')}</b></p></div>"
    )


def chip(state: JobState | None) -> str:
    """The job in a few words; empty when there was none."""
    if state is None:
        return ""
    text = state.text if state.phase == "training" else CHIPS[state.phase]
    if state.stopping:
        text = "stopping after this step"
    return f"<span class='dd-chip dd-{state.phase}' id='job-chip' role='status'>{escape(text)}</span>"


def error_panel(error: DoraDiffusionError | None) -> str:
    """What went wrong, in full; it stays until the next attempt."""
    if error is None:
        return ""
    headline = HEADLINES.get(type(error).__name__, "That did not work")
    return (
        f"<div class='dd-error' role='alert'><b>{headline}</b>"
        f"<pre>{escape(in_form_words(said(error)))}</pre><small>Nothing you entered was lost.</small></div>"
    )


def panel(error: DoraDiffusionError | None) -> object:
    """The update of an error panel."""
    return gr.update(value=error_panel(error), visible=error is not None)


def toast(error: DoraDiffusionError) -> None:
    gr.Warning(escape(in_form_words(said(error)).partition("\n")[0]), title="That did not work")


def adapter_choices(shelved: Sequence[Shelved], chosen: str | None, nothing: tuple[str, str]) -> object:
    """A list to choose from, `nothing` first; what is chosen and no longer there is let go."""
    offered = [nothing, *((each.label, each.key) for each in shelved)]
    return gr.update(choices=offered, value=chosen if chosen in {key for _, key in offered} else "")


def changed(text: str) -> object:
    """The update of the mark on pictures that no longer fit the form; hidden where there is nothing to say."""
    html = f"<p class='dd-changed' role='status'>{escape(text)}</p>" if text else ""
    return gr.update(value=html, visible=bool(text))


def status_line(text: str, busy: bool = False) -> str:
    mark = "<span class='dd-spin' aria-hidden='true'></span>" if busy else ""
    return f"<p class='dd-status' role='status'>{mark}{escape(text)}</p>"


def checklist(lines: Mapping[str, bool | None]) -> str:
    """Each line with whether it is as it must be; None for what is only good to know."""
    if not lines:
        return ""
    items = "".join(
        f"<li class='{MARKS[good]}'>{escape(in_form_words(told(line))).replace(chr(10), '<br>')}</li>"
        for line, good in lines.items()
    )
    return f"<ul class='dd-checks' aria-label='before the start'>{items}</ul>"


def job_panel(state: JobState | None) -> str:
    """How far the job is, or how it ended."""
    if state is None:
        return (
            "<div class='dd-empty'><p>Add pictures and press <b>Train</b>. Loss curves, previews and the time left "
            "show up here, and you may close this page meanwhile.</p></div>"
        )
    text = "stopping: this step is finished and a checkpoint saved" if state.stopping else state.text
    return (
        f"<div class='dd-job dd-{state.phase}'><div class='dd-bar'><i style='width:{100 * state.done:.1f}%'></i></div>"
        f"<p id='job-text' role='status'>{escape(text)}</p></div>"
    )
