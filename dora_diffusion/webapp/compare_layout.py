"""Where things stand on the Compare tab; compare.py says what they do."""

from __future__ import annotations

import gradio as gr

from dora_diffusion.webapp import cells, parts
from dora_diffusion.webapp.blind import BlindVote
from dora_diffusion.webapp.forms import MOST_STEPS
from dora_diffusion.webapp.shown import Shown
from dora_diffusion.webapp.views import GRID, VIEWS, chosen_pair, pairs_of
from dora_diffusion.webapp.wording import LOAD_WHAT_FITS

__all__ = ["CompareLayout"]

EMPTY = (
    "<div class='dd-empty'><p>Choose an adapter, write a prompt and press <b>Compare</b>: the base and the adapter "
    "draw it from the same seeds, side by side.</p></div>"
)


class CompareLayout:
    """Builds the components inside the tab and keeps them by name."""

    def __init__(self, example: Shown | None) -> None:
        self.example = example

    def build(self) -> None:
        self._build_form()
        with gr.Row(elem_id="compare-actions"):
            self.go = gr.Button("Compare", variant="primary", elem_id="compare", scale=3, min_width=200)
            self.halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-compare", scale=3, min_width=200)
            self.view = gr.Radio(
                list(VIEWS), value=GRID, label="View", show_label=False, elem_id="view", scale=4, min_width=280
            )
        pairs = list(pairs_of(self.example)) if self.example else []
        self.pair = gr.Dropdown(
            pairs,
            value=chosen_pair(self.example, "") if self.example else None,
            label="Pictures under the handle",
            visible=False,
            elem_id="pair",
        )
        self.status = gr.HTML(parts.status_line(""), elem_id="compare-status")
        self.error = gr.HTML("", visible=False, elem_id="compare-error")
        self.shown = gr.State(self.example)
        self.votes = BlindVote()
        blind = self.votes.build()
        self.changed = gr.HTML("", visible=False, elem_id="changed")
        self.grid = gr.HTML(cells.grid(self.example) if self.example else EMPTY, elem_id="grid")
        with gr.Column(elem_id="taken-away") as taken_away:  # out of sight, and of the page, during a blind vote
            self.links = gr.HTML("", visible=False, elem_id="links")
            self.command = gr.Textbox(
                label="The same in a terminal",
                visible=False,
                interactive=False,
                lines=1,
                max_lines=4,
                buttons=["copy"],
                elem_id="command",
            )
        self.look_shown = [self.grid, self.pair, blind, taken_away]
        self._build_more()
        self.form = [self.prompt, self.seeds, self.pickers[0], self.strengths[0], self.pickers[1], self.strengths[1]]
        self.form += [self.steps, self.guidance, self.negative, self.size, self.partial, self.view, self.pair]
        self.restored = [*self.form[:11], self.status, self.error]
        self.asked = [*self.form[:11], *self.sweep_form[:3]]  # all that decides pictures

    def _build_form(self) -> None:
        request = self.example.request if self.example else None
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                request.prompts[0] if request else "",
                label="Prompt",
                placeholder="what to draw",
                scale=4,
                min_width=260,
                max_lines=3,
                elem_id="prompt",
            )
            seeds = ", ".join(map(str, request.seeds)) if request else "1, 2"
            self.seeds = gr.Textbox(seeds, label="Seeds", scale=1, min_width=110, elem_id="seeds")
        with gr.Row():
            first, second = self._adapter("LoRA", "first", 1), self._adapter("DoRA", "second", 2)
        self.pickers, self.strengths = (first[0], second[0]), (first[1], second[1])
        self.uploads, self.cards = (first[2], second[2]), (first[3], second[3])
        self.partial = gr.Checkbox(
            False,
            label=LOAD_WHAT_FITS,
            info="where one has layers or keys that this base or this program does not take; the rest is named",
            elem_id="partial",
        )
        with gr.Accordion("Steps, guidance, size, negative prompt", open=False, elem_id="settings"), gr.Row():
            self.steps = gr.Slider(
                1, MOST_STEPS, value=25, step=1, label="Steps", scale=2, min_width=200, elem_id="steps"
            )
            # No number field: an empty one in a closed part of the page comes back as 0.
            self.guidance = gr.Textbox(
                "", label="Guidance", placeholder="the base's own", min_width=140, elem_id="guidance"
            )
            self.size = gr.Textbox("", label="Size", placeholder="the base's own", min_width=140, elem_id="size")
            self.negative = gr.Textbox("", label="Negative prompt", scale=3, min_width=200, elem_id="negative")

    def _adapter(self, label: str, name: str, column: int) -> tuple[gr.Dropdown, gr.Slider, gr.UploadButton, gr.HTML]:
        at = self.example.request.columns[column].strength if self.example else 1
        with gr.Column(elem_classes="dd-adapter", min_width=290):
            picker = gr.Dropdown([("none", "")], value=None, label=label, elem_id=f"{name}-adapter")
            strength = gr.Slider(0, 1.5, value=at, step=0.05, label=f"{label} strength", elem_id=f"{name}-strength")
            with gr.Row(equal_height=True, elem_classes="dd-under"):
                card = gr.HTML("<p class='dd-card'></p>", elem_id=f"{name}-card", scale=3, min_width=120)
                upload = gr.UploadButton(
                    "Upload a file",
                    file_types=[".safetensors"],
                    size="sm",
                    scale=0,
                    min_width=120,
                    elem_id=f"{name}-upload",
                )
        return picker, strength, upload, card

    def _build_more(self) -> None:
        with gr.Accordion("Sweep: prompts × seeds × strengths", open=False, elem_id="sweep") as self.sweeps:
            with gr.Row():
                prompts = gr.Textbox(
                    "panda, openmoji style\ntulip, openmoji style" if self.example else "",
                    label="Prompts, one on each line",
                    lines=3,
                    max_lines=8,
                    scale=3,
                    min_width=260,
                    elem_id="sweep-prompts",
                )
                with gr.Column(scale=2, min_width=220):
                    seeds = gr.Textbox("1, 2", label="Seeds", elem_id="sweep-seeds")
                    strengths = gr.Textbox("0.5, 1, 1.5", label="Strengths", elem_id="sweep-strengths")
            self.sweep_note = gr.HTML(parts.status_line(""), elem_id="sweep-note")
            self.sweep_go = gr.Button("Draw the sweep", elem_id="sweep-go")
        self.sweep_form = [
            prompts,
            seeds,
            strengths,
            *self.pickers,
            self.steps,
            self.guidance,
            self.negative,
            self.size,
            self.partial,
        ]
        with gr.Accordion("Adapter cards", open=False, elem_id="facts") as self.facts:
            self.facts_shown = gr.HTML("", elem_id="facts-shown")
            self.look_inside = gr.Button("What they changed, and what other programs make of them", elem_id="inside")
            self.inside = gr.HTML("", elem_id="inside-shown")
        with gr.Accordion("Restore from a picture", open=False, elem_id="restore"):
            self.restore = gr.File(
                label="A PNG that was saved here", file_types=[".png"], height=120, elem_id="restore-file"
            )
