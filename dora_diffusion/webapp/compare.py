"""The Compare tab: one prompt and a few seeds through the base, a LoRA and a DoRA, cell by cell."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

from dora_diffusion.comparison.compare import Cell, CompareRequest, columns_of
from dora_diffusion.errors import ConfigError, DoraDiffusionError, PromptError
from dora_diffusion.models.loading import EMBEDDED
from dora_diffusion.outputs import save_png
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.drawing import Drawing
from dora_diffusion.webapp.studio import Studio

__all__ = ["CompareTab", "parse_seeds"]

MOST_SEEDS = 8
MOST_STEPS = 100
TELL_EVERY = 0.5  # seconds; a message for every step of a quick base would take longer than the step
Update = tuple[object, ...]


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "1, 2 3" as (1, 2, 3). Raises ConfigError."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    if not words or not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise ConfigError(f"seeds is {text!r}; give whole numbers with commas between, such as 1, 2.")
    if len(words) > MOST_SEEDS:
        raise ConfigError(f"{len(words)} seeds are more than the {MOST_SEEDS} this page draws at once. Give fewer.")
    return tuple(dict.fromkeys(int(word) for word in words))


class CompareTab:
    """Builds the tab; `pickers` and `refresh` are for those who have made new adapters."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def build(self) -> None:
        base = self.studio.base_name
        guidance = EMBEDDED[base].guidance_scale if base in EMBEDDED else None
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                "dog face, openmoji style" if base in EMBEDDED else "",
                label="Prompt",
                placeholder="what to draw",
                scale=4,
                min_width=260,
                max_lines=3,
                elem_id="prompt",
            )
            self.seeds = gr.Textbox("1, 2", label="Seeds", scale=1, min_width=90, elem_id="seeds")
            self.steps = gr.Slider(
                1, MOST_STEPS, value=25, step=1, label="Steps", scale=2, min_width=150, elem_id="steps"
            )
            self.guidance = gr.Number(
                guidance,
                label="Guidance",
                placeholder="the base's own",
                minimum=0,
                maximum=30,
                step=0.5,
                scale=1,
                min_width=100,
                elem_id="guidance",
            )
        with gr.Row():
            keys = self.studio.shelf.pair()
            first = self._adapter("First adapter", "first", keys[0])
            second = self._adapter("Second adapter", "second", keys[1])
        self.pickers, self.strengths = (first[0], second[0]), (first[1], second[1])
        self._uploads, self._cards = (first[2], second[2]), (first[3], second[3])
        with gr.Row():
            self.go = gr.Button("Compare", variant="primary", elem_id="compare")
            self.halt = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-compare")
        self.status = gr.HTML(parts.status_line(""), elem_id="compare-status")
        self.error = gr.HTML("", visible=False, elem_id="compare-error")
        self.grid = gr.HTML(parts.empty_state(keys[0] is not None), elem_id="grid")
        self._connect()

    def _adapter(
        self, label: str, name: str, chosen: str | None
    ) -> tuple[gr.Dropdown, gr.Slider, gr.UploadButton, gr.HTML]:
        with gr.Column(elem_classes="dd-adapter", min_width=290):
            picker = gr.Dropdown(self._offered(), value=chosen or "", label=label, elem_id=f"{name}-adapter")
            strength = gr.Slider(0, 1.5, value=1, step=0.05, label="Strength", elem_id=f"{name}-strength")
            with gr.Row(equal_height=True, elem_classes="dd-under"):
                card = gr.HTML(self.show_card(chosen)[0], elem_id=f"{name}-card", scale=3, min_width=120)
                upload = gr.UploadButton(
                    "Upload a file",
                    file_types=[".safetensors"],
                    size="sm",
                    scale=0,
                    min_width=120,
                    elem_id=f"{name}-upload",
                )
        return picker, strength, upload, card

    def _connect(self) -> None:
        for picker, upload, card in zip(self.pickers, self._uploads, self._cards):
            picker.change(self.show_card, picker, [card, self.error], show_progress="hidden", api_visibility="private")
            upload.upload(self.take_in, upload, [picker, self.error], api_visibility="private")
        # A list that was filled an hour ago would lack what was made since.
        for picker in self.pickers:
            picker.focus(self.choices, picker, picker, show_progress="hidden", queue=False, api_visibility="private")
        form = [self.prompt, self.seeds, self.steps, self.guidance]
        adapters = [self.pickers[0], self.strengths[0], self.pickers[1], self.strengths[1]]
        shown = [self.grid, self.status, self.error, self.go, self.halt]
        for start in (self.go.click, self.prompt.submit):
            start(
                self.draw,
                [*form, *adapters],
                shown,
                show_progress="hidden",
                concurrency_limit=4,  # those who wait their turn see that they do; the painter lets one draw
                concurrency_id="compare",
                api_visibility="private",
            )
        self.halt.click(self.stop, None, None, queue=False, show_progress="hidden", api_visibility="private")

    def draw(
        self,
        prompt: str,
        seeds: str,
        steps: int,
        guidance: float | None,
        first: str | None,
        first_strength: float,
        second: str | None,
        second_strength: float,
        page: gr.Request,
    ) -> Iterator[Update]:
        """Yields what the grid, the status line, the error panel and the two buttons show."""
        yield gr.skip(), parts.status_line("starting", busy=True), _panel(None), *_buttons(drawing=True)
        chosen = [(key, strength) for key, strength in ((first, first_strength), (second, second_strength)) if key]
        try:
            request, names = self._request(prompt, seeds, steps, guidance, chosen)
            drawing = self.studio.painter.begin(str(page.session_hash), request)
            try:
                for grid, status in self._show(drawing, names):
                    yield grid, status, gr.skip(), gr.skip(), gr.skip()
            finally:
                self.studio.painter.end(str(page.session_hash), drawing)
            text = "stopped" if drawing.was_stopped else ""
            yield gr.skip(), parts.status_line(text) if text else gr.skip(), gr.skip(), *_buttons(drawing=False)
        except DoraDiffusionError as error:
            toast(error)
            yield gr.skip(), parts.status_line(""), _panel(error), *_buttons(drawing=False)

    def stop(self, page: gr.Request) -> None:
        self.studio.painter.stop(str(page.session_hash))

    def _request(
        self, prompt: str, seeds: str, steps: int, guidance: float | None, chosen: list[tuple[str, float]]
    ) -> tuple[CompareRequest, list[str]]:
        if not prompt.strip():
            raise PromptError("there is no prompt. Write what to draw, such as: dog face, openmoji style.")
        shelved = [self.studio.shelf.find(key) for key, _ in chosen]
        request = CompareRequest(
            prompts=(prompt.strip(),),
            seeds=parse_seeds(seeds),
            adapters=columns_of([each.path for each in shelved], [strength for _, strength in chosen]),
            num_inference_steps=int(steps),
            guidance_scale=guidance,
        )
        return request, [self.studio.base_name, *(each.label for each in shelved)]

    def _show(self, drawing: Drawing, names: list[str]) -> Iterator[tuple[object, object]]:
        """The grid and the status line after every event; cells are saved as they come."""
        request = drawing.request
        total = len(request.rows) * len(request.columns)
        folder = self.studio.new_pictures()
        placed: list[parts.Placed] = []
        seconds, told = 0.0, 0.0
        drawn = False  # the pictures of before stay until there is something to draw
        try:
            for event in drawing:
                if isinstance(event, Cell):
                    placed.append(parts.Placed(event, self._save(event, request, folder)))
                    seconds += event.seconds
                    done = len(placed) == total
                    text = f"{total} pictures in {seconds:.1f} s" if done else f"picture {len(placed) + 1} of {total}"
                    yield parts.grid(request, placed, names, drawing=not done), parts.status_line(text, busy=not done)
                elif event.text or not drawn or time.monotonic() > told + TELL_EVERY:
                    told = time.monotonic()
                    shown = gr.skip() if drawn or event.text else parts.grid(request, placed, names, drawing=True)
                    drawn = drawn or not event.text
                    text = event.text or f"picture {len(placed) + 1} of {total} · step {event.done} of {event.total}"
                    yield shown, parts.status_line(text, busy=True)
        except DoraDiffusionError:
            if drawn:
                yield parts.grid(request, placed, names), gr.skip()
            raise
        if drawing.was_stopped and drawn:
            yield parts.grid(request, placed, names), gr.skip()

    def _save(self, cell: Cell, request: CompareRequest, folder: Path) -> Path:
        guidance = "the base's own" if request.guidance_scale is None else f"{request.guidance_scale:g}"
        metadata = {
            "prompt": cell.prompt,
            "seed": str(cell.seed),
            "caption": cell.caption,
            "base": self.studio.base_name,
            "num_inference_steps": str(request.num_inference_steps),
            "guidance_scale": guidance,
        }
        return save_png(cell.image, folder / f"row{cell.row + 1}-column{cell.column + 1}.png", metadata)

    def choices(self, chosen: str | None) -> object:
        """The adapters there are now, whatever is chosen staying chosen."""
        offered = self._offered()
        known = {key for _, key in offered}
        return gr.update(choices=offered, value=chosen if chosen in known else "")

    def _offered(self) -> list[tuple[str, str]]:
        return [("none", ""), *((each.label, each.key) for each in self.studio.shelf.all())]

    def preset(self) -> Update:
        """Both pickers and the grid of a page that was just opened."""
        first, second = self.studio.shelf.pair()
        return self.choices(first), self.choices(second), parts.empty_state(has_adapters=first is not None)

    def show_card(self, key: str | None) -> Update:
        try:
            return self._card(key), gr.skip()
        except DoraDiffusionError as error:
            return self._card(None), _panel(error)

    def _card(self, key: str | None) -> str:
        text = f"<b>{escape(self.studio.shelf.card(key))}</b>" if key else "this column stays empty"
        return f"<p class='dd-card'>{text}</p>"

    def take_in(self, upload: str) -> Update:
        try:
            return self.choices(self.studio.shelf.take_in(Path(upload)).key), _panel(None)
        except DoraDiffusionError as error:
            toast(error)
            return gr.skip(), _panel(error)


def toast(error: DoraDiffusionError) -> None:
    gr.Warning(escape(str(error).partition("\n")[0]), title="That did not work")


def _panel(error: DoraDiffusionError | None) -> object:
    return gr.update(value=parts.error_panel(error), visible=error is not None)


def _buttons(drawing: bool) -> tuple[object, object]:
    return gr.update(visible=not drawing), gr.update(visible=drawing)
