"""The same two calls for programs: `/compare` and `/train`, through gradio_client and, with --mcp, as tools.

No `from __future__ import annotations` here: Gradio reads the types of these functions as they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.api_component import Api
from pydantic import BaseModel, Field

from dora_diffusion.comparison.export import metadata_of, record_of
from dora_diffusion.comparison.request import Cell
from dora_diffusion.errors import DataError, DoraDiffusionError
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.exports import command_line
from dora_diffusion.webapp.forms import Chosen, compare_request
from dora_diffusion.webapp.shelf import SAMPLES
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train import start_run
from dora_diffusion.webapp.train_form import TrainForm
from dora_diffusion.webapp.uploads import Upload, read_uploads
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["Adapter", "Comparison", "Picture", "Training", "add_endpoints"]

LOOK_EVERY = 0.5  # seconds


class File(BaseModel):
    """A file, which gradio_client downloads and gives as a path."""

    path: str
    meta: dict[str, str] = Field(default_factory=lambda: {"_type": "gradio.FileData"})


class Picture(BaseModel):
    """A cell of the comparison. `difference` is the mean absolute difference to the base's picture, 0 to 255."""

    row: int
    column: int
    prompt: str
    seed: int
    caption: str
    difference: float
    note: str
    from_cache: bool
    file: File


class Comparison(BaseModel):
    """The pictures row by row, the base first; `command` makes the same in a terminal."""

    pictures: list[Picture]
    command: str


class Adapter(BaseModel):
    """`key` is what /compare takes as an adapter."""

    kind: str
    key: str
    file: File


class Training(BaseModel):
    """How a run stands: phase is waiting, preparing, training, finished, stopped or failed."""

    phase: str
    text: str
    error: str
    adapters: list[Adapter]


def add_endpoints(studio: Studio) -> None:
    """Register both inside the page's Blocks."""

    def compare(
        prompt: str,
        seeds: list[int] = [1],  # noqa: B006 - shown as the default, never changed
        first: str = SAMPLES[0],
        first_strength: float = 1.0,
        second: str = SAMPLES[1],
        second_strength: float = 1.0,
        steps: int = 25,
        size: str = "",
        partial: bool = False,
        page: gr.Request = None,  # type: ignore[assignment]
    ) -> dict:
        """Draw a prompt with the base model, a LoRA and a DoRA from the same seeds.

        Args:
            prompt: what to draw
            seeds: whole numbers; a row of pictures for each
            first: the first adapter's key, such as sample/lora; empty for none
            first_strength: 0 is the base, 1 the adapter as it was trained, up to 1.5
            second: the second adapter's key, such as sample/dora; empty for none
            second_strength: as first_strength
            steps: denoising steps
            size: width x height in pixels, such as 832x1216; empty for the base's own
            partial: load what fits of a file that does not fit whole; a picture's note says how much that is

        Returns:
            The pictures, and the command that draws the same in a terminal.
        """
        chosen = [Chosen(key, at) for key, at in ((first, first_strength), (second, second_strength)) if key]
        with _Told():
            return _compare(studio, page, prompt, seeds, chosen, steps, size, partial).model_dump()

    def train(
        images: list[dict],
        captions: list[str] = [],  # noqa: B006
        instance_prompt: str = "",
        kind: str = "both",
        steps: int = 200,
        rank: int = 16,
        batch_size: int = 4,
        random_flip: bool = False,
        train_feed_forward: bool = False,
        train_convolutions: bool = False,
        train_text_encoder: bool = False,
        cut_captions: bool = False,
        norm_axis: str = "output",
        start_from: str = "",
        keep_on_the_way: bool = False,
        page: gr.Request = None,  # type: ignore[assignment]
    ) -> Iterator[dict]:
        """Train a LoRA, a DoRA, or both alike on pictures; ends when the training has ended.

        Args:
            images: uploaded files, at least one
            captions: one for each picture; where there is none, instance_prompt
            instance_prompt: the caption of pictures that have none, such as 'openmoji style'
            kind: lora, dora or both
            steps: optimizer steps of each
            rank: rank of the low-rank update
            batch_size: pictures in a step
            random_flip: every picture half the time as its mirror image
            train_feed_forward: adapt the feed-forward layers beside the attention, for new shapes
            train_convolutions: adapt a UNet's convolutions beside the attention
            train_text_encoder: adapt the text encoder too
            cut_captions: read captions that are too long for the base as far as it can
            norm_axis: DoRA's norm by output (diffusers, PEFT), or by input (ComfyUI, Forge, A1111, InvokeAI)
            start_from: the key of an adapter to train on, whose rank and layers are kept; empty for a new one
            keep_on_the_way: offer the adapters as they were after each tenth of the steps, too

        Returns:
            How the training stands, and at its end the adapters with the keys that compare takes.
        """
        chosen = {
            "random_flip": random_flip,
            "train_feed_forward": train_feed_forward,
            "train_convolutions": train_convolutions,
            "train_text_encoder": train_text_encoder,
            "cut_captions": cut_captions,
        }
        more = [key for key, wanted in chosen.items() if wanted]
        form = TrainForm(
            instance_prompt,
            kind,
            steps,
            rank,
            batch_size,
            more=more,
            norm_axis=norm_axis,
            start=start_from,
            keep=keep_on_the_way,
        )
        with _Told():
            for state in _train(studio, page, images, captions, form):
                yield state.model_dump()

    # Training may wait for its turn for hours: it must not keep anybody from comparing.
    for function, result in ((compare, Comparison), (train, Training)):
        endpoint = gr.api(function, api_name=function.__name__, concurrency_limit=None)
        _declare(endpoint, result)


def _declare(endpoint: gr.events.Dependency, result: type[BaseModel]) -> None:
    """Tell Gradio the fields of what comes back: by itself it reads simple types alone."""
    blocks = gr.context.Context.root_block
    assert blocks is not None  # gr.api would have raised
    function = blocks.fns[endpoint["id"]]
    function.outputs = [Api(None, result.model_json_schema())]


class _Told:
    """A user's mistake becomes an answer that gradio_client raises with its words."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DoraDiffusionError):
            raise gr.Error(parts.said(error), print_exception=False) from error


def _compare(
    studio: Studio,
    page: gr.Request,
    prompt: str,
    seeds: list[int],
    chosen: list[Chosen],
    steps: int,
    size: str,
    partial: bool,
) -> Comparison:
    request, _ = compare_request(studio, visitor_of(page), prompt, seeds, chosen, steps, size=size, partial=partial)
    session = f"api {visitor_of(page)} {page.session_hash}"  # MCP clients share Gradio's own session
    drawing = studio.painter.begin(session, request, visitor_of(page))
    album, record = studio.albums.new(), record_of(request, studio.base_name, studio.packing)
    pictures = []
    try:
        for event in drawing:
            if isinstance(event, Cell):
                file = File(path=str(album.add(event.image, metadata_of(record, event))))
                values = {name: getattr(event, name) for name in Picture.model_fields if hasattr(event, name)}
                pictures.append(Picture(**values, from_cache=event.cached, file=file))
    finally:
        studio.painter.end(session, drawing)
    return Comparison(pictures=pictures, command=command_line(request, studio))


def _train(
    studio: Studio, page: gr.Request, images: list[dict[str, Any]], captions: list[str], form: TrainForm
) -> Iterator[Training]:
    visitor = visitor_of(page)
    start_run(studio, visitor, _uploads(images, captions), form)
    job = studio.jobs.of(visitor)
    assert job is not None  # it was just started
    while not job.wait(LOOK_EVERY):
        yield Training(phase=job.state.phase, text=job.state.text, error="", adapters=[])
    state = job.snapshot()
    adapters = [
        Adapter(kind=path.stem, key=studio.shelf.key_of(path, visitor), file=File(path=str(job.album.copy_in(path))))
        for path in state.adapters
    ]
    error = parts.said(state.error) if state.error else ""
    yield Training(phase=state.phase, text=state.text, error=error, adapters=adapters)


def _uploads(images: list[dict[str, Any]], captions: list[str]) -> list[Upload]:
    """Raises DataError. The page has checked that each path is one of the caller's uploads."""
    named = [image.get("path") for image in images]
    paths = [Path(path) for path in named if isinstance(path, str)]
    if len(paths) != len(images) or (captions and len(captions) > len(images)):
        raise DataError("images must be uploaded files, and captions at most one for each.")
    uploads = read_uploads(paths)
    given = list(zip(paths, [*captions, *[""] * (len(paths) - len(captions))], strict=True))
    pictures = {upload.path for upload in uploads}
    if strays := [path.name for path, caption in given if caption.strip() and path not in pictures]:
        raise DataError(
            f"a caption is given for {strays[0]}, which is no picture. Give captions in the order of images."
        )
    rest = iter(given)  # a text file among the images has a place too, and no caption
    written = [next(caption for path, caption in rest if path == upload.path) for upload in uploads]
    return [replace(upload, caption=caption or upload.caption) for upload, caption in zip(uploads, written)]
