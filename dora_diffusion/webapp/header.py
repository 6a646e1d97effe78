"""The line above the tabs: what is drawn with, and how the training goes, with its Stop."""

from __future__ import annotations

import gradio as gr

from dora_diffusion.webapp import parts
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["Header"]


class Header:
    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def build(self) -> None:
        with gr.Row(elem_id="top"):
            self.brand = gr.HTML(parts.header(self.studio.base_label, None), elem_id="brand")
            self.chip = gr.HTML("", elem_id="chip", elem_classes="dd-right")
            self.halt = gr.Button("Stop", variant="stop", size="sm", visible=False, scale=0, elem_id="stop-job")
        self.halt.click(self.stop, None, self.halt, queue=False, show_progress="hidden", api_visibility="private")

    def stop(self, page: gr.Request) -> object:
        self.studio.jobs.stop(visitor_of(page))
        return gr.update(value="Stopping…", interactive=False)
