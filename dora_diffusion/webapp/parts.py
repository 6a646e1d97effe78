"""The pieces of HTML that the tabs show. Every text from outside is escaped here, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from dora_diffusion.comparison.compare import Cell, CompareRequest
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp.jobs import JobState

__all__ = ["Placed", "checklist", "chip", "empty_state", "error_panel", "grid", "header", "job_panel", "status_line"]

COLUMNS = 3  # base, LoRA, DoRA: always this many, so that nothing moves when an adapter is chosen
HEADLINES = {
    "ConfigError": "A setting cannot be used",
    "TargetError": "A setting cannot be used",
    "DataError": "The pictures cannot be used",
    "AdapterFileError": "The adapter cannot be used",
    "AdapterMismatchError": "The adapter does not fit this base",
    "BaseModelError": "The base model cannot be used",
    "PromptError": "The prompt is too long",
    "OutputError": "A file cannot be written",
    "TrainingError": "The training cannot go on",
}
CHIPS = {
    "preparing": "preparing the training",
    "finished": "training finished",
    "stopped": "training stopped",
    "failed": "training failed",
}


@dataclass(frozen=True)
class Placed:
    """A cell of the comparison and the PNG it was saved as."""

    cell: Cell
    path: Path


def header(base_name: str, device: str) -> str:
    return (
        "<div class='dd-brand'><h1>DoRA Diffusion</h1>"
        f"<p>base <b>{escape(base_name)}</b> · device <b>{escape(device)}</b></p></div>"
    )


def chip(state: JobState | None) -> str:
    """The job in a few words; empty when there was none."""
    if state is None:
        return ""
    text = state.text if state.phase == "training" else CHIPS[state.phase]
    if state.stopping:
        text = "stopping after this step"
    return f"<span class='dd-chip dd-{state.phase}' id='job-chip'>{escape(text)}</span>"


def error_panel(error: DoraDiffusionError | None) -> str:
    """What went wrong, in full; it stays until the next attempt."""
    if error is None:
        return ""
    headline = HEADLINES.get(type(error).__name__, "That did not work")
    return (
        f"<div class='dd-error' role='alert'><b>{headline}</b>"
        f"<pre>{escape(str(error))}</pre><small>Nothing you entered was lost.</small></div>"
    )


def empty_state(has_adapters: bool) -> str:
    if has_adapters:
        return (
            "<div class='dd-empty'><p>Press <b>Compare</b>: the base, the LoRA and the DoRA draw the same prompt from "
            "the same seeds, side by side.</p></div>"
        )
    return (
        "<div class='dd-empty'><p><b>There are no adapters yet.</b> Train a LoRA and a DoRA on your own pictures in "
        "the <b>Train</b> tab, or run <code>dora-diffusion demo</code> in a terminal; they appear here by "
        "themselves.</p></div>"
    )


def status_line(text: str, busy: bool = False) -> str:
    mark = "<span class='dd-spin' aria-hidden='true'></span>" if busy else ""
    return f"<p class='dd-status' role='status'>{mark}{escape(text)}</p>"


def grid(request: CompareRequest, cells: Sequence[Placed], names: Sequence[str], drawing: bool = False) -> str:
    """Three columns, a row for each seed. `names` says below each heading which base or file it is."""
    place = {(placed.cell.row, placed.cell.column): placed for placed in cells}
    parts = []
    for i in range(COLUMNS):
        label = request.columns[i].label if i < len(request.columns) else "–"
        name = names[i] if i < len(names) else "no adapter chosen"
        parts.append(f"<div class='dd-head'><b>{escape(_title(label))}</b><small>{escape(name)}</small></div>")
    for row in range(len(request.rows)):
        for i in range(COLUMNS):
            if i >= len(request.columns):
                parts.append("<div class='dd-cell dd-none'></div>")
            elif (row, i) in place:
                parts.append(_picture(place[row, i], request.columns[i].strength))
            else:
                wait = "dd-next" if drawing and row * len(request.columns) + i == len(cells) else "dd-wait"
                parts.append(f"<figure class='dd-cell'><div class='{wait}'></div></figure>")
    return f"<div class='dd-grid'>{''.join(parts)}</div>"


def _title(label: str) -> str:
    return label[:1].upper() + label[1:]


def _picture(placed: Placed, strength: float) -> str:
    cell = placed.cell
    # Relative, so that it works behind a proxy's path too; the file route asks for the login like the page itself.
    url = "gradio_api/file=" + quote(str(placed.path))
    notes = []
    if cell.column > 0:
        notes.append(f"<span class='dd-diff'>mean |difference| {cell.difference:.1f}</span>")
    if cell.column > 0 and cell.difference == 0:
        why = "strength 0 is the base" if strength == 0 else "this adapter changed nothing"
        notes.append(f"<span class='{'dd-same' if strength == 0 else 'dd-nothing'}'>{why}</span>")
    alt = escape(f"{cell.caption}: {cell.prompt}", quote=True)
    return (
        f"<figure class='dd-cell'><a href='{url}' target='_blank' title='open the PNG'>"
        f"<img src='{url}' alt='{alt}' width='{cell.image.width}' height='{cell.image.height}'></a>"
        f"<figcaption>{escape(cell.caption)}{''.join(notes)}</figcaption></figure>"
    )


def checklist(lines: Mapping[str, bool]) -> str:
    """Each line with whether it is as it must be."""
    if not lines:
        return ""
    items = "".join(
        f"<li class='{'dd-ok' if good else 'dd-bad'}'>{escape(line).replace(chr(10), '<br>')}</li>"
        for line, good in lines.items()
    )
    return f"<ul class='dd-checks' aria-label='before the start'>{items}</ul>"


def job_panel(state: JobState | None) -> str:
    """How far the job is, or how it ended."""
    if state is None:
        return (
            "<div class='dd-empty'><p>Add pictures and press <b>Train</b>. The loss curves and the time left show up "
            "here, and you may close this page meanwhile.</p></div>"
        )
    text = "stopping: this step is finished and a checkpoint saved" if state.stopping else state.text
    return (
        f"<div class='dd-job dd-{state.phase}'><div class='dd-bar'><i style='width:{100 * state.done:.1f}%'></i></div>"
        f"<p id='job-text' role='status'>{escape(text)}</p></div>"
    )
