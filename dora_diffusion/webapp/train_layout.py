"""Where things stand on the Train tab; train.py says what they do."""

from __future__ import annotations

import gradio as gr

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.train_form import (
    DEFAULT,
    MOST_BATCH,
    MOST_RANK,
    MOST_STEPS,
    NORM_AXES,
    NORM_AXES_OF_FORMS,
    PARAMETRISATIONS,
    PRESETS,
    Pictures,
    TrainForm,
    checks,
)
from dora_diffusion.webapp.uploads import ACCEPTED
from dora_diffusion.webapp.wording import MORE

__all__ = ["LOG_TAIL", "NEW", "TrainLayout", "kinds", "norm_axes"]

NEW = ("a new adapter", "")
HEADERS = ["", "Picture", "Caption"]
LOG_TAIL = 8


def kinds(parametrisation: str = "lora") -> list[tuple[str, str]]:
    """What can be trained, as it is called in this parametrisation."""
    return [("Train both", "both"), *((adapter_label(kind, parametrisation), kind) for kind in ("lora", "dora"))]


def norm_axes(parametrisation: str = "lora") -> list[tuple[str, str]]:
    """DoRA's norms, each with the programs that compute it so."""
    axes = NORM_AXES if parametrisation == "lora" else NORM_AXES_OF_FORMS
    return [(says, axis) for axis, says in axes.items()]


class TrainLayout:
    """Builds the components inside the tab and keeps them by name."""

    def build(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self._build_pictures()
                self._build_form()
            with gr.Column(scale=6, min_width=300):
                self._build_start()
                self._build_job()
        adapter = [self.prompt, self.kind, self.steps, self.rank, self.batch]
        self.settings = [*adapter, self.rate, self.preview, self.seed, self.more, self.norm_axis, self.start, self.keep]
        self.settings += [self.parametrisation, self.factor, self.full_matrix]

    def _build_pictures(self) -> None:
        self.files = gr.File(
            label="Pictures, and captions as .txt, .caption or metadata.jsonl",
            file_count="multiple",
            file_types=ACCEPTED,
            height=130,
            elem_id="pictures",
        )
        with gr.Row(equal_height=True):
            self.folder = gr.UploadButton(
                "Add a folder", file_count="directory", size="sm", min_width=120, elem_id="folder"
            )
            self.samples = gr.Button("Use the sample pictures", size="sm", min_width=160, elem_id="samples")
        self.table = gr.Dataframe(
            headers=HEADERS,
            datatype=["html", "str", "str"],
            type="array",
            column_count=3,
            static_columns=[0, 1],
            column_widths=["64px", "38%", "auto"],
            label="Captions (click one to edit it; a picture whose row is deleted is not trained on)",
            max_height=280,
            wrap=True,
            visible=False,
            elem_id="captions",
        )

    def _build_form(self) -> None:
        preset = PRESETS[DEFAULT]
        self.prompt = gr.Textbox(
            "",
            label="Caption of pictures that have none",
            placeholder="such as: openmoji style, or: a photo of sks dog",
            elem_id="instance-prompt",
        )
        self.kind = gr.Radio(
            kinds(),
            value="both",
            label="Adapters",
            info="Both: the same pictures, noise and order for each",
            elem_id="kind",
        )
        says = "; ".join(f"{name}: {each.says}" for name, each in PRESETS.items())
        self.preset = gr.Radio(list(PRESETS), value=DEFAULT, label="Preset", info=says, elem_id="preset")
        self.steps = gr.Slider(1, MOST_STEPS, value=preset.steps, step=1, label="Steps of each", elem_id="train-steps")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            says = " ".join(f"{name}: {what}" for name, what in PARAMETRISATIONS.values())
            self.parametrisation = gr.Radio(
                [(name, key) for key, (name, _) in PARAMETRISATIONS.items()],
                value="lora",
                label="Parametrisation",
                info=says,
                elem_id="parametrisation",
            )
            with gr.Row(visible=False, elem_id="lokr") as self.lokr:
                self.factor = gr.Textbox(
                    "",
                    label="Factor",
                    placeholder="as square as can be",
                    info="A larger one makes a smaller file",
                    min_width=140,
                    elem_id="factor",
                )
                self.full_matrix = gr.Checkbox(
                    False,
                    label="Whole",
                    info="Full dimension: the larger matrix whole, whatever the rank",
                    min_width=140,
                    elem_id="full-matrix",
                )
            with gr.Row():
                self.rank = gr.Slider(
                    1, MOST_RANK, value=preset.rank, step=1, label="Rank", min_width=160, elem_id="rank"
                )
                self.batch = gr.Slider(
                    1, MOST_BATCH, value=preset.batch_size, step=1, label="Batch size", min_width=160, elem_id="batch"
                )
            with gr.Row():
                # No number field: an empty one in a closed part of the page comes back as 0.
                self.rate = gr.Textbox(
                    "", label="Learning rate", placeholder="what suits the base", min_width=140, elem_id="rate"
                )
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="train-seed")
            self.more = gr.CheckboxGroup(
                [(says, key) for key, says in MORE.items()], value=list(preset.more), label="And", elem_id="more"
            )
            self.norm_axis = gr.Radio(
                norm_axes(),
                value="output",
                label="DoRA's norm, and the programs that compute it so",
                elem_id="norm-axis",
            )
            self.start = gr.Dropdown(
                [NEW],
                value="",
                label="Go on from",
                info="Its rank, layers and parametrisation are kept. A LoRA may go on as a DoRA.",
                elem_id="start-from",
            )
            self.keep = gr.Checkbox(False, label="Keep the adapters on the way, to choose from", elem_id="keep")
            self.preview = gr.Textbox(
                "", label="Preview prompt", placeholder="the first picture's caption", elem_id="preview-prompt"
            )

    def _build_start(self) -> None:
        self.checks = gr.HTML(parts.checklist(checks([], TrainForm(), Pictures(), None)), elem_id="checks")
        self.go = gr.Button("Train", variant="primary", interactive=False, elem_id="train")
        self.halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-train")
        self.error = gr.HTML("", visible=False, elem_id="train-error")
        self.uploads = gr.State([])  # the pictures' files, from wherever they came
        self.found = gr.State(Pictures())  # so that they are decoded once and not per key
        self.seen = gr.State(())  # what this page shows of the job

    def _build_job(self) -> None:
        self.panel = gr.HTML(parts.job_panel(None), elem_id="job")
        self.job_error = gr.HTML("", visible=False, elem_id="job-error")
        with gr.Row():
            self.look = gr.Button("Compare these two", visible=False, elem_id="compare-these")
            self.resume = gr.Button("Resume", visible=False, elem_id="resume")
        self.plot = gr.HTML("", elem_id="curves")
        self.previews = gr.HTML("", elem_id="previews")
        self.log = gr.Textbox(
            label="Log", lines=LOG_TAIL, max_lines=LOG_TAIL, interactive=False, visible=False, elem_id="log"
        )
        self.command = gr.Textbox(
            label="The same in a terminal",
            visible=False,
            interactive=False,
            lines=1,
            max_lines=3,
            buttons=["copy"],
            elem_id="train-command",
        )
        self.links = gr.HTML("", visible=False, elem_id="train-links")
